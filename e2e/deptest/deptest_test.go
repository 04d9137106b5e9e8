package deptest

import (
	"path"
	"slices"
	"strings"
	"testing"
)

// imports is a rule about what the packages of some folders import directly.
type imports struct {
	name string
	// applies says which folders the rule is about.
	applies func(folder string) bool
	// allows judges one import. ours is the folder of a package of ours, or "" for anyone else's (then standard tells
	// the standard library from the rest).
	allows func(folder, ours, importPath string, standard bool) bool
	// tests extends the rule to what the tests of the package import.
	tests  bool
	reason string
}

// links is a rule about what packages may need, directly or not.
type links struct {
	name    string
	applies func(folder string) bool
	// refuses judges one package of all that is needed.
	refuses func(importPath string) bool
	reason  string
}

// contract returns the contract package of a connector: connectors/target for connectors/target/nginx.
func contract(folder string) string {
	parts := strings.Split(folder, "/")
	return path.Join(parts[:min(2, len(parts))]...)
}

// isTestPackage recognises conformance suites and stand-ins by their names: storetest, targettest, testkey.
func isTestPackage(folder string) bool {
	name := path.Base(folder)
	return strings.HasSuffix(name, "test") || strings.HasPrefix(name, "test") || below(folder, "e2e")
}

func in(parents ...string) func(string) bool {
	return func(folder string) bool { return below(folder, parents...) }
}

func importRules() []imports {
	return []imports{
		{
			name:    "protocol imports nothing of ours but itself",
			applies: in("protocol"),
			allows: func(_, ours, _ string, _ bool) bool {
				return ours == "" || below(ours, "protocol")
			},
			tests:  true,
			reason: "everyone imports protocol",
		},
		{
			name:    "protocol/fault imports the standard library",
			applies: in("protocol/fault"),
			allows:  func(_, _, _ string, standard bool) bool { return standard },
			reason:  "connectors and the domain import it and must stay light",
		},
		{
			name:    "domain imports the standard library and protocol/fault",
			applies: in("controlplane/internal/domain"),
			allows: func(_, ours, importPath string, standard bool) bool {
				impure := []string{"context", "database/sql", "log", "log/slog", "net", "net/http", "os", "os/exec"}
				return standard && !slices.Contains(impure, importPath) || ours == "protocol/fault" || below(ours, "controlplane/internal/domain")
			},
			reason: "rules are pure: no I/O, context or SQL; time is an argument",
		},
		{
			name: "a connector imports its contract and protocol/fault",
			applies: func(folder string) bool {
				return below(folder, "connectors") && !below(folder, "connectors/catalog") && !isTestPackage(folder)
			},
			allows: func(folder, ours, _ string, _ bool) bool {
				return ours == "" || ours == "protocol/fault" || ours == contract(folder) || below(ours, folder)
			},
			reason: "anyone can write a connector knowing one package; what two connectors share belongs in the contract",
		},
		{
			name:    "only controlplane/node imports the store",
			applies: func(folder string) bool { return !below(folder, "controlplane/node", "controlplane/internal/store") },
			allows:  func(_, ours, _ string, _ bool) bool { return !below(ours, "controlplane/internal/store") },
			reason:  "use packages declare the few store methods they need; node hands them the one store",
		},
		{
			name:    "the agent imports protocol and connectors",
			applies: in("agent"),
			allows: func(_, ours, _ string, _ bool) bool {
				return ours == "" || below(ours, "agent", "protocol", "connectors/target", "connectors/source", "connectors/catalog/onhost")
			},
			reason: "hosts run it; the control plane's code has no business there",
		},
		{
			name:    "the operator tool imports protocol",
			applies: in("tui"),
			allows:  func(_, ours, _ string, _ bool) bool { return ours == "" || below(ours, "tui", "protocol") },
			reason:  "it knows what any automation knows: the public API",
		},
		{
			name:    "the cluster imports protocol",
			applies: in("cluster"),
			allows:  func(_, ours, _ string, _ bool) bool { return ours == "" || below(ours, "cluster", "protocol") },
			reason:  "losing it must be an inconvenience, so nothing leaks into it",
		},
		{
			name:    "the cluster's state machine is pure",
			applies: in("cluster/internal/fsm"),
			allows: func(_, ours, importPath string, standard bool) bool {
				pure := []string{"bytes", "cmp", "errors", "fmt", "slices", "strings"}
				return standard && slices.Contains(pure, importPath) || below(ours, "protocol") || importPath == "google.golang.org/protobuf/proto"
			},
			reason: "every node must make the same of a log: no clock, randomness, I/O or log of its own (the package's own test refuses maps and goroutines)",
		},
		{
			name:    "production code does not import tests' packages",
			applies: func(folder string) bool { return !isTestPackage(folder) },
			allows: func(_, ours, importPath string, _ bool) bool {
				return (ours == "" || !isTestPackage(ours)) && importPath != "testing"
			},
			reason: "what only tests need is not shipped",
		},
	}
}

