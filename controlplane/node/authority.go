package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/api"
	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/gateway/crl"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

func (n *Node) mesh() *ca.Authority { return n.trust.mesh() }

// authorities opens issuing CAs on first use and keeps them: a CA's key and certificates never change under its id.
type authorities struct {
	store *store.Store
	ring  *secret.Keyring

	mu   sync.Mutex
	open map[string]*ca.Authority
}

func (a *authorities) get(ctx context.Context, issuerID string) (*ca.Authority, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.open[issuerID]; have != nil {
		return have, nil
	}
	material, err := a.store.CA(ctx, issuerID)
	if err != nil {
		return nil, fmt.Errorf("read CA %s: %w", issuerID, err)
	}
	opened, err := ca.Open(material, func(id string) (domain.SealedKey, error) { return a.store.SealedKey(ctx, id) }, a.ring)
	if err != nil {
		return nil, fmt.Errorf("open CA %s: %w", issuerID, err)
	}
	if a.open == nil {
		a.open = map[string]*ca.Authority{}
	}
	a.open[issuerID] = opened
	return opened, nil
}

func (a *authorities) issuer(ctx context.Context, issuerID string) (issue.Authority, error) {
	return a.get(ctx, issuerID)
}

func (a *authorities) signer(ctx context.Context, issuerID string) (crl.Signer, error) {
	return a.get(ctx, issuerID)
}

// localIssuers makes CAs of ours.
type localIssuers struct {
	ring      *secret.Keyring
	publicURL string
	now       func() time.Time
}

// CreateLocal implements api.Issuers.
func (l *localIssuers) CreateLocal(_ context.Context, r api.LocalCA) (domain.Issuer, domain.CA, []domain.SealedKey, error) {
	now := domain.Micro(l.now())
	issuer := domain.Issuer{ID: id.New(id.Issuer), Name: r.Name, Kind: domain.IssuerLocal, Settings: []byte("{}"), CreatedAt: now}
	var m ca.Material
	var err error
	if r.CertificatePEM != "" {
		m, err = ca.FromPEM(ca.Import{ID: issuer.ID, PublicURL: l.publicURL, Now: now, Certificates: []byte(r.CertificatePEM),
			Key: []byte(r.KeyPEM)}, l.ring)
	} else {
		m, err = ca.NewSelfSigned(ca.Params{ID: issuer.ID, Name: r.Name, RootName: r.CommonName, PublicURL: l.publicURL, Now: now, KeyAlgorithm: r.KeyAlgorithm}, l.ring)
	}
	if err != nil {
		return domain.Issuer{}, domain.CA{}, nil, err
	}
	return issuer, m.CA, m.Keys, nil
}
