package disk

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// Link is the name, in Config.Dir, that leads to the version in use.
	Link = "current"
	// versionsDir holds the versions.
	versionsDir = "versions"

	stagedPrefix = ".staged-"
	gonePrefix   = ".gone-"
	linkPrefix   = ".current-"
)

func isVersion(s string) bool { return isTag(s) }

// inUse returns the name of the version that the link leads to, "" without a link. A link or file that is not ours is a
// Conflict: it may be somebody's own arrangement.
func (s *Store) inUse(d *dir) (string, time.Time, error) {
	path := filepath.Join(d.path, Link)
	fi, err := d.root.Lstat(Link)
	if errors.Is(err, fs.ErrNotExist) {
		return "", time.Time{}, nil
	}
	if err != nil {
		return "", time.Time{}, trouble(err, s.cfg.DirField, "%s cannot be read", path)
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		to, err := d.root.Readlink(Link)
		if err != nil {
			return "", time.Time{}, trouble(err, s.cfg.DirField, "%s cannot be read", path)
		}
		if name, ok := strings.CutPrefix(to, versionsDir+"/"); ok && isVersion(name) {
			return name, fi.ModTime(), nil
		}
	}
	return "", time.Time{}, &fault.Error{Class: fault.Conflict, Field: s.cfg.DirField,
		Message: path + " exists and was not made by certmesh; move it away or choose another directory"}
}

// open opens Dir and, if it exists, the directory of versions in it.
func (s *Store) openDir(path string) (d, vs *dir, err error) {
	d, err = s.access(path, s.cfg.DirField)
	if err != nil {
		return nil, nil, err
	}
	if !d.exists(versionsDir) {
		return d, nil, nil
	}
	vs, err = d.enter(versionsDir, s.cfg.DirField)
	if err != nil {
		d.close()
		return nil, nil, err
	}
	return d, vs, nil
}

func (s *Store) readVersion() (map[Role]Placed, error) {
	out := map[Role]Placed{}
	d, vs, err := s.openDir(s.cfg.Dir)
	if fault.Is(err, fault.Invalid) && errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.close()
	if vs == nil {
		return out, nil
	}
	defer vs.close()
	name, since, err := s.inUse(d)
	if err != nil || name == "" || !vs.exists(name) {
		return out, err
	}
	v, err := vs.enter(name, s.cfg.DirField)
	if err != nil {
		return nil, err
	}
	defer v.close()
	for _, sl := range s.cfg.Slots {
		c, err := v.read(sl.Path, sl.Field)
		if err != nil {
			return nil, err
		}
		if !c.absent {
			out[sl.Role] = Placed{c.data, since}
		}
	}
	return out, nil
}

func (s *Store) stageVersion(ctx context.Context, data [][]byte) (_ Receipt, err error) {
	r := Receipt{V: receiptVersion, Dir: s.cfg.Dir, New: s.newTag()}
	field := s.cfg.DirField
	if err := alive(ctx); err != nil {
		return r, err
	}
	if r.Made, err = s.makeDir(); err != nil {
		return r, err
	}
	defer func() {
		if err != nil {
			// Best effort: what cannot be removed now is swept by the next Stage.
			_ = s.cleanVersion(r)
		}
	}()
	d, vs, err := s.openDir(s.cfg.Dir)
	if err != nil {
		return r, err
	}
	defer d.close()
	if r.Old, _, err = s.inUse(d); err != nil {
		return r, err
	}
	if vs == nil {
		if err := d.mkdir(versionsDir, 0o755); err != nil {
			// It may be there already, with a wrong mode.
			_ = d.remove(versionsDir)
			return r, trouble(err, field, "a directory for versions cannot be made in %s", s.cfg.Dir)
		}
		r.MadeVersions = true
		if vs, err = d.enter(versionsDir, field); err != nil {
			return r, err
		}
	}
	defer vs.close()
	if r.Old != "" && !vs.exists(r.Old) {
		// A link that leads nowhere holds nothing that could be gone back to.
		r.Old = ""
	}
	if err := s.sweepVersions(d, vs); err != nil {
		return r, trouble(err, field, "what an interrupted installation left in %s cannot be removed", s.cfg.Dir)
	}
	staged := stagedPrefix + r.New
	if err := vs.mkdir(staged, 0o755); err != nil {
		return r, trouble(err, field, "a new version cannot be made in %s", vs.path)
	}
	v, err := vs.enter(staged, field)
	if err != nil {
		return r, err
	}
	defer v.close()
	for i, sl := range s.cfg.Slots {
		if err := alive(ctx); err != nil {
			return r, err
		}
		if err := v.create(sl.Path, data[i], rights{sl.Mode, s.cfg.UID, s.cfg.GID}); err != nil {
			return r, trouble(err, sl.Field, "the new %s cannot be written in %s", sl.Path, v.path)
		}
	}
	for _, x := range []*dir{v, vs, d} {
		if err := x.sync(); err != nil {
			return r, trouble(err, field, "%s cannot be synced", x.path)
		}
	}
	return r, nil
}

