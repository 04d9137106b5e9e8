package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// memory is where Linux keeps a file system in memory, and enough is how much of it must be free for the tests' databases,
// keys and sites to go there.
const (
	memory = "/dev/shm"
	enough = 8 << 30
)

// scratch returns the environment for the tests and what removes their folder at the end. Nearly half of the tests' time is
// waiting for disks to sync what is thrown away a second later: their files go into memory where there is enough of it, and
// programs may run from there. Nothing is tested less: what a killed process had written survives it in either place. A
// TMPDIR or GOTMPDIR that is set stays.
func scratch() (env []string, remove func(), err error) {
	env, remove = os.Environ(), func() {}
	if os.Getenv("TMPDIR") != "" || os.Getenv("GOTMPDIR") != "" || !roomy(memory) {
		return env, remove, nil
	}
	dir, err := os.MkdirTemp(memory, "certmesh-test")
	if err != nil {
		return nil, nil, fmt.Errorf("make a folder for the tests: %w", err)
	}
	remove = func() { _ = os.RemoveAll(dir) }
	// Servers of the tests run as other users and must reach what is theirs.
	if err := os.Chmod(dir, 0o755); err != nil {
		remove()
		return nil, nil, fmt.Errorf("open the tests' folder: %w", err)
	}
	if !executes(dir) {
		remove()
		return env, func() {}, nil
	}
	// Not GOTMPDIR, which a test's own folder would follow; so what the compiler makes goes there too.
	return append(env, "TMPDIR="+dir), remove, nil
}

// roomy reports whether dir has enough space.
func roomy(dir string) bool {
	var fs syscall.Statfs_t
	return syscall.Statfs(dir, &fs) == nil && fs.Bavail*uint64(fs.Bsize) >= enough
}

// executes reports whether programs may be run from dir, which a mount can forbid.
func executes(dir string) bool {
	path := filepath.Join(dir, "try")
	defer func() { _ = os.Remove(path) }()
	return os.WriteFile(path, []byte("#!/bin/sh\n"), 0o700) == nil && exec.Command(path).Run() == nil
}
