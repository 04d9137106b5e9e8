//go:build unix

package cli

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// IsTerminal reports whether f is a terminal.
func IsTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), getTermios)
	return err == nil
}

// ReadSecret prompts for a line and reads it from a terminal without showing it. When ctx ends first, the echo is put back and the read is
// left behind: the process is about to end.
func ReadSecret(ctx context.Context, f *os.File, prompt func()) (string, error) {
	fd := int(f.Fd())
	before, err := unix.IoctlGetTermios(fd, getTermios)
	if err != nil {
		return "", err
	}
	silent := *before
	silent.Lflag &^= unix.ECHO
	silent.Lflag |= unix.ICANON | unix.ISIG
	silent.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, setTermios, &silent); err != nil {
		return "", err
	}
	defer func() { _ = unix.IoctlSetTermios(fd, setTermios, before) }() // nothing else can be done about it
	// Only now: what is typed at once must not be shown either.
	prompt()
	return readLine(ctx, f)
}
