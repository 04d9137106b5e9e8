package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/certmesh/certmesh/protocol/fault"
)

// maxFile bounds what is read: no certificate file comes near it, and a wrong path must not cost the host's memory.
const maxFile = 1 << 20

// step is called before every change of the file system; an error stands for the failure of that change. Tests cut the
// sequence there; nil in production. errTorn makes a write leave half of its bytes.
type step func(op, path string) error

var errTorn = errors.New("torn write")

// dir is an open directory. Names are single components.
type dir struct {
	root *os.Root
	path string
	step step
}

func (d *dir) close() { _ = d.root.Close() }

func (d *dir) before(op, name string) error {
	if d.step == nil {
		return nil
	}
	return d.step(op, filepath.Join(d.path, name))
}

// access opens the directory path, below one of roots, without following a link on the way.
func access(roots []string, path, field string, st step) (*dir, error) {
	root, rest, err := within(roots, path, field)
	if err != nil {
		return nil, err
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, trouble(err, field, "the root %s cannot be opened", root)
	}
	d := &dir{r, root, st}
	if rest == "" {
		return d, nil
	}
	for name := range strings.SplitSeq(rest, "/") {
		next, err := d.enter(name, field)
		d.close()
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}

// within finds the longest root that holds path and what is left of path below it ("" for the root itself).
func within(roots []string, path, field string) (root, rest string, err error) {
	for _, r := range roots {
		r = filepath.Clean(r)
		if !filepath.IsAbs(r) || len(r) < len(root) {
			continue
		}
		if path == r {
			root, rest = r, ""
			continue
		}
		prefix := r
		if prefix != "/" {
			prefix += "/"
		}
		if after, ok := strings.CutPrefix(path, prefix); ok {
			root, rest = r, after
		}
	}
	if root != "" {
		return root, rest, nil
	}
	allowed := "none is configured"
	if len(roots) > 0 {
		allowed = strings.Join(roots, ", ")
	}
	return "", "", &fault.Error{Class: fault.Forbidden, Field: field, Message: fmt.Sprintf(
		"%q lies outside the roots that this agent may write to (%s); choose a path below them, or add one to CERTMESH_TARGET_ROOTS on this host and restart the agent", path, allowed)}
}

// enter opens a directory in d.
func (d *dir) enter(name, field string) (*dir, error) {
	path := filepath.Join(d.path, name)
	fi, err := d.root.Lstat(name)
	if err != nil {
		return nil, trouble(err, field, "the directory %s cannot be opened", path)
	}
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		return nil, linkError(field, path)
	case !fi.IsDir():
		return nil, fault.InvalidField(field, "%s is not a directory; name one that exists", path)
	}
	r, err := d.root.OpenRoot(name)
	if err != nil {
		return nil, trouble(err, field, "the directory %s cannot be opened", path)
	}
	// A link put there since would have been followed, though never out of the root.
	if got, err := r.Stat("."); err != nil || !os.SameFile(fi, got) {
		_ = r.Close()
		return nil, linkError(field, path)
	}
	return &dir{r, path, d.step}, nil
}

func linkError(field, path string) error {
	return &fault.Error{Class: fault.Forbidden, Field: field, Message: fmt.Sprintf(
		"%s is a symbolic link, which is not followed; name the place that it leads to", path)}
}

// content is what a file holds; absent if there is none.
type content struct {
	absent bool
	data   []byte
	sum    string
	info   fs.FileInfo
}

func sumOf(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// read returns a regular file.
func (d *dir) read(name, field string) (content, error) {
	path := filepath.Join(d.path, name)
	fi, err := d.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return content{absent: true}, nil
	}
	if err != nil {
		return content{}, trouble(err, field, "%s cannot be read", path)
	}
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		return content{}, linkError(field, path)
	case !fi.Mode().IsRegular():
		return content{}, fault.InvalidField(field, "%s exists and is not a regular file; choose another path or move it away", path)
	case fi.Size() > maxFile:
		return content{}, fault.InvalidField(field, "%s has %d bytes, more than a certificate file ever has (%d); check the path", path, fi.Size(), maxFile)
	}
	// O_NONBLOCK: whatever replaced the file since must not block the agent.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return content{}, trouble(err, field, "%s cannot be read", path)
	}
	defer func() { _ = f.Close() }()
	if got, err := f.Stat(); err != nil || !os.SameFile(fi, got) {
		return content{}, fault.New(fault.Conflict, "%s was replaced while it was read", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return content{}, trouble(err, field, "%s cannot be read", path)
	}
	if len(data) > maxFile {
		return content{}, fault.New(fault.Conflict, "%s grew while it was read", path)
	}
	return content{data: data, sum: sumOf(data), info: fi}, nil
}

