package disk

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Role says what a file holds.
type Role string

// The files of a certificate. Pair holds certificates and key together.
const (
	Cert      Role = "cert"
	Key       Role = "key"
	Chain     Role = "chain"
	FullChain Role = "fullchain"
	Pair      Role = "pem"
)

// Slot is one file to be written.
type Slot struct {
	Role Role
	// Path is absolute, or with Config.Dir a name in the version directory.
	Path string
	// Field is the setting that named it, for errors.
	Field string
	Mode  fs.FileMode
}

// Config of a Store. Paths are absolute and clean; the caller has checked their form.
type Config struct {
	Log   *slog.Logger
	Now   func() time.Time
	Roots []string
	// Dir selects the layout versions; DirField is the setting that named it.
	Dir, DirField string
	Slots         []Slot
	// UID and GID own the new files; -1 leaves the agent's own.
	UID, GID int
	// Retention is how many former versions are kept; below 1 none.
	Retention int
}

// Store installs one certificate's files. It is safe for concurrent use by different Stores; two operations on the same
// files at once end with a Conflict at worst.
type Store struct {
	cfg  Config
	step step
}

// New checks that every path lies below a root; it touches no disk.
func New(cfg Config) (*Store, error) {
	if cfg.Dir != "" {
		if _, _, err := within(cfg.Roots, cfg.Dir, cfg.DirField); err != nil {
			return nil, err
		}
		return &Store{cfg: cfg}, nil
	}
	for _, sl := range cfg.Slots {
		_, rest, err := within(cfg.Roots, sl.Path, sl.Field)
		if err != nil {
			return nil, err
		}
		if rest == "" {
			return nil, fault.InvalidField(sl.Field, "%q is itself a root; name a file below it", sl.Path)
		}
	}
	return &Store{cfg: cfg}, nil
}

// Placed is what a slot holds.
type Placed struct {
	Data  []byte
	Since time.Time
}

// Read returns what is in place, by role; a file that does not exist is left out.
func (s *Store) Read(ctx context.Context) (map[Role]Placed, error) {
	if err := alive(ctx); err != nil {
		return nil, err
	}
	if s.cfg.Dir != "" {
		return s.readVersion()
	}
	out := map[Role]Placed{}
	for _, sl := range s.cfg.Slots {
		d, err := s.access(filepath.Dir(sl.Path), sl.Field)
		if err != nil {
			return nil, err
		}
		c, err := d.read(filepath.Base(sl.Path), sl.Field)
		d.close()
		if err != nil {
			return nil, err
		}
		if !c.absent {
			out[sl.Role] = Placed{c.data, c.info.ModTime()}
		}
	}
	return out, nil
}

// Stage writes data, one for each slot, beside what is in use, and syncs it. Nothing is left when it fails.
func (s *Store) Stage(ctx context.Context, data [][]byte) (Receipt, error) {
	if len(data) != len(s.cfg.Slots) {
		return Receipt{}, fault.New(fault.Internal, "%d contents for %d files", len(data), len(s.cfg.Slots))
	}
	if s.cfg.Dir != "" {
		return s.stageVersion(ctx, data)
	}
	return s.stageFiles(ctx, data)
}

// Commit installs what r staged: all or nothing. Doing it twice is fine.
func (s *Store) Commit(ctx context.Context, r Receipt) error {
	if err := alive(ctx); err != nil {
		return err
	}
	if r.Dir != "" {
		return s.commitVersion(r)
	}
	return s.commitFiles(r)
}

// Undo goes back to before the Stage of r.
func (s *Store) Undo(ctx context.Context, r Receipt) error {
	if err := alive(ctx); err != nil {
		return err
	}
	if r.Dir != "" {
		return s.undoVersion(r)
	}
	return s.undoFiles(r)
}

// Repair ends a switch that a crash cut: afterwards the old or the new set is in place, whole.
func (s *Store) Repair(ctx context.Context, r Receipt) error {
	if err := alive(ctx); err != nil {
		return err
	}
	if r.Dir != "" {
		return s.repairVersion(r)
	}
	return s.repairFiles(r)
}

func alive(ctx context.Context) error {
	if ctx.Err() != nil {
		return fault.Wrap(fault.Retryable, context.Cause(ctx), "it was stopped")
	}
	return nil
}

func (s *Store) access(path, field string) (*dir, error) {
	return access(s.cfg.Roots, path, field, s.step)
}

// Receipt is what Undo and Repair need. It holds digests of files, never their content.
type Receipt struct {
	V int `json:"v"`
	// Versions: the directory, the new version's name, the former one's ("" for none), whether Stage made Dir
	// and the directory of versions in it.
	Dir  string `json:"dir,omitempty"`
	New  string `json:"new,omitempty"`
	Old  string `json:"old,omitempty"`
	Made bool   `json:"made,omitempty"`

	MadeVersions bool `json:"made_versions,omitempty"`

	// Files: one by one. Backups says that Commit keeps them.
	Files   []FileReceipt `json:"files,omitempty"`
	Backups bool          `json:"backups,omitempty"`
}

// FileReceipt is one file of the layout files. OldSum is "" when there was none.
type FileReceipt struct {
	Role   Role   `json:"role"`
	Path   string `json:"path"`
	Tag    string `json:"tag"`
	NewSum string `json:"new"`
	OldSum string `json:"old,omitempty"`
}

const receiptVersion = 1

// ParseReceipt decodes what Stage returned, and refuses what it cannot have returned.
func ParseReceipt(raw []byte) (Receipt, error) {
	var r Receipt
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fault.Wrap(fault.Invalid, err, "the receipt is not one of this connector; it cannot be used to go back")
	}
	if r.V != receiptVersion {
		return r, fault.New(fault.Unsupported, "the receipt has format %d and this agent knows %d; use the agent version that wrote it", r.V, receiptVersion)
	}
	ok := (r.Dir != "") != (len(r.Files) > 0) && len(r.Files) <= maxFiles
	if r.Dir != "" {
		ok = ok && absClean(r.Dir) && isVersion(r.New) && (r.Old == "" || isVersion(r.Old))
	}
	for _, f := range r.Files {
		ok = ok && absClean(f.Path) && f.Path != "/" && isTag(f.Tag) && f.NewSum != ""
	}
	if !ok {
		return r, fault.New(fault.Invalid, "the receipt is damaged; it cannot be used to go back")
	}
	return r, nil
}

// maxFiles bounds a receipt of the layout files: certificate, key and chain.
const maxFiles = 3

func absClean(p string) bool {
	return filepath.IsAbs(p) && filepath.Clean(p) == p && !strings.ContainsRune(p, 0)
}

// newTag names one staging: it sorts by time and is never used twice.
func (s *Store) newTag() string {
	var b [4]byte
	_, _ = rand.Read(b[:])
	return s.cfg.Now().UTC().Format(tagTime) + "-" + hex.EncodeToString(b[:])
}

const tagTime = "20060102T150405.000000Z"

func isTag(s string) bool {
	at, tail, ok := strings.Cut(s, "-")
	if !ok || len(tail) != 8 || strings.Trim(tail, "0123456789abcdef") != "" {
		return false
	}
	_, err := time.Parse(tagTime, at)
	return err == nil
}
