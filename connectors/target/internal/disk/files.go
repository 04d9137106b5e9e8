package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/certmesh/certmesh/protocol/fault"
)

func stagedName(base, tag string) string { return "." + base + ".certmesh-staged-" + tag }
func backupName(base, tag string) string { return "." + base + ".certmesh-backup-" + tag }

// tagged reports whether name is prefix and a tag.
func tagged(name, prefix string) bool {
	tag, ok := strings.CutPrefix(name, prefix)
	return ok && isTag(tag)
}

func (s *Store) stageFiles(ctx context.Context, data [][]byte) (_ Receipt, err error) {
	r := Receipt{V: receiptVersion, Backups: s.cfg.Retention > 0}
	tag := s.newTag()
	defer func() {
		if err != nil {
			// Best effort: what cannot be removed now is swept by the next Stage.
			_ = s.clean(r, true)
		}
	}()
	for i, sl := range s.cfg.Slots {
		if err := alive(ctx); err != nil {
			return r, err
		}
		// The last file of a directory syncs its names for all.
		more := slices.ContainsFunc(s.cfg.Slots[i+1:], func(o Slot) bool { return filepath.Dir(o.Path) == filepath.Dir(sl.Path) })
		base := filepath.Base(sl.Path)
		d, err := s.access(filepath.Dir(sl.Path), sl.Field)
		if err != nil {
			return r, err
		}
		fr := FileReceipt{Role: sl.Role, Path: sl.Path, Tag: tag, NewSum: sumOf(data[i])}
		err = func() error {
			defer d.close()
			old, err := d.read(base, sl.Field)
			if err != nil {
				return err
			}
			if err := sweep(d, "."+base+".certmesh-staged-"); err != nil {
				return trouble(err, sl.Field, "what an interrupted installation left beside %s cannot be removed", sl.Path)
			}
			if !old.absent {
				fr.OldSum = old.sum
			}
			r.Files = append(r.Files, fr)
			if err := d.create(stagedName(base, tag), data[i], rights{sl.Mode, s.cfg.UID, s.cfg.GID}); err != nil {
				return trouble(err, sl.Field, "the new file for %s cannot be written beside it", sl.Path)
			}
			if !old.absent {
				if err := d.keep(base, backupName(base, tag), old); err != nil {
					return trouble(err, sl.Field, "%s cannot be backed up beside it", sl.Path)
				}
			}
			if more {
				return nil
			}
			return trouble2(d.sync(), sl.Field, "the directory of %s cannot be synced", sl.Path)
		}()
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// keep makes a backup of a file that is about to be replaced: another name for it, which costs no data to be synced, or a copy
// where that cannot be had.
func (d *dir) keep(base, backup string, old content) error {
	err := d.link(base, backup)
	if err == nil || !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOTSUP) && !errors.Is(err, syscall.EMLINK) && !errors.Is(err, syscall.ENOSYS) {
		return err
	}
	return d.create(backup, old.data, rightsOf(old))
}

// trouble2 is trouble for an error that may be nil.
func trouble2(err error, field, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return trouble(err, field, format, args...)
}

// rightsOf keeps mode and, where the agent may give files away, owner and group.
func rightsOf(c content) rights {
	r := rights{mode: c.info.Mode().Perm(), uid: -1, gid: -1}
	if os.Geteuid() == 0 {
		r.uid, r.gid = owner(c.info)
	}
	return r
}

func sweep(d *dir, prefix string) error {
	names, err := d.names(func(n string) bool { return tagged(n, prefix) })
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := d.remove(n); err != nil {
			return err
		}
	}
	return nil
}

// placing is one file of a receipt as it is found on disk.
type placing struct {
	FileReceipt
	base           string
	d              *dir
	isOld, isNew   bool
	staged, backup bool
}

// foreign: neither the old nor the new content.
func (p *placing) foreign() bool { return !p.isOld && !p.isNew }

