package estatetest

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
)

// tool runs a program of the system; its Debian package has its name.
func tool(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s is not installed: apt-get install %s (%w)", name, name, err)
	}
	return string(out), err
}

// TryTool runs a program that is expected to fail; a missing program ends the test.
func (l *Lab) TryTool(name string, args ...string) (string, error) {
	l.T.Helper()
	out, err := tool(l.Ctx, name, args...)
	if errors.Is(err, exec.ErrNotFound) {
		l.T.Fatal(err)
	}
	return out, err
}
