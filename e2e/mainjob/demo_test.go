package mainjob

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// TestDemo runs `make demo` but for the build: to its end, kept up until Ctrl-C, and with a part that is missing.
func TestDemo(t *testing.T) {
	t.Parallel()
	l := estatetest.New(t)
	root, err := estate.Root()
	l.OK(err)
	demo := l.Path("demo")
	build := exec.CommandContext(l.Ctx, "go", "build", "-race", "-o", demo, "./e2e/cmd/demo")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the demonstration: %v\n%s", err, out)
	}
	// What it leaves behind would lie here.
	temporary := l.Path("tmp")
	l.OK(os.Mkdir(temporary, 0o700))
	clean := func() {
		t.Helper()
		if left, err := os.ReadDir(temporary); err != nil || len(left) > 0 {
			t.Errorf("the demonstration leaves %v (%v)", left, err)
		}
	}

	// 1. It tells the story and ends.
	p, err := l.Start("demo", demo, []string{"TMPDIR=" + temporary}, "-bin", estatetest.Bin())
	l.OK(err)
	<-p.Exited()
	if text := p.Log(); p.ExitCode() != 0 || !strings.Contains(text, "verified and renewed in") || strings.Count(text, "handshake") < 2 {
		t.Errorf("the demonstration ended with status %d:\n%s", p.ExitCode(), text)
	}
	clean()

	// 2. Kept up, it says how to look around, and that works; Ctrl-C ends it.
	p, err = l.Start("demo-kept", demo, []string{"TMPDIR=" + temporary, "KEEP=1"}, "-bin", estatetest.Bin())
	l.OK(err)
	profile := regexp.MustCompile(`export (CERTMESH_CONFIG=\S+)`)
	l.Until("the demonstration to say how to look around", func() error {
		select {
		case <-p.Exited():
			return estate.Stop(errEnded)
		default:
		}
		if !strings.Contains(p.Log(), "openssl s_client") {
			return errEnded
		}
		return nil
	})
	m := profile.FindStringSubmatch(p.Log())
	if m == nil {
		t.Fatalf("no export to copy in:\n%s", p.Log())
	}
	out, err := l.Run(l.Ctx, "certmesh", m[1:2], "certs", "get", "demo-site")
	l.OK(err)
	if !strings.Contains(string(out), "demo.certmesh.test") {
		t.Errorf("the certificate of the demonstration is not shown:\n%s", out)
	}
	l.OK(p.Signal(syscall.SIGINT))
	<-p.Exited()
	if p.ExitCode() != 0 {
		t.Errorf("after Ctrl-C it ended with status %d:\n%s", p.ExitCode(), p.Log())
	}
	clean()

	// 3. When a step fails, it says which and why.
	broken := l.Path("broken")
	l.OK(os.Mkdir(broken, 0o700))
	for _, name := range []string{"certmeshd", "certmesh"} {
		l.OK(os.Symlink(filepath.Join(estatetest.Bin(), name), filepath.Join(broken, name)))
	}
	p, err = l.Start("demo-broken", demo, []string{"TMPDIR=" + temporary}, "-bin", broken)
	l.OK(err)
	<-p.Exited()
	if text := p.Log(); p.ExitCode() != 1 || !strings.Contains(text, "failed  agent") || !strings.Contains(text, "certmesh-agent") {
		t.Errorf("without an agent it ended with status %d:\n%s", p.ExitCode(), text)
	}
	clean()
}

const errEnded = constError("it has not said so")