func linkRules() []links {
	sql := []string{"database/sql", "github.com/jackc/pgx", "github.com/lib/pq", "modernc.org/sqlite", "github.com/mattn/go-sqlite3", "github.com/cockroachdb"}
	cloud := []string{"github.com/aws", "github.com/Azure", "cloud.google.com/go", "google.golang.org/api", "k8s.io"}
	screen := []string{"github.com/rivo/tview", "github.com/gdamore/tcell"}
	anyOf := func(lists ...[]string) func(string) bool {
		return func(importPath string) bool {
			for _, list := range lists {
				if slices.ContainsFunc(list, func(prefix string) bool { return strings.HasPrefix(importPath+"/", prefix+"/") }) {
					return true
				}
			}
			return false
		}
	}
	return []links{
		{
			name:    "the agent stays small",
			applies: in("agent"),
			refuses: anyOf(sql, cloud, screen, []string{"github.com/prometheus", "github.com/hashicorp/raft"}),
			reason:  "it runs on every host: no SQL driver, cloud SDK, terminal interface, metrics server or Raft",
		},
		{
			name:    "the command line needs no screen",
			applies: in("tui/client", "tui/cli"),
			refuses: anyOf(screen),
			reason:  "automation runs it; only tui/view and tui/cmd know the terminal interface",
		},
		{
			name:    "the operator tool needs no server",
			applies: in("tui"),
			refuses: anyOf(sql, cloud, []string{"github.com/hashicorp/raft"}),
			reason:  "it is a client of the public API",
		},
		{
			name:    "the control plane needs no screen",
			applies: in("controlplane", "cluster", "connectors"),
			refuses: anyOf(screen),
			reason:  "the terminal interface is the operator tool's",
		},
	}
}

func TestImports(t *testing.T) {
	t.Parallel()
	g := load(t)
	for _, rule := range importRules() {
		t.Run(rule.name, func(t *testing.T) {
			t.Parallel()
			for _, f := range g.ours() {
				if !rule.applies(f) {
					continue
				}
				p := g.at(f)
				list := p.Imports
				if rule.tests {
					list = slices.Concat(p.Imports, p.TestImports, p.XTestImports)
				}
				for _, importPath := range list {
					ours, _ := folder(importPath)
					if !rule.allows(f, ours, importPath, g.standard(importPath)) {
						t.Errorf("%s imports %s: %s", f, importPath, rule.reason)
					}
				}
			}
		})
	}
}

func TestLinks(t *testing.T) {
	t.Parallel()
	g := load(t)
	for _, rule := range linkRules() {
		t.Run(rule.name, func(t *testing.T) {
			t.Parallel()
			for _, f := range g.ours() {
				if !rule.applies(f) || isTestPackage(f) {
					continue
				}
				p := g.at(f)
				for _, needed := range p.Deps {
					if rule.refuses(needed) {
						t.Errorf("%s needs %s: %s\n\t%s", f, needed, rule.reason, g.chain(p.ImportPath, needed))
						break
					}
				}
			}
		})
	}
}

func TestNoNamelessPackages(t *testing.T) {
	t.Parallel()
	refused := []string{"util", "utils", "common", "helper", "helpers", "type", "types", "model", "models", "misc", "shared"}
	for _, f := range load(t).ours() {
		for element := range strings.SplitSeq(f, "/") {
			if slices.Contains(refused, element) {
				t.Errorf("%s: %q says nothing about what is inside: name the package after its trade", f, element)
			}
		}
	}
}

// standard tells the standard library from everyone else's.
func (g graph) standard(importPath string) bool {
	if p, ok := g[importPath]; ok {
		return p.Standard
	}
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}

// TestRulesCanFail guards the suite itself with a small tree that breaks each rule.
func TestRulesCanFail(t *testing.T) {
	t.Parallel()
	for _, broken := range []struct{ folder, importPath string }{
		{"protocol/agent/v1", module + "/agent/agentd"},
		{"protocol/fault", "google.golang.org/grpc"},
		{"controlplane/internal/domain", "database/sql"},
		{"controlplane/internal/domain", module + "/protocol/agent/v1"},
		{"connectors/target/nginx", module + "/connectors/target/file"},
		{"connectors/target/nginx", module + "/controlplane/internal/domain"},
		{"controlplane/internal/issue", module + "/controlplane/internal/store"},
		{"controlplane/cmd/certmeshd", module + "/controlplane/internal/store"},
		{"agent/internal/work", module + "/connectors/catalog/central"},
		{"tui/cli", module + "/controlplane/node"},
		{"cluster/link", module + "/controlplane/node"},
		{"cluster/internal/fsm", "time"},
		{"cluster/internal/fsm", "math/rand/v2"},
		{"cluster/internal/fsm", "os"},
		{"controlplane/node", module + "/controlplane/internal/store/storetest"},
		{"agent/agentd", "testing"},
	} {
		ours, _ := folder(broken.importPath)
		caught := slices.ContainsFunc(importRules(), func(r imports) bool {
			return r.applies(broken.folder) && !r.allows(broken.folder, ours, broken.importPath, graph{}.standard(broken.importPath))
		})
		if !caught {
			t.Errorf("%s may import %s", broken.folder, broken.importPath)
		}
	}
	for _, broken := range []struct{ folder, needs string }{
		{"agent/agentd", "github.com/jackc/pgx/v5/stdlib"},
		{"agent/cmd/certmesh-agent", "github.com/prometheus/client_golang/prometheus"},
		{"agent/internal/work", "github.com/aws/aws-sdk-go-v2/service/acm"},
		{"tui/cli", "github.com/rivo/tview"},
		{"tui/client", "modernc.org/sqlite"},
		{"controlplane/node", "github.com/gdamore/tcell/v2"},
	} {
		caught := slices.ContainsFunc(linkRules(), func(r links) bool { return r.applies(broken.folder) && r.refuses(broken.needs) })
		if !caught {
			t.Errorf("%s may need %s", broken.folder, broken.needs)
		}
	}
}
