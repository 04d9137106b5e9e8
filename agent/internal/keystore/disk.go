package keystore

import (
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Disk is the Store of a real host.
type Disk struct {
	dir string
	// locks serialise what happens to one certificate, by a hash of its id, so that Ensure does not race itself into two
	// keys; those of others are apart on disk, and their fsyncs overlap.
	locks [64]sync.Mutex
}

// lock takes the lock of a certificate and returns its release.
func (d *Disk) lock(id string) func() {
	m := &d.locks[crc32.ChecksumIEEE([]byte(id))%uint32(len(d.locks))]
	m.Lock()
	return m.Unlock
}

var keyFile = regexp.MustCompile(`^(\d{12})-([0-9a-f]{64})\.(pem|crt)$`)

// Open makes dir private (0700) and removes what an interrupted write left in it.
func Open(dir string) (*Disk, error) {
	if err := durable.PrivateDir(dir); err != nil {
		return nil, err
	}
	d := &Disk{dir: dir}
	ids, err := d.certificates()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if err := durable.Sweep(filepath.Join(dir, id)); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// View returns a Disk for looking only: it makes and removes nothing.
func View(dir string) *Disk { return &Disk{dir: dir} }

func (d *Disk) certificates() ([]string, error) {
	es, err := os.ReadDir(d.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "the key directory %s cannot be read (%s)", d.dir, durable.Reason(err))
	}
	var ids []string
	for _, e := range es {
		if e.IsDir() && certificateID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// entry is one key file.
type entry struct {
	generation int64
	spki       SPKI
	path       string // of the key; the leaf is path with .crt
	leaf       string // empty: none
}

func baseName(generation int64, spki SPKI) string { return fmt.Sprintf("%012d-%s", generation, spki) }

func (d *Disk) entries(id string) ([]entry, error) {
	dir := filepath.Join(d.dir, id)
	es, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "the key directory %s cannot be read (%s)", dir, durable.Reason(err))
	}
	var out []entry
	leaves := map[string]string{}
	for _, e := range es {
		m := keyFile.FindStringSubmatch(e.Name())
		if m == nil || !e.Type().IsRegular() {
			continue
		}
		if m[3] == "crt" {
			// A relabelled leaf may briefly carry the former generation: the public key finds it.
			leaves[m[2]] = filepath.Join(dir, e.Name())
			continue
		}
		g, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			continue
		}
		var s SPKI
		if _, err := hex.Decode(s[:], []byte(m[2])); err != nil {
			continue
		}
		out = append(out, entry{generation: g, spki: s, path: filepath.Join(dir, e.Name())})
	}
	for i := range out {
		out[i].leaf = leaves[out[i].spki.String()]
	}
	return out, nil
}

func (d *Disk) load(id string, e entry) (Key, error) {
	data, err := os.ReadFile(e.path)
	if err != nil {
		return Key{}, fault.Wrap(fault.Retryable, err, "a key of %s cannot be read (%s)", id, durable.Reason(err))
	}
	s, err := decodeKey(data)
	if err != nil {
		return Key{}, err
	}
	got, err := spkiOf(s)
	if err != nil {
		return Key{}, err
	}
	if got != e.spki {
		return Key{}, fault.New(fault.Internal, "the key file %s does not hold the key its name says", e.path)
	}
	return Key{CertificateID: id, Generation: e.generation, SPKI: got, Signer: s}, nil
}

// Ensure implements Store.
func (d *Disk) Ensure(id string, generation int64, algorithm string) (Key, error) {
	if err := CheckName(id, generation); err != nil {
		return Key{}, err
	}
	defer d.lock(id)()
	es, err := d.entries(id)
	if err != nil {
		return Key{}, err
	}
	for _, e := range es {
		if e.generation != generation {
			continue
		}
		k, err := d.load(id, e)
		if err != nil {
			return Key{}, err
		}
		// A profile that changed its algorithm gets a key of its own; the other stays until it is retired, because a
		// certificate for it may be on its way.
		if algorithmOf(k.Signer) == algorithm {
			return k, nil
		}
	}
	s, err := Make(algorithm)
	if err != nil {
		return Key{}, err
	}
	spki, err := spkiOf(s)
	if err != nil {
		return Key{}, err
	}
	k := Key{CertificateID: id, Generation: generation, SPKI: spki, Signer: s}
	pemBytes, err := k.PEM()
	if err != nil {
		return Key{}, err
	}
	dir := filepath.Join(d.dir, id)
	if len(es) == 0 {
		// A directory that holds a key was made durable before that.
		if err := durable.PrivateDir(dir); err != nil {
			return Key{}, err
		}
		if err := durable.SyncDir(d.dir); err != nil {
			return Key{}, fault.Wrap(fault.Retryable, err, "the key directory %s cannot be written (%s)", d.dir, durable.Reason(err))
		}
	}
	if err := durable.WriteFile(filepath.Join(dir, baseName(generation, spki)+".pem"), pemBytes, 0o600); err != nil {
		return Key{}, err
	}
	return k, nil
}