// access rights of a file that is made; -1 leaves the agent's own user or group.
type rights struct {
	mode     fs.FileMode
	uid, gid int
}

// create makes a file that did not exist, with its rights set before it has its first byte, and syncs it. On failure
// nothing is left.
func (d *dir) create(name string, data []byte, r rights) (err error) {
	if err := d.before("create", name); err != nil {
		return err
	}
	f, err := d.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = d.remove(name)
		}
	}()
	if r.uid >= 0 || r.gid >= 0 {
		if err := d.before("chown", name); err != nil {
			return err
		}
		if err := f.Chown(r.uid, r.gid); err != nil {
			return err
		}
	}
	if err := d.before("chmod", name); err != nil {
		return err
	}
	if err := f.Chmod(r.mode); err != nil {
		return err
	}
	if err := d.before("write", name); err != nil {
		if errors.Is(err, errTorn) {
			_, _ = f.Write(data[:len(data)/2])
		}
		return err
	}
	if _, err := io.Copy(f, bytes.NewReader(data)); err != nil {
		return err
	}
	if err := d.before("fsync", name); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// link gives a file a second name, which outlives the first's being replaced. What is there already under that name is an
// error, and so is a file system that has no such names.
func (d *dir) link(name, as string) error {
	if err := d.before("link", as); err != nil {
		return err
	}
	return d.root.Link(name, as)
}

func (d *dir) rename(from, to string) error {
	if err := d.before("rename", to); err != nil {
		return err
	}
	return d.root.Rename(from, to)
}

func (d *dir) symlink(to, name string) error {
	if err := d.before("symlink", name); err != nil {
		return err
	}
	return d.root.Symlink(to, name)
}

// mkdir makes a directory with exactly mode, whatever the umask.
func (d *dir) mkdir(name string, mode fs.FileMode) error {
	if err := d.before("mkdir", name); err != nil {
		return err
	}
	if err := d.root.Mkdir(name, 0o700); err != nil {
		return err
	}
	if err := d.before("chmod", name); err != nil {
		return err
	}
	return d.root.Chmod(name, mode)
}

// remove deletes a file, a link or an empty directory; what does not exist is removed.
func (d *dir) remove(name string) error {
	if _, err := d.root.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := d.before("remove", name); err != nil {
		return err
	}
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// exists reports whether there is anything called name.
func (d *dir) exists(name string) bool {
	_, err := d.root.Lstat(name)
	return err == nil
}

// sync makes the names in d durable.
func (d *dir) sync() error {
	if err := d.before("syncdir", ""); err != nil {
		return err
	}
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return f.Sync()
}

// names returns the sorted names in d for which keep says yes.
func (d *dir) names(keep func(string) bool) ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	all, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(n string) bool { return !keep(n) })
	slices.Sort(all)
	return all, nil
}

// trouble classifies an error of the operating system and says what to do about it.
func trouble(err error, field, format string, args ...any) error {
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	what := fmt.Sprintf(format, args...)
	class, advice := fault.Retryable, ""
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		advice = "the disk is full or the quota used up; free space there"
	case errors.Is(err, syscall.EROFS):
		advice = "the file system is mounted read-only; mount it writable or choose another path"
	case errors.Is(err, fs.ErrPermission):
		advice = "the agent's user lacks the permission; correct the owner and mode of the directory"
	case errors.Is(err, fs.ErrNotExist):
		class, advice = fault.Invalid, "it does not exist; create it, or correct the path"
	case errors.Is(err, syscall.ENOTDIR):
		class, advice = fault.Invalid, "a part of the path is not a directory; correct the path"
	case errors.Is(err, syscall.ENAMETOOLONG):
		class, advice = fault.Invalid, "the name is too long; choose a shorter one"
	default:
		advice = reason(err)
	}
	e := fault.Wrap(class, err, "%s: %s", what, advice)
	if class == fault.Invalid {
		e.Field = field
	}
	return e
}

// reason names the operating system's cause without its paths.
func reason(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	if le, ok := errors.AsType[*os.LinkError](err); ok {
		return le.Err.Error()
	}
	return err.Error()
}
