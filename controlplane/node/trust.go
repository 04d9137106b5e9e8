package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

type trustConfig struct {
	Store       *store.Store
	Ring        *secret.Keyring
	Clock       clockwork.Clock
	Log         *slog.Logger
	NodeID      string
	TrustDomain string
	Names       []string
	TTL         time.Duration
}

// trust is the mesh CA and this node's own identity below it. The identity's key lives in memory alone: a node that
// starts makes a new one, so that there is nothing on its disk to steal. CA and roots may change while the node runs;
// who needs one asks each time.
type trust struct {
	trustConfig
	loading  sync.Mutex
	signer   atomic.Pointer[ca.Authority]
	identity atomic.Pointer[tls.Certificate]
	roots    atomic.Pointer[x509.CertPool]
	revision atomic.Int64 // domain.Mesh.Revision of what is in force
	moved    chan struct{}
}

// openTrust opens the mesh CA, or makes it at the cluster's first start, and issues this node's identity.
func openTrust(ctx context.Context, c trustConfig) (*trust, error) {
	t := &trust{trustConfig: c, moved: make(chan struct{}, 1)}
	_, err := c.Store.CA(ctx, domain.MeshCA)
	if fault.Is(err, fault.NotFound) {
		_, err = t.firstStart(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("read the mesh CA: %w", err)
	}
	return t, t.reload(ctx)
}

// reload reads the mesh CA and the roots again and takes both into force. When another CA signs now, this node has a new
// identity of it when reload returns. After an error everything is as it was.
func (t *trust) reload(ctx context.Context) error {
	t.loading.Lock()
	defer t.loading.Unlock()
	mesh, err := t.Store.Mesh(ctx)
	if err != nil {
		return fmt.Errorf("read the mesh CA: %w", err)
	}
	roots, err := ca.Bundle{Version: mesh.Bundle, Roots: mesh.Roots}.Pool()
	if err != nil {
		return err
	}
	signer, err := t.openSigner(ctx, mesh.CA)
	if err != nil {
		return err
	}
	if signer != t.mesh() {
		identity, err := t.issue(signer)
		if err != nil {
			return err
		}
		t.signer.Store(signer)
		t.identity.Store(identity)
	}
	t.roots.Store(roots)
	t.revision.Store(mesh.Revision)
	return nil
}

// openSigner returns the CA that is open already, if it is that one.
func (t *trust) openSigner(ctx context.Context, material domain.CA) (*ca.Authority, error) {
	if have := t.mesh(); have != nil && have.SameCA(material) {
		return have, nil
	}
	keys := func(id string) (domain.SealedKey, error) { return t.Store.SealedKey(ctx, id) }
	signer, err := ca.Open(material, keys, t.Ring)
	if err != nil {
		return nil, fmt.Errorf("open the mesh CA: %w", err)
	}
	if td := signer.TrustDomain(); td != t.TrustDomain {
		return nil, fault.InvalidField("mesh.trust_domain", "is %q, but the mesh CA in this store is of %q, which cannot change once it exists: set CERTMESH_TRUST_DOMAIN=%s", t.TrustDomain, td, td)
	}
	return signer, nil
}

// mesh is the CA that signs identities now.
func (t *trust) mesh() *ca.Authority { return t.signer.Load() }

// firstStart makes the mesh CA. Of nodes that start together the first one's is kept.
func (t *trust) firstStart(ctx context.Context) (domain.CA, error) {
	m, err := ca.NewMesh(t.TrustDomain, ca.Params{Now: t.Clock.Now()}, t.Ring)
	if err != nil {
		return domain.CA{}, err
	}
	return t.Store.InstallCA(ctx, m.CA, m.Keys, m.Roots(),
		domain.Op{Actor: "node:" + t.NodeID, RequestID: id.New(id.Request), At: domain.Micro(t.Clock.Now())})
}

// renew gives this node a new key and identity.
func (t *trust) renew() error {
	t.loading.Lock()
	defer t.loading.Unlock()
	identity, err := t.issue(t.mesh())
	if err != nil {
		return err
	}
	t.identity.Store(identity)
	return nil
}

// issue makes a key and an identity of this node for it.
func (t *trust) issue(signer *ca.Authority) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "make this node's key")
	}
	r := ca.IdentityRequest{PublicKey: key.Public(), Kind: ca.KindNode, ID: t.NodeID, TTL: t.TTL, Now: t.Clock.Now()}
	for _, n := range t.Names {
		if net.ParseIP(n) != nil {
			r.IP = append(r.IP, n)
		} else {
			r.DNS = append(r.DNS, n)
		}
	}
	p, err := signer.PrepareIdentity(r)
	if err != nil {
		return nil, fmt.Errorf("this node's identity: %w", err)
	}
	der, err := signer.Sign(p.TBS())
	if err != nil {
		return nil, fmt.Errorf("sign this node's identity: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "this node's identity does not parse")
	}
	// The root goes along: a host or an operator who holds nothing but its fingerprint finds it there.
	chain := append([][]byte{der}, signer.Chain()...)
	chain = append(chain, signer.Roots()...)
	return &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}, nil
}

