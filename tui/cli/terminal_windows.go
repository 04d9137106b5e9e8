package cli

import (
	"context"
	"os"

	"golang.org/x/sys/windows"
)

// IsTerminal reports whether f is a console.
func IsTerminal(f *os.File) bool {
	var mode uint32
	return windows.GetConsoleMode(windows.Handle(f.Fd()), &mode) == nil
}

// ReadSecret prompts for a line and reads it from a console without showing it. When ctx ends first, the echo is put back and the read is
// left behind: the process is about to end.
func ReadSecret(ctx context.Context, f *os.File, prompt func()) (string, error) {
	h := windows.Handle(f.Fd())
	var before uint32
	if err := windows.GetConsoleMode(h, &before); err != nil {
		return "", err
	}
	silent := before&^windows.ENABLE_ECHO_INPUT | windows.ENABLE_LINE_INPUT | windows.ENABLE_PROCESSED_INPUT
	if err := windows.SetConsoleMode(h, silent); err != nil {
		return "", err
	}
	defer func() { _ = windows.SetConsoleMode(h, before) }() // nothing else can be done about it
	// Only now: what is typed at once must not be shown either.
	prompt()
	return readLine(ctx, f)
}