// installed: Commit got as far as this file.
func (p *placing) installed() bool { return p.isNew && !p.isOld }

type placings []*placing

func (ps placings) close() {
	for _, p := range ps {
		p.d.close()
	}
}

func (ps placings) all(is func(*placing) bool) bool {
	for _, p := range ps {
		if !is(p) {
			return false
		}
	}
	return true
}

func (ps placings) any(is func(*placing) bool) bool {
	return !ps.all(func(p *placing) bool { return !is(p) })
}

// superseded reports that someone installed something later: what identifies a pair is neither old nor new. The chain
// does not count, it is often the same before and after.
func (ps placings) superseded() bool {
	return ps.all(func(p *placing) bool { return p.Role == Chain || p.foreign() })
}

// look finds out how far a switch got.
func (s *Store) look(r Receipt) (placings, error) {
	var ps placings
	for _, fr := range r.Files {
		d, err := s.access(filepath.Dir(fr.Path), "")
		if err != nil {
			ps.close()
			return nil, err
		}
		p := &placing{FileReceipt: fr, base: filepath.Base(fr.Path), d: d}
		ps = append(ps, p)
		now, err := d.read(p.base, "")
		if err != nil {
			ps.close()
			return nil, err
		}
		p.isNew = !now.absent && now.sum == fr.NewSum
		p.isOld = now.absent && fr.OldSum == "" || !now.absent && now.sum == fr.OldSum
		st, err := d.read(stagedName(p.base, fr.Tag), "")
		if err != nil {
			ps.close()
			return nil, err
		}
		p.staged = !st.absent && st.sum == fr.NewSum
		bk, err := d.read(backupName(p.base, fr.Tag), "")
		if err != nil {
			ps.close()
			return nil, err
		}
		p.backup = fr.OldSum == "" || !bk.absent && bk.sum == fr.OldSum
	}
	return ps, nil
}

func (s *Store) commitFiles(r Receipt) error {
	ps, err := s.look(r)
	if err != nil {
		return err
	}
	defer ps.close()
	isNew := func(p *placing) bool { return p.isNew }
	if !ps.any(func(p *placing) bool { return p.staged }) && ps.all(isNew) {
		return nil
	}
	if p := find(ps, func(p *placing) bool { return !p.isOld }); p != nil {
		return fault.New(fault.Conflict, "%s was changed by someone else since the new certificate was staged; nothing was installed", p.Path)
	}
	if p := find(ps, func(p *placing) bool { return !p.staged }); p != nil {
		return fault.New(fault.Conflict, "what was staged for %s is gone; stage it again", p.Path)
	}
	if err := forward(ps); err != nil {
		err = trouble(err, "", "the new files cannot be put in place")
		if back := restore(ps); back != nil {
			return fault.Wrap(fault.ClassOf(err), errors.Join(err, back), "the new files cannot be put in place, and going back failed too (%s); it is repaired at the agent's next start", reason(back))
		}
		return err
	}
	// The material is in place: tidying must not make it fail.
	if err := s.prune(ps, r.Backups); err != nil {
		s.cfg.Log.Warn("old backups not removed", "path", r.Files[0].Path, "err", err)
	}
	return nil
}

func find(ps placings, is func(*placing) bool) *placing {
	for _, p := range ps {
		if is(p) {
			return p
		}
	}
	return nil
}

// forward puts every staged file in its place.
func forward(ps placings) error {
	for _, p := range ps {
		if !p.staged {
			continue
		}
		if err := p.d.rename(stagedName(p.base, p.Tag), p.base); err != nil {
			return err
		}
		p.staged, p.isNew, p.isOld = false, true, p.OldSum == p.NewSum
	}
	return syncAll(ps)
}

// restore puts every new file's backup in its place; one that did not exist is removed.
func restore(ps placings) error {
	for _, p := range ps {
		if p.isOld {
			continue
		}
		var err error
		if p.OldSum == "" {
			err = p.d.remove(p.base)
		} else {
			err = p.d.rename(backupName(p.base, p.Tag), p.base)
		}
		if err != nil {
			return err
		}
		p.isOld, p.isNew, p.backup = true, p.OldSum == p.NewSum, p.OldSum == ""
	}
	return syncAll(ps)
}