// makeDir makes Dir, but not its parents: where a missing parent should be and who should own it is not ours to guess.
func (s *Store) makeDir() (bool, error) {
	_, rest, err := within(s.cfg.Roots, s.cfg.Dir, s.cfg.DirField)
	if err != nil || rest == "" {
		return false, err
	}
	parent, err := s.access(filepath.Dir(s.cfg.Dir), s.cfg.DirField)
	if err != nil {
		return false, err
	}
	defer parent.close()
	base := filepath.Base(s.cfg.Dir)
	if parent.exists(base) {
		return false, nil
	}
	err = parent.mkdir(base, 0o755)
	if err == nil {
		err = parent.sync()
	}
	if err != nil {
		_ = parent.remove(base)
		return false, trouble(err, s.cfg.DirField, "the directory %s cannot be made", s.cfg.Dir)
	}
	return true, nil
}

// sweepVersions removes what was staged and never committed, and what was being removed.
func (s *Store) sweepVersions(d, vs *dir) error {
	names, err := vs.names(func(n string) bool { return tagged(n, stagedPrefix) || tagged(n, gonePrefix) })
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := vs.removeTree(n); err != nil {
			return err
		}
	}
	return sweep(d, linkPrefix)
}

// drop removes a version; it disappears under its name at once, so that half a version is never taken for one.
func (d *dir) drop(name string) error {
	if !d.exists(name) {
		return nil
	}
	gone := gonePrefix + strings.TrimPrefix(name, stagedPrefix)
	if d.exists(gone) {
		if err := d.removeTree(gone); err != nil {
			return err
		}
	}
	if err := d.rename(name, gone); err != nil {
		return err
	}
	return d.removeTree(gone)
}

// removeTree removes a directory of files.
func (d *dir) removeTree(name string) error {
	if !d.exists(name) {
		return nil
	}
	sub, err := d.enter(name, "")
	if err != nil {
		return err
	}
	defer sub.close()
	names, err := sub.names(func(string) bool { return true })
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := sub.remove(n); err != nil {
			return err
		}
	}
	return d.remove(name)
}

func (s *Store) commitVersion(r Receipt) error {
	d, vs, err := s.openDir(r.Dir)
	if err != nil {
		return err
	}
	defer d.close()
	if vs == nil {
		return errNotStaged(r)
	}
	defer vs.close()
	cur, _, err := s.inUse(d)
	if err != nil {
		return err
	}
	if cur == r.New {
		return nil
	}
	if cur != r.Old && vs.exists(cur) {
		return fault.New(fault.Conflict, "another version was installed in %s since the new one was staged; nothing was installed", r.Dir)
	}
	if !vs.exists(r.New) {
		if !vs.exists(stagedPrefix + r.New) {
			return errNotStaged(r)
		}
		if err := vs.rename(stagedPrefix+r.New, r.New); err != nil {
			return trouble(err, s.cfg.DirField, "the new version cannot be put in place in %s", r.Dir)
		}
		if err := vs.sync(); err != nil {
			return trouble(err, s.cfg.DirField, "%s cannot be synced", vs.path)
		}
	}
	if err := s.point(d, r.New); err != nil {
		err = trouble(err, s.cfg.DirField, "%s cannot be switched to the new version", filepath.Join(r.Dir, Link))
		if now, _, e := s.inUse(d); e == nil && now == r.New {
			if back := s.pointBack(d, r.Old); back != nil {
				return fault.Wrap(fault.ClassOf(err), errors.Join(err, back), "%s was switched but cannot be synced, and going back failed too (%s)", filepath.Join(r.Dir, Link), reason(back))
			}
		}
		return err
	}
	// The material is in place: tidying must not make it fail.
	if err := s.pruneVersions(vs, r); err != nil {
		s.cfg.Log.Warn("old versions not removed", "path", r.Dir, "err", err)
	}
	return nil
}