// look makes watch look at once; it never blocks.
func (t *trust) look() {
	select {
	case t.moved <- struct{}{}:
	default:
	}
}

// trustInterval is how soon a node notices by itself that a rollover of the mesh CA has gone a step on: one row read by its
// key each time.
const trustInterval = 2 * time.Second

// watch takes every step of a rollover into force, and then tells it, until ctx ends.
func (t *trust) watch(ctx context.Context, tell func(context.Context) error) {
	told := t.revision.Load()
	ticks := t.Clock.NewTicker(trustInterval)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.moved:
		case <-ticks.Chan():
		}
		if err := t.follow(ctx, &told, tell); err != nil && ctx.Err() == nil {
			t.Log.Error("the mesh CA or the trust bundle has changed and is not in force on this node; it will be tried again", "error", err)
		}
	}
}

// follow is one look of watch. A store that does not answer is no news here.
func (t *trust) follow(ctx context.Context, told *int64, tell func(context.Context) error) error {
	now, err := t.Store.MeshRevision(ctx)
	if err != nil {
		t.Log.Debug("the revision of the mesh CA was not read", "error", err)
		return nil // the next look reads it again
	}
	if now != t.revision.Load() {
		if err := t.reload(ctx); err != nil {
			return err
		}
	}
	now = t.revision.Load()
	if now == *told {
		return nil
	}
	if err := tell(ctx); err != nil {
		return err
	}
	*told = now
	t.Log.Info("the mesh CA or the trust bundle has changed", "revision", now, "generation", t.mesh().Generation())
	return nil
}

// trustChanged tells those who kept something of the former trust.
func (n *Node) trustChanged(ctx context.Context) error {
	if n.opts.Mode == Dev {
		if _, err := n.writeClientProfile(ctx); err != nil {
			return err
		}
	}
	return n.parts.sessions.TrustChanged(ctx)
}

// keep renews the identity at half of its validity until ctx ends.
func (t *trust) keep(ctx context.Context) {
	for {
		leaf := t.identity.Load().Leaf
		wait := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2).Sub(t.Clock.Now())
		timer := t.Clock.NewTimer(max(wait, time.Second))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.Chan():
		}
		if err := t.renew(); err != nil {
			t.Log.Error("this node's identity was not renewed; it will be tried again", "error", err, "not_after", leaf.NotAfter)
		}
	}
}

func (t *trust) certificate() *tls.Certificate { return t.identity.Load() }

func (t *trust) pool() *x509.CertPool { return t.roots.Load() }

// server is the TLS configuration of the listeners for operators: clients show an API key, not a certificate.
func (t *trust) server(protocols ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: protocols,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return t.certificate(), nil
		},
	}
}
