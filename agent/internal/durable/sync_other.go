//go:build unix && !linux

package durable

import "os"

// fdatasync syncs a file. Only Linux has the cheaper form for one whose length and place do not change.
func fdatasync(f *os.File) error { return f.Sync() }
