package node

import (
	"context"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/protocol/fault"
)

// clientProfile is the file by which certmesh finds a control plane; `certmesh login` writes the same.
type clientProfile struct {
	ServerURL     string `yaml:"server_url"`
	APIKey        string `yaml:"api_key"`
	CACertificate string `yaml:"ca_certificate"`
}

// writeClientProfile gives dev's operator a key and a profile beside the data. The key of an earlier start is kept while
// it is good.
func (n *Node) writeClientProfile(ctx context.Context) (string, error) {
	path, err := filepath.Abs(filepath.Join(n.cfg.Node.DataDir, "client.yaml"))
	if err != nil {
		return "", fault.Wrap(fault.Invalid, err, "node.data_dir cannot be resolved")
	}
	p := clientProfile{ServerURL: n.addresses.GRPC,
		CACertificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.trust.mesh().Root().Raw}))}
	data, err := os.ReadFile(path)
	switch {
	case err == nil:
		var former clientProfile
		if err := yaml.Unmarshal(data, &former); err == nil {
			p.APIKey = former.APIKey
		}
	case !errors.Is(err, fs.ErrNotExist):
		return "", fault.Wrap(fault.Invalid, err, "the client profile cannot be read")
	}
	now := n.clk.Now()
	_, err = authz.Authenticate(ctx, n.store, p.APIKey, now)
	switch {
	case fault.Is(err, fault.Unauthorized):
		// The name carries the time because a name is never used twice.
		if p.APIKey, err = createAPIKey(ctx, n.store, "dev-"+now.UTC().Format("20060102T150405.000"), string(authz.Admin), 0, now); err != nil {
			return "", err
		}
	case err != nil:
		return "", err
	}
	if data, err = yaml.Marshal(p); err != nil { //nolint:gosec // the profile is where the operator keeps the key, mode 0600
		return "", fault.Wrap(fault.Internal, err, "the client profile cannot be encoded")
	}
	return path, writePrivate(path, data)
}

// writePrivate replaces a file by one of mode 0600.
func writePrivate(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".profile-*") // mode 0600
	if err != nil {
		return fault.Wrap(fault.Invalid, err, "cannot write to the data directory (node.data_dir)")
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the error says what matters
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fault.Wrap(fault.Invalid, err, "cannot write to the data directory (node.data_dir)")
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fault.Wrap(fault.Invalid, err, "cannot write to the data directory (node.data_dir)")
	}
	return nil
}

// expiry is when a key of ttl ends; 0 means never.
func expiry(ttl time.Duration, now time.Time) time.Time {
	if ttl <= 0 {
		return time.Time{}
	}
	return now.Add(ttl)
}
