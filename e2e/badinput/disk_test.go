package badinput

import (
	"crypto/elliptic"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/certmesh/certmesh/e2e/estate"
)

func strong() elliptic.Curve { return elliptic.P384() }

// mount puts a small file system at dir until the test ends.
func (b *bench) mount(dir string) {
	b.T.Helper()
	b.OK(os.MkdirAll(dir, 0o700))
	err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700")
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
		b.T.Skip("a small file system needs the right to mount one")
	}
	b.OK(err)
	b.T.Cleanup(func() {
		// Lazily: what an agent still has open there must not keep the estate from being removed.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			b.T.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// fill uses up what room is left in dir; the answer gives it back.
func (b *bench) fill(dir string) (free func()) {
	b.T.Helper()
	path := filepath.Join(dir, ".filler")
	f, err := os.Create(path)
	b.OK(err)
	for n := 64 << 10; n > 0; {
		if _, err := f.Write(make([]byte, n)); errors.Is(err, syscall.ENOSPC) {
			n /= 2
		} else {
			b.OK(err)
		}
	}
	b.OK(f.Close())
	return func() { b.OK(os.Remove(path)) }
}

func (b *bench) fullDisk() {
	dir := filepath.Join(b.SiteDir("host"), "small")
	b.mount(dir)
	free := b.fill(dir)
	b.OK(b.target("d-full", map[string]any{"dir": filepath.Join(dir, "site")}))
	b.stumbles("d-full", "disk is full")
	free()
	b.Current("for-d-full")
	b.Quiet("--certificate", "for-d-full")
}

func (b *bench) readOnly() {
	dir := filepath.Join(b.SiteDir("host"), "frozen")
	b.mount(dir)
	remount := func(flags uintptr) { b.OK(syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|flags, "size=256k")) }
	remount(syscall.MS_RDONLY)
	b.OK(b.target("d-frozen", map[string]any{"pem_path": filepath.Join(dir, "site.pem")}))
	b.stumbles("d-frozen", "read-only")
	remount(0)
	b.Current("for-d-frozen")
	b.Quiet("--certificate", "for-d-frozen")
}

// fullAgent fills the disk under the agent's own data: it takes no work that it could not remember, and nothing is lost.
func (b *bench) fullAgent() {
	b.mount(b.AgentDir("cramped"))
	p, a := b.Join(estate.AgentOptions{Name: "cramped"})
	defer p.Kill()
	path := filepath.Join(b.SiteDir("cramped"), "site.pem")
	b.Do("targets", "create", "d-cramped", "--agent", a.ID, "--kind", "file", "--settings", `{"pem_path":"`+path+`"}`)
	free := b.fill(b.AgentDir("cramped"))
	b.Do("certs", "create", "cramped", "--dns", "cramped.example.test", "--issuer", "ca", "--target", "d-cramped")
	b.Until("the agent to say that its disk is full", func() error {
		text, err := os.ReadFile(b.Path("agent-cramped.log"))
		if err == nil && !strings.Contains(string(text), "no space left") {
			err = errors.New("it says nothing of it")
		}
		return err
	})
	if c := b.Certificate("cramped"); c.PlacementsCurrent != 0 {
		b.T.Errorf("work was done that could not be remembered: %+v", c)
	}
	free()
	c := b.Current("cramped")
	b.Keys("cramped", c.ID, 1)
	if n := len(b.Versions("cramped")); n != 1 {
		b.T.Errorf("%d versions were issued for one order", n)
	}
}
