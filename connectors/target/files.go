package target

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/certmesh/certmesh/connectors/target/internal/disk"
	"github.com/certmesh/certmesh/protocol/fault"
)

// FileSettings say where a kind that writes files puts them. Exactly one of three layouts is chosen:
//
//   - dir: each version in a directory of its own, and dir/current, a symbolic link swapped by one rename;
//   - pem_path: one file with the certificates and the key, replaced by one rename;
//   - cert_path, key_path and perhaps chain_path: fixed paths, which cannot be switched at once; a crash in between is
//     repaired before anything else at the agent's start.
type FileSettings struct {
	Dir           string `json:"dir" doc:"Directory for version directories and the link current, e.g. /etc/ssl/site; services name files below DIR/current. Its parent must exist."`
	CertName      string `json:"cert_name" default:"cert.pem" doc:"With dir: name of the file with the certificate alone."`
	KeyName       string `json:"key_name" default:"key.pem" doc:"With dir: name of the file with the private key (PKCS#8)."`
	ChainName     string `json:"chain_name" default:"chain.pem" doc:"With dir: name of the file with the intermediates alone."`
	FullchainName string `json:"fullchain_name" default:"fullchain.pem" doc:"With dir: name of the file with the certificate and its intermediates."`

	PEMPath string `json:"pem_path" doc:"One file with the certificate, its intermediates and the private key, in this order."`

	CertPath  string `json:"cert_path" doc:"File with the certificate, followed by its intermediates unless they have chain_path."`
	KeyPath   string `json:"key_path" doc:"File with the private key (PKCS#8); goes with cert_path."`
	ChainPath string `json:"chain_path" doc:"File with the intermediates; optional, goes with cert_path."`

	Owner    string `json:"owner" doc:"User, by name or number, that owns the files; empty: the agent's."`
	Group    string `json:"group" doc:"Group, by name or number, of the files; empty: the agent's."`
	CertMode string `json:"cert_mode" default:"0644" doc:"Octal mode of files without the key."`
	KeyMode  string `json:"key_mode" default:"0600" doc:"Octal mode of files with the key; others than owner and group may have no access."`

	BackupRetention int `json:"backup_retention" doc:"Former versions kept per file; 0: the agent's setting; -1: none, and then a failed deployment cannot be undone."`
}