func errNotStaged(r Receipt) error {
	return fault.New(fault.Conflict, "what was staged in %s is gone; stage it again", r.Dir)
}

// point makes the link lead to version name by one rename.
func (s *Store) point(d *dir, name string) error {
	tmp := linkPrefix + name
	if err := d.remove(tmp); err != nil {
		return err
	}
	if err := d.symlink(versionsDir+"/"+name, tmp); err != nil {
		return err
	}
	if err := d.rename(tmp, Link); err != nil {
		_ = d.remove(tmp)
		return err
	}
	return d.sync()
}

// pointBack makes the link lead to version old, or removes it.
func (s *Store) pointBack(d *dir, old string) error {
	if old != "" {
		return s.point(d, old)
	}
	if err := d.remove(Link); err != nil {
		return err
	}
	return d.sync()
}

func (s *Store) undoVersion(r Receipt) error {
	d, vs, err := s.openDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	if vs == nil {
		return s.cleanVersion(r)
	}
	defer vs.close()
	cur, _, err := s.inUse(d)
	if err != nil {
		return err
	}
	if cur == r.New {
		if r.Old != "" && !vs.exists(r.Old) {
			return s.noBackup(filepath.Join(r.Dir, Link))
		}
		if err := s.pointBack(d, r.Old); err != nil {
			return trouble(err, s.cfg.DirField, "%s cannot be switched back", filepath.Join(r.Dir, Link))
		}
		cur = r.Old
	}
	if cur == r.Old || !vs.exists(cur) {
		return s.cleanVersion(r)
	}
	// Something later was installed on top: r's version is one of its former ones now.
	if err := vs.drop(stagedPrefix + r.New); err != nil {
		return trouble(err, s.cfg.DirField, "what was staged in %s cannot be removed", r.Dir)
	}
	return nil
}

// repairVersion has nothing to finish, the switch is one rename; it removes the link that was to be renamed.
func (s *Store) repairVersion(r Receipt) error {
	d, vs, err := s.openDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	if vs != nil {
		vs.close()
	}
	return trouble2(sweep(d, linkPrefix), s.cfg.DirField, "what an interrupted switch left in %s cannot be removed", r.Dir)
}

// cleanVersion removes r's version, which is not in use, and the directories that hold nothing else.
func (s *Store) cleanVersion(r Receipt) error {
	d, vs, err := s.openDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	err = sweep(d, linkPrefix)
	if err == nil && vs != nil {
		defer vs.close()
		for _, n := range []string{stagedPrefix + r.New, r.New} {
			if err == nil {
				err = vs.drop(n)
			}
		}
		if err == nil {
			err = vs.removeTree(gonePrefix + r.New)
		}
		if err == nil {
			err = vs.sync()
		}
	}
	if err == nil {
		err = s.unmake(d, r)
	}
	return trouble2(err, s.cfg.DirField, "what was staged in %s cannot be removed", r.Dir)
}

// unmake removes the directory of versions and Dir, as far as Stage made them and they are empty by now.
func (s *Store) unmake(d *dir, r Receipt) error {
	if r.MadeVersions && d.exists(versionsDir) {
		vs, err := d.enter(versionsDir, s.cfg.DirField)
		if err != nil {
			return err
		}
		rest, err := vs.names(func(string) bool { return true })
		vs.close()
		if err != nil || len(rest) > 0 {
			return err
		}
		if err := d.remove(versionsDir); err != nil {
			return err
		}
	}
	if rest, err := d.names(func(string) bool { return true }); err != nil || len(rest) > 0 || !r.Made {
		return err
	}
	parent, err := s.access(filepath.Dir(r.Dir), s.cfg.DirField)
	if err != nil {
		return err
	}
	defer parent.close()
	if err := parent.remove(filepath.Base(r.Dir)); err != nil {
		return err
	}
	return parent.sync()
}

// pruneVersions keeps the newest former versions, always the one that r replaced; none when retention is off.
func (s *Store) pruneVersions(vs *dir, r Receipt) error {
	names, err := vs.names(isVersion)
	if err != nil {
		return err
	}
	most := max(s.cfg.Retention, 0)
	if r.Old != "" && most > 0 {
		most--
	}
	var former []string
	for _, n := range names {
		if n != r.New && (n != r.Old || s.cfg.Retention < 1) {
			former = append(former, n)
		}
	}
	for i := 0; i < len(former) && len(former)-i > most; i++ {
		if err := vs.drop(former[i]); err != nil {
			return err
		}
	}
	return nil
}
