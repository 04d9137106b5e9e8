package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/config"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Mode says which defaults and requirements hold.
type Mode string

// The modes.
const (
	// Serve is production: nothing is made up that must be kept safe by somebody.
	Serve Mode = "serve"
	// Dev makes everything on first start and listens on loopback.
	Dev Mode = "dev"
	// Admin is for commands that only touch the store.
	Admin Mode = "admin"
)

// Configuration is the effective configuration of a node.
type Configuration struct{ loaded *config.Loaded }

// Value is one effective setting and its origin.
type Value = config.Value

// devDefaults are what dev sets below file, environment and flags.
var devDefaults = map[string]string{
	"node.data_dir": "certmesh-data",
	"listen.api":    "127.0.0.1:8443", "listen.grpc": "127.0.0.1:8442",
	"listen.mesh": "127.0.0.1:8444", "listen.pki": "127.0.0.1:8080",
	"listen.raft": "127.0.0.1:0", // a node alone is called by nobody
}

// LoadConfiguration reads file (may be empty), the environment and flags, in that order of strength.
func LoadConfiguration(mode Mode, file string, getenv func(string) (string, bool), flags map[string]string) (*Configuration, error) {
	src := config.Sources{File: file, Getenv: getenv, Flags: flags}
	if mode == Dev {
		src.Defaults = devDefaults
	}
	l, err := config.Load(src)
	if err != nil {
		return nil, err
	}
	c := &l.Config
	if mode == Serve {
		switch {
		case c.Secrets.KEKFile == "":
			return nil, fault.InvalidField("secrets.kek_file", "serve needs a key-encryption key: make one with `openssl rand -base64 32 > kek && chmod 600 kek` and set CERTMESH_SECRETS_KEK_FILE")
		case c.PKI.PublicURL == "":
			return nil, fault.InvalidField("pki.public_url", "serve needs the public base of CRL URLs, e.g. http://pki.example.com: set CERTMESH_PKI_PUBLIC_URL")
		}
	}
	if c.Store.DSN == "" {
		c.Store.DSN = "sqlite:" + filepath.Join(c.Node.DataDir, "certmesh.db")
	}
	if c.Secrets.KEKFile == "" {
		c.Secrets.KEKFile = filepath.Join(c.Node.DataDir, "kek")
	}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	if c.Node.ID == "" {
		c.Node.ID = strings.ToLower(host)
	}
	if len(c.Node.Names) == 0 {
		c.Node.Names = []string{host, "localhost", "127.0.0.1", "::1"}
		for _, a := range []string{c.Listen.GRPC, c.Listen.Mesh} {
			if h, _, err := net.SplitHostPort(a); err == nil && h != "" && h != "0.0.0.0" && h != "::" {
				c.Node.Names = append(c.Node.Names, h)
			}
		}
	}
	// What was derived is in force and shown as such.
	l.Refresh()
	return &Configuration{l}, nil
}

// Values lists every setting with its origin.
func (c *Configuration) Values() []Value { return c.loaded.Values() }

// OperatorAddress is host:port under which operators reach this node, by its first name.
func (c *Configuration) OperatorAddress() string {
	_, port, err := net.SplitHostPort(c.loaded.Config.Listen.GRPC)
	if err != nil {
		port = "8442"
	}
	return net.JoinHostPort(c.loaded.Config.Node.Names[0], port)
}

// ShutdownTimeout is the budget of a graceful stop.
func (c *Configuration) ShutdownTimeout() time.Duration { return c.loaded.Config.Jobs.ShutdownTimeout }

// Logger writes to w as configured.
func (c *Configuration) Logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.loaded.Config.Log.Level)); err != nil {
		return nil, fault.InvalidField("log.level", "%s", err)
	}
	o := &slog.HandlerOptions{Level: level}
	if c.loaded.Config.Log.Format == "text" {
		return slog.New(slog.NewTextHandler(w, o)), nil
	}
	return slog.New(slog.NewJSONHandler(w, o)), nil
}