func (d *Disk) find(id string, spki SPKI) (entry, bool, error) {
	es, err := d.entries(id)
	if err != nil {
		return entry{}, false, err
	}
	for _, e := range es {
		if e.spki == spki {
			return e, true, nil
		}
	}
	return entry{}, false, nil
}

// BySPKI implements Store.
func (d *Disk) BySPKI(id string, spki SPKI) (Key, error) {
	if err := CheckName(id, 0); err != nil {
		return Key{}, err
	}
	defer d.lock(id)()
	e, ok, err := d.find(id, spki)
	if err != nil {
		return Key{}, err
	}
	if !ok {
		return Key{}, notHeld(id)
	}
	return d.load(id, e)
}

// Relabel implements Store.
func (d *Disk) Relabel(id string, spki SPKI, generation int64) error {
	if err := CheckName(id, generation); err != nil {
		return err
	}
	defer d.lock(id)()
	e, ok, err := d.find(id, spki)
	if err != nil || !ok || e.generation == generation {
		return err
	}
	to := filepath.Join(d.dir, id, baseName(generation, spki))
	// The leaf first: it is found by public key under either name, the key decides the generation.
	if e.leaf != "" {
		if err := os.Rename(e.leaf, to+".crt"); err != nil {
			return fault.Wrap(fault.Retryable, err, "a leaf of %s cannot be renamed (%s)", id, durable.Reason(err))
		}
	}
	if err := os.Rename(e.path, to+".pem"); err != nil {
		return fault.Wrap(fault.Retryable, err, "a key of %s cannot be renamed (%s)", id, durable.Reason(err))
	}
	if err := durable.SyncDir(filepath.Join(d.dir, id)); err != nil {
		return fault.Wrap(fault.Retryable, err, "the key directory of %s cannot be written (%s)", id, durable.Reason(err))
	}
	return nil
}

// Retire implements Store. It is not synced: a key that a power cut brings back goes with the next one that is retired.
func (d *Disk) Retire(id string, below int64) (int, error) {
	if err := CheckName(id, 0); err != nil {
		return 0, err
	}
	defer d.lock(id)()
	es, err := d.entries(id)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range es {
		if e.generation >= below {
			continue
		}
		for _, p := range []string{e.leaf, e.path} {
			if p == "" {
				continue
			}
			if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return n, fault.Wrap(fault.Retryable, err, "a retired key of %s cannot be removed (%s)", id, durable.Reason(err))
			}
		}
		n++
	}
	return n, nil
}

// PutLeaf implements Store. It is not synced: nothing hangs on the leaf, which the server has as well, and a damaged one is
// none.
func (d *Disk) PutLeaf(id string, spki SPKI, leaf []byte) error {
	if err := CheckName(id, 0); err != nil {
		return err
	}
	defer d.lock(id)()
	e, ok, err := d.find(id, spki)
	if err != nil {
		return err
	}
	if !ok {
		return notHeld(id)
	}
	path := filepath.Join(d.dir, id, baseName(e.generation, spki)+".crt")
	return durable.Replace(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf}), 0o600)
}

// List implements Store. Keys that cannot be read are left out of nothing: the first such error ends it.
func (d *Disk) List() ([]Info, error) {
	ids, err := d.certificates()
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, id := range ids {
		infos, err := d.infos(id)
		if err != nil {
			return nil, err
		}
		out = append(out, infos...)
	}
	sortInfos(out)
	return out, nil
}

// infos is List for one certificate.
func (d *Disk) infos(id string) ([]Info, error) {
	defer d.lock(id)()
	var out []Info
	es, err := d.entries(id)
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		k, err := d.load(id, e)
		if err != nil {
			return nil, err
		}
		in := Info{CertificateID: id, Generation: e.generation, SPKI: e.spki, Algorithm: algorithmOf(k.Signer)}
		if e.leaf != "" {
			b, err := os.ReadFile(e.leaf)
			if err != nil {
				return nil, fault.Wrap(fault.Retryable, err, "a leaf of %s cannot be read (%s)", id, durable.Reason(err))
			}
			if block, _ := pem.Decode(b); block != nil {
				in.Leaf = block.Bytes
			}
		}
		out = append(out, in)
	}
	return out, nil
}