func syncAll(ps placings) error {
	synced := map[string]bool{}
	for _, p := range ps {
		// Files mostly lie beside each other.
		if synced[p.d.path] {
			continue
		}
		if err := p.d.sync(); err != nil {
			return err
		}
		synced[p.d.path] = true
	}
	return nil
}

func (s *Store) undoFiles(r Receipt) error {
	ps, err := s.look(r)
	if err != nil {
		return err
	}
	defer ps.close()
	if ps.superseded() {
		// Backups stay: they are former versions like any other.
		return s.clean(r, false)
	}
	if ps.any((*placing).installed) {
		if p := find(ps, (*placing).foreign); p != nil {
			return fault.New(fault.Conflict, "%s was changed by someone else since; nothing was taken back, deploy again to replace it", p.Path)
		}
		if p := find(ps, func(p *placing) bool { return !p.isOld && !p.backup }); p != nil {
			return s.noBackup(p.Path)
		}
		if err := restore(ps); err != nil {
			return trouble(err, "", "the former files cannot be put back")
		}
	}
	return s.clean(r, true)
}

func (s *Store) noBackup(path string) error {
	return fault.New(fault.Unsupported, "the former content of %s was not kept, so it cannot be put back (backup_retention is -1, or the backup was removed); deploy a good certificate instead", path)
}

func (s *Store) repairFiles(r Receipt) error {
	ps, err := s.look(r)
	if err != nil {
		return err
	}
	defer ps.close()
	if ps.all(func(p *placing) bool { return p.isNew }) || !ps.any((*placing).installed) || ps.superseded() {
		return nil
	}
	if p := find(ps, (*placing).foreign); p != nil {
		return fault.New(fault.Conflict, "%s was changed by someone else while a switch was interrupted; deploy again to replace it", p.Path)
	}
	if ps.all(func(p *placing) bool { return p.isNew || p.staged }) {
		if err := forward(ps); err != nil {
			return trouble(err, "", "an interrupted switch cannot be finished")
		}
		return nil
	}
	if p := find(ps, func(p *placing) bool { return !p.isOld && !p.backup }); p != nil {
		return s.noBackup(p.Path)
	}
	if err := restore(ps); err != nil {
		return trouble(err, "", "an interrupted switch cannot be taken back")
	}
	return nil
}

// clean removes what r's Stage wrote beside the files.
func (s *Store) clean(r Receipt, backups bool) error {
	for _, fr := range r.Files {
		base := filepath.Base(fr.Path)
		d, err := s.access(filepath.Dir(fr.Path), "")
		if err != nil {
			return err
		}
		err = d.remove(stagedName(base, fr.Tag))
		if err == nil && backups {
			err = d.remove(backupName(base, fr.Tag))
		}
		if err == nil {
			err = d.sync()
		}
		d.close()
		if err != nil {
			return trouble(err, "", "what was staged beside %s cannot be removed", fr.Path)
		}
	}
	return nil
}

// prune keeps the newest backups of each file; none when keep is false.
func (s *Store) prune(ps placings, keep bool) error {
	most := 0
	if keep {
		most = max(s.cfg.Retention, 0)
	}
	for _, p := range ps {
		prefix := backupName(p.base, "")
		names, err := p.d.names(func(n string) bool { return tagged(n, prefix) })
		if err != nil {
			return err
		}
		own := backupName(p.base, p.Tag)
		for i := 0; i < len(names) && len(names)-i > most; i++ {
			// Its own backup is the newest, unless the clock went back.
			if names[i] == own && most > 0 {
				most--
				continue
			}
			if err := p.d.remove(names[i]); err != nil {
				return err
			}
		}
	}
	return nil
}