// ConfigurationReference is the reference page of all settings, in Markdown.
func ConfigurationReference() string {
	var b strings.Builder
	b.WriteString("# Settings of certmeshd\n\nFile (YAML, `--config`) < environment < `--set key=value`. Unknown keys are refused. " +
		"`certmeshd config` prints the effective values and where each came from.\n\n" +
		"This page is made from the settings struct: `certmeshd config --format markdown`.\n\n" +
		"| setting | environment | default | what |\n| --- | --- | --- | --- |\n")
	for _, v := range config.Reference() {
		def := v.Default
		if def != "" {
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", v.Key, v.Env, def, v.Doc)
	}
	return b.String()
}

// MigrationStep is one step of the schema.
type MigrationStep = store.Migration

func openStore(ctx context.Context, c *Configuration) (*store.Store, error) {
	cfg := &c.loaded.Config
	if strings.HasPrefix(cfg.Store.DSN, "sqlite:") {
		if err := os.MkdirAll(cfg.Node.DataDir, 0o700); err != nil {
			return nil, fault.Wrap(fault.Invalid, err, "cannot make the data directory (node.data_dir)")
		}
	}
	return store.Open(ctx, store.Config{DSN: cfg.Store.DSN, NodeID: cfg.Node.ID, MaxReaders: cfg.Store.MaxReaders,
		Now: time.Now, NewID: id.New, Log: slog.New(slog.DiscardHandler)})
}

// MigrateUp brings the schema up to date and returns its steps.
func MigrateUp(ctx context.Context, c *Configuration) ([]MigrationStep, error) {
	s, err := openStore(ctx, c)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }() // what was asked for is committed or refused by then
	if err := s.Migrate(ctx); err != nil {
		return nil, err
	}
	return s.MigrationStatus(ctx)
}

// MigrationStatus returns the schema's steps.
func MigrationStatus(ctx context.Context, c *Configuration) ([]MigrationStep, error) {
	s, err := openStore(ctx, c)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }() // what was asked for is committed or refused by then
	return s.MigrationStatus(ctx)
}

// CreateAPIKey makes an operator's key next to the store and returns it; it is not shown again. ttl 0 means until revoked.
// It may be the first thing that is ever done with a store.
func CreateAPIKey(ctx context.Context, c *Configuration, name, role string, ttl time.Duration) (string, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return "", err
	}
	text, err := createAPIKey(ctx, s, name, role, ttl, time.Now())
	return text, errors.Join(err, s.Close())
}

// MeshFingerprint is the SHA-256 of the root by which clients know the nodes, in hex; empty while no node has made it yet.
func MeshFingerprint(ctx context.Context, c *Configuration) (string, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return "", err
	}
	_, roots, err := s.TrustBundle(ctx)
	err = errors.Join(err, s.Close())
	if fault.Is(err, fault.NotFound) || err == nil && len(roots) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return domain.HashHex(roots[0]), nil
}

// APIKeys lists operators' keys, without their secrets.
func APIKeys(ctx context.Context, c *Configuration) ([]APIKey, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return nil, err
	}
	keys, err := s.APIKeys(ctx)
	return keys, errors.Join(err, s.Close())
}

// RevokeAPIKey ends an operator's key for good. Calls with it are refused from then on; an open Watch ends within a minute.
func RevokeAPIKey(ctx context.Context, c *Configuration, name string) (APIKey, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return APIKey{}, err
	}
	k, err := s.RevokeAPIKey(ctx, name, domain.Op{Actor: "console", RequestID: id.New(id.Request), At: domain.Micro(time.Now())})
	return k, errors.Join(err, s.Close())
}

// APIKey is an operator's key as it is kept.
type APIKey = domain.APIKey

// openReady opens the store with the schema that this program needs.
func openReady(ctx context.Context, c *Configuration) (*store.Store, error) {
	s, err := openStore(ctx, c)
	if err != nil {
		return nil, err
	}
	if c.loaded.Config.Store.Migrate {
		err = s.Migrate(ctx)
	}
	if err == nil {
		err = s.CheckSchema(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func createAPIKey(ctx context.Context, s *store.Store, name, role string, ttl time.Duration, now time.Time) (string, error) {
	if ttl < 0 {
		return "", fault.InvalidField("ttl", "%s is in the past", ttl)
	}
	text, key, err := authz.NewKey(name, authz.Role(role), expiry(ttl, now), now)
	if err != nil {
		return "", err
	}
	op := domain.Op{Actor: "console", RequestID: id.New(id.Request), At: domain.Micro(now)}
	if err := s.CreateAPIKey(ctx, key, op); err != nil {
		return "", err
	}
	return text, nil
}