// Paths are the files, or the one directory, that a target of these settings writes.
func (s FileSettings) Paths() []string {
	var out []string
	for _, p := range []string{s.Dir, s.PEMPath, s.CertPath, s.KeyPath, s.ChainPath} {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

// FilePaths is Kind.Paths of a kind whose settings S hold FileSettings.
func FilePaths[S interface{ Paths() []string }](settings json.RawMessage) []string {
	s, ps := DecodeSettings[S](settings)
	if len(ps) > 0 {
		return nil
	}
	return s.Paths()
}

const maxRetention = 1000

// Problems reports everything that is wrong with s, touching no disk.
func (s FileSettings) Problems() []Problem {
	var ps []Problem
	add := func(field, format string, args ...any) {
		ps = append(ps, Problem{field, fmt.Sprintf(format, args...)})
	}
	separate := s.CertPath != "" || s.KeyPath != "" || s.ChainPath != ""
	layouts := 0
	for _, chosen := range []bool{s.Dir != "", s.PEMPath != "", separate} {
		if chosen {
			layouts++
		}
	}
	switch {
	case layouts == 0:
		add("dir", "is missing: give dir, or pem_path, or cert_path and key_path")
	case layouts > 1:
		add("dir", "only one of dir, pem_path and cert_path with key_path can be given")
	}
	if separate {
		if s.CertPath == "" {
			add("cert_path", "is missing beside key_path or chain_path")
		}
		if s.KeyPath == "" {
			add("key_path", "is missing beside cert_path")
		}
	}
	paths := map[string]string{}
	for _, p := range []struct{ field, path string }{
		{"dir", s.Dir}, {"pem_path", s.PEMPath}, {"cert_path", s.CertPath}, {"key_path", s.KeyPath}, {"chain_path", s.ChainPath},
	} {
		if p.path == "" {
			continue
		}
		if msg := PathProblem(p.path); msg != "" {
			add(p.field, "%s", msg)
			continue
		}
		if msg := nameProblem(filepath.Base(p.path)); msg != "" {
			add(p.field, "%s", msg)
		}
		if other := paths[p.path]; other != "" {
			add(p.field, "is the same file as %s", other)
		}
		paths[p.path] = p.field
	}
	if s.Dir != "" {
		names := map[string]string{}
		for _, n := range []struct{ field, name string }{
			{"cert_name", s.CertName}, {"key_name", s.KeyName}, {"chain_name", s.ChainName}, {"fullchain_name", s.FullchainName},
		} {
			if msg := nameProblem(n.name); msg != "" {
				add(n.field, "%s", msg)
			} else if other := names[n.name]; other != "" {
				add(n.field, "is the same file as %s", other)
			}
			names[n.name] = n.field
		}
	}
	if m, msg := parseMode(s.CertMode); msg != "" {
		add("cert_mode", "%s", msg)
	} else if m&0o022 != 0 {
		add("cert_mode", "%04o lets others than the owner write; use 0644", m)
	}
	if m, msg := parseMode(s.KeyMode); msg != "" {
		add("key_mode", "%s", msg)
	} else if m&0o027 != 0 {
		add("key_mode", "%04o opens the private key to others, or lets its group write; use 0600, or 0640 with a group", m)
	}
	for _, n := range []struct{ field, name string }{{"owner", s.Owner}, {"group", s.Group}} {
		if len(n.name) > 64 || strings.ContainsAny(n.name, " :/") || printable(n.name, 64) != n.name || strings.HasPrefix(n.name, "-") {
			add(n.field, "is not a name or number")
		}
	}
	if s.BackupRetention < -1 || s.BackupRetention > maxRetention {
		add("backup_retention", "must be between -1 (keep none) and %d", maxRetention)
	}
	return ps
}

// maxPath is below every system's own limit, with room for what is written beside a file.
const maxPath = 3500

// PathProblem says what is wrong with an absolute path of settings; "" if nothing is. It touches no disk.
func PathProblem(p string) string {
	switch {
	case len(p) > maxPath:
		return fmt.Sprintf("has %d bytes; at most %d are accepted", len(p), maxPath)
	case !utf8.ValidString(p) || clean(p, false) != p:
		return "contains control characters or is not UTF-8; paths are plain text"
	case strings.Contains(p, `\`):
		return "contains a backslash; directories are separated by /"
	case !filepath.IsAbs(p):
		return "must be an absolute path, beginning with /"
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." || part == "." {
			return "contains " + part + "; write the path that is meant"
		}
		if len(part) > 255 {
			return "has a part longer than 255 bytes"
		}
		if part != strings.TrimSpace(part) {
			return "has a part that begins or ends with a space"
		}
	}
	if filepath.Clean(p) != p {
		return "has an empty part; write " + filepath.Clean(p)
	}
	if p == "/" {
		return "is the root directory; name something below it"
	}
	return ""
}

// maxName leaves room for the names of staged files and backups beside it.
const maxName = 180

func nameProblem(n string) string {
	switch {
	case n == "":
		return "is empty"
	case len(n) > maxName:
		return fmt.Sprintf("has a name of %d bytes; at most %d are accepted", len(n), maxName)
	case n == "." || n == "..":
		return "is not a file name"
	case strings.ContainsAny(n, `/\`):
		return "is a name, not a path; it cannot contain a slash"
	case strings.HasPrefix(n, "."):
		return "begins with a dot, as only what certmesh writes beside the files does; choose another name"
	case !utf8.ValidString(n) || clean(n, false) != n || strings.TrimSpace(n) != n:
		return "contains control characters, or begins or ends with a space"
	}
	return ""
}

func parseMode(s string) (fs.FileMode, string) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 || len(s) < 3 || len(s) > 4 {
		return 0, `must be an octal mode such as "0640"`
	}
	if n&0o400 == 0 {
		return 0, "must let the owner read"
	}
	if n&0o111 != 0 {
		return 0, "must not make the file executable"
	}
	return fs.FileMode(n), ""
}

// FileOptions are a kind's own wishes for OpenFiles.
type FileOptions struct {
	// FullChain puts the intermediates behind the certificate in cert_path even beside chain_path, for servers that send
	// what they find there.
	FullChain bool
}

// Files is a Target and Repairer that installs certificates as files, for the file kind and for kinds that make a
// service load them. See FileSettings for its layouts.
type Files struct {
	store *disk.Store
	slots []disk.Slot
	// leafIn is the file that Current reads.
	leafIn disk.Role
	keyIn  disk.Role
	opts   FileOptions
	chain  bool
}

var (
	_ Target   = (*Files)(nil)
	_ Repairer = (*Files)(nil)
)

// OpenFiles returns a Files for settings that Problems found no fault with. Errors: Forbidden with the field's name for
// paths outside env.Roots; Invalid for an unknown owner or group.
func OpenFiles(env Env, s FileSettings, o FileOptions) (*Files, error) {
	certMode, msg := parseMode(s.CertMode)
	if msg != "" {
		return nil, fault.InvalidField("cert_mode", "%s", msg)
	}
	keyMode, msg := parseMode(s.KeyMode)
	if msg != "" {
		return nil, fault.InvalidField("key_mode", "%s", msg)
	}
	f := &Files{opts: o, leafIn: disk.Cert, keyIn: disk.Key, chain: s.ChainPath != ""}
	switch {
	case s.Dir != "":
		f.slots = []disk.Slot{
			{Role: disk.Cert, Path: s.CertName, Field: "cert_name", Mode: certMode},
			{Role: disk.Key, Path: s.KeyName, Field: "key_name", Mode: keyMode},
			{Role: disk.Chain, Path: s.ChainName, Field: "chain_name", Mode: certMode},
			{Role: disk.FullChain, Path: s.FullchainName, Field: "fullchain_name", Mode: certMode},
		}
		f.chain = true
	case s.PEMPath != "":
		f.slots = []disk.Slot{{Role: disk.Pair, Path: s.PEMPath, Field: "pem_path", Mode: keyMode}}
		f.leafIn, f.keyIn = disk.Pair, disk.Pair
	default:
		f.slots = []disk.Slot{
			{Role: disk.Key, Path: s.KeyPath, Field: "key_path", Mode: keyMode},
			{Role: disk.Cert, Path: s.CertPath, Field: "cert_path", Mode: certMode},
		}
		if s.ChainPath != "" {
			f.slots = append(f.slots, disk.Slot{Role: disk.Chain, Path: s.ChainPath, Field: "chain_path", Mode: certMode})
		}
	}
	retention := s.BackupRetention
	if retention == 0 {
		retention = env.BackupRetention
	}
	uid, err := numberOf(s.Owner, "owner", func(n string) (string, error) {
		u, err := user.Lookup(n)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
	if err != nil {
		return nil, err
	}
	gid, err := numberOf(s.Group, "group", func(n string) (string, error) {
		g, err := user.LookupGroup(n)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
	if err != nil {
		return nil, err
	}
	f.store, err = disk.New(disk.Config{Log: env.Log, Now: env.Now, Roots: env.Roots, Dir: s.Dir, DirField: "dir", Slots: f.slots,
		UID: uid, GID: gid, Retention: retention})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func numberOf(name, field string, lookup func(string) (string, error)) (int, error) {
	if name == "" {
		return -1, nil
	}
	id := name
	if strings.Trim(name, "0123456789") != "" {
		var err error
		if id, err = lookup(name); err != nil {
			return 0, &fault.Error{Class: fault.Invalid, Field: field, Err: err,
				Message: fmt.Sprintf("there is no %q on this host; create it or name another", name)}
		}
	}
	n, err := strconv.ParseUint(id, 10, 31)
	if err != nil {
		return 0, fault.InvalidField(field, "%q is not a number that this system knows", name)
	}
	return int(n), nil
}

// Current reads back the certificate in place. A certificate whose key is missing or another one's serves nobody and
// counts as nothing held; so does a file without a certificate.
func (f *Files) Current(ctx context.Context) (Served, error) {
	held, err := f.store.Read(ctx)
	if err != nil {
		return Served{}, err
	}
	at, ok := held[f.leafIn]
	if !ok {
		return Served{}, nil
	}
	leaf := firstCertificate(at.Data)
	if leaf == nil || !holdsKeyOf(held[f.keyIn].Data, leaf) {
		return Served{}, nil
	}
	return Served{Leaf: FingerprintOf(leaf), NotAfter: leaf.NotAfter, Since: at.Since}, nil
}

func firstCertificate(data []byte) *x509.Certificate {
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return nil
		}
		if b.Type == "CERTIFICATE" {
			c, err := x509.ParseCertificate(b.Bytes)
			if err != nil {
				return nil
			}
			return c
		}
	}
}

// holdsKeyOf reports whether the first private key in data is leaf's. Keys in other encodings than ours may have been
// there before us.
func holdsKeyOf(data []byte, leaf *x509.Certificate) bool {
	defer clear(data)
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return false
		}
		if b.Type != "CERTIFICATE" && strings.HasSuffix(b.Type, "PRIVATE KEY") {
			key := parseKey(b)
			return key != nil && samePublic(key, leaf)
		}
	}
}

func parseKey(b *pem.Block) crypto.Signer {
	defer clear(b.Bytes)
	var key any
	var err error
	switch b.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	}
	if err != nil {
		return nil
	}
	s, _ := key.(crypto.Signer)
	return s
}

func samePublic(key crypto.Signer, leaf *x509.Certificate) bool {
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(leaf.PublicKey)
}

// Stage checks that m's key is its certificate's, and writes everything beside what is in use.
func (f *Files) Stage(ctx context.Context, m Material) (Staged, error) {
	if len(m.Chain) == 0 {
		return nil, fault.InvalidField("chain", "is empty; there is nothing to install")
	}
	if m.KeyPEM == nil {
		return nil, fault.New(fault.Invalid, "the certificate comes without its private key; it must be deployed by the agent that made the key")
	}
	raw, err := m.KeyPEM()
	if err != nil {
		return nil, fmt.Errorf("take the private key: %w", err)
	}
	defer clear(raw)
	b, rest := pem.Decode(raw)
	if b == nil || b.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fault.New(fault.Invalid, "the private key is not one PKCS#8 PEM block; order the certificate anew")
	}
	key := parseKey(b)
	if key == nil {
		return nil, fault.New(fault.Invalid, "the private key cannot be decoded; order the certificate anew")
	}
	if !samePublic(key, m.Chain[0]) {
		return nil, fault.New(fault.Invalid, "the private key is not the one of the certificate (SHA-256 %s); nothing was installed, order the certificate anew", m.Leaf())
	}
	data := make([][]byte, len(f.slots))
	defer func() {
		for i, s := range f.slots {
			if s.Role == disk.Pair {
				clear(data[i])
			}
		}
	}()
	for i, s := range f.slots {
		switch s.Role {
		case disk.Key:
			data[i] = raw
		case disk.Pair:
			data[i] = append(encode(m.Chain), raw...)
		case disk.Chain:
			data[i] = encode(m.Chain[1:])
		case disk.FullChain:
			data[i] = encode(m.Chain)
		default:
			data[i] = encode(m.Chain[:1])
			if !f.chain || f.opts.FullChain {
				data[i] = encode(m.Chain)
			}
		}
	}
	r, err := f.store.Stage(ctx, data)
	if err != nil {
		return nil, err
	}
	doc, err := json.Marshal(r)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "encode the receipt")
	}
	return &stagedFiles{f.store, r, Receipt(doc)}, nil
}

func encode(chain []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range chain {
		// A buffer takes everything.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

// Undo goes back to before the Stage that returned r. Without a backup (backup_retention -1) what was committed cannot be
// undone: Unsupported. What someone else installed since is left alone.
func (f *Files) Undo(ctx context.Context, r Receipt) error {
	d, err := disk.ParseReceipt(r)
	if err != nil {
		return err
	}
	return f.store.Undo(ctx, d)
}

// Repair ends a switch that a crash cut, forward if everything for that is there, else backward.
func (f *Files) Repair(ctx context.Context, r Receipt) error {
	d, err := disk.ParseReceipt(r)
	if err != nil {
		return err
	}
	return f.store.Repair(ctx, d)
}

type stagedFiles struct {
	store *disk.Store
	r     disk.Receipt
	doc   Receipt
}

func (s *stagedFiles) Receipt() Receipt { return bytes.Clone(s.doc) }

func (s *stagedFiles) Commit(ctx context.Context) error { return s.store.Commit(ctx, s.r) }
