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
		return "", fmt.Errorf("%s is not installed: apt-get install %s", name, name)
	}
	return string(out), err
}
