package durable

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// fdatasync syncs a file whose length and place do not change.
func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
