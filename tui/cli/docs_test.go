package cli_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/certmesh/certmesh/tui/cli"
)

// docsDir is where the pages lie, seen from this package.
const docsDir = "../../docs/cli"

// TestReferencePages keeps docs/cli equal to the tree of commands: one page a command, and an index.
func TestReferencePages(t *testing.T) {
	t.Parallel()
	const mend = "run: go test ./tui/cli -run TestReferencePages -update, and commit docs/cli"
	want := pages((&cli.App{Env: func(string) string { return "" }}).Command())
	if *update {
		if err := os.MkdirAll(docsDir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range want {
			if err := os.WriteFile(filepath.Join(docsDir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, text := range want {
		got, err := os.ReadFile(filepath.Join(docsDir, name))
		if err != nil {
			t.Errorf("docs/cli/%s is missing; %s", name, mend)
		} else if string(got) != text {
			t.Errorf("docs/cli/%s is stale; %s", name, mend)
		}
	}
	files, err := os.ReadDir(docsDir)
	if err != nil {
		t.Fatalf("%v; %s", err, mend)
	}
	for _, f := range files {
		if _, known := want[f.Name()]; !known {
			t.Errorf("docs/cli/%s is about no command; delete it", f.Name())
		}
	}
}

// TestHelpIsComplete holds every command to a summary, an example that calls it, and every flag to a description.
func TestHelpIsComplete(t *testing.T) {
	t.Parallel()
	walk((&cli.App{Env: func(string) string { return "" }}).Command(), func(cmd *cobra.Command) {
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: the summary %q is missing or a sentence", cmd.CommandPath(), cmd.Short)
		}
		if !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s has no example that calls it", cmd.CommandPath())
		}
		for line := range strings.SplitSeq(cmd.Long, "\n") {
			if len([]rune(line)) > 124 {
				t.Errorf("%s: a line of the help is too long: %s", cmd.CommandPath(), line)
			}
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: --%s has no description", cmd.CommandPath(), f.Name)
			}
			if strings.Contains(f.Name, "key") && f.Name != "key-algorithm" && f.Name != "ca-key" {
				t.Errorf("%s: --%s would put a secret into the arguments of a process", cmd.CommandPath(), f.Name)
			}
		})
	})
}

func walk(cmd *cobra.Command, f func(*cobra.Command)) {
	f(cmd)
	for _, c := range cmd.Commands() {
		walk(c, f)
	}
}

func fileOf(cmd *cobra.Command) string {
	return strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".md"
}

// pages are the Markdown pages by file name.
func pages(root *cobra.Command) map[string]string {
	out := map[string]string{}
	var index strings.Builder
	index.WriteString("# The commands of certmesh\n\n" + root.Long + "\n\n| command | what it does |\n| --- | --- |\n")
	walk(root, func(cmd *cobra.Command) {
		out[fileOf(cmd)] = page(cmd)
		if cmd.HasParent() && !cmd.HasSubCommands() {
			fmt.Fprintf(&index, "| [%s](%s) | %s |\n", cmd.CommandPath(), fileOf(cmd), cmd.Short)
		}
	})
	out["README.md"] = index.String()
	return out
}

func page(cmd *cobra.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n\n%s.\n", cmd.CommandPath(), cmd.Short)
	if cmd.Long != "" {
		fmt.Fprintf(&b, "\n%s\n", cmd.Long)
	}
	cmd.InitDefaultHelpFlag()
	if !cmd.HasSubCommands() {
		fmt.Fprintf(&b, "\n```\n%s\n```\n", cmd.UseLine())
	}
	if cmd.Example != "" {
		fmt.Fprintf(&b, "\n## Examples\n\n```\n%s\n```\n", strings.ReplaceAll(strings.TrimPrefix(cmd.Example, "  "), "\n  ", "\n"))
	}
	if cmd.HasSubCommands() {
		b.WriteString("\n## Commands\n\n")
		for _, c := range cmd.Commands() {
			fmt.Fprintf(&b, "- [%s](%s): %s\n", c.CommandPath(), fileOf(c), c.Short)
		}
	}
	flags := func(title string, set *pflag.FlagSet) {
		if text := set.FlagUsages(); text != "" {
			fmt.Fprintf(&b, "\n## %s\n\n```\n%s```\n", title, text)
		}
	}
	flags("Flags", cmd.NonInheritedFlags())
	if cmd.HasParent() {
		flags("Flags of every command", cmd.InheritedFlags())
		fmt.Fprintf(&b, "\nSee also [%s](%s).\n", cmd.Parent().CommandPath(), fileOf(cmd.Parent()))
	}
	return b.String()
}
