package api

import (
	"context"
	"crypto/x509"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a issuers) ListIssuers(ctx context.Context, r *operatorpb.ListIssuersRequest) (*operatorpb.ListIssuersResponse, error) {
	all, next, err := a.Store.Issuers(ctx, pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	// One query for all CAs, of which there are few, in place of one for each issuer.
	cas, err := a.Store.CAs(ctx)
	if err != nil {
		return nil, err
	}
	byID := make(map[string]domain.CA, len(cas))
	for _, c := range cas {
		byID[c.ID] = c
	}
	return &operatorpb.ListIssuersResponse{NextCursor: next, Issuers: each(all, func(i domain.Issuer) *operatorpb.Issuer {
		return issuerPB(i, byID[i.ID])
	})}, nil
}

func (a issuers) GetIssuer(ctx context.Context, r *operatorpb.GetIssuerRequest) (*operatorpb.GetIssuerResponse, error) {
	i, err := a.Store.Issuer(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	var ca domain.CA
	if i.Kind == domain.IssuerLocal {
		if ca, err = a.Store.CA(ctx, i.ID); err != nil {
			return nil, err
		}
	}
	return &operatorpb.GetIssuerResponse{Issuer: issuerPB(i, ca)}, nil
}

func (a issuers) CreateIssuer(ctx context.Context, r *operatorpb.CreateIssuerRequest) (*operatorpb.CreateIssuerResponse, error) {
	i, ca, keys, err := a.Issuers.CreateLocal(ctx, LocalCA{
		Name: r.GetName(), CommonName: r.GetCommonName(), KeyAlgorithm: domain.KeyAlgorithm(r.GetKeyAlgorithm()),
		CertificatePEM: r.GetCaCertificatePem(), KeyPEM: r.GetCaKeyPem(),
	})
	if err != nil {
		return nil, withoutKey(renamed(err, issuerField), r.GetCaKeyPem())
	}
	if err := a.Store.CreateIssuer(ctx, i, ca, keys, a.op(ctx)); err != nil {
		return nil, err
	}
	// The first CRL is there before the first certificate points to it.
	if a.Revoked != nil {
		a.Revoked(i.ID)
	}
	a.Hub.Publish(hub.Notice{Kind: hub.Issuers, ID: i.ID})
	return &operatorpb.CreateIssuerResponse{Issuer: issuerPB(i, ca)}, nil
}

func (a issuers) ListProfiles(ctx context.Context, r *operatorpb.ListProfilesRequest) (*operatorpb.ListProfilesResponse, error) {
	all, next, err := a.Store.Profiles(ctx, pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListProfilesResponse{Profiles: each(all, profilePB), NextCursor: next}, nil
}

func issuerPB(i domain.Issuer, ca domain.CA) *operatorpb.Issuer {
	out := &operatorpb.Issuer{
		Id: i.ID, Name: i.Name, Kind: i.Kind, ChainPem: pemOf(ca.Chain...), PublicUrl: ca.PublicURL, CreatedAt: stamp(i.CreatedAt),
	}
	if len(ca.Chain) > 0 {
		// A CA that does not parse is shown without its end: the list must work when one row is bad.
		if c, err := x509.ParseCertificate(ca.Chain[0]); err == nil {
			out.NotAfter = stamp(c.NotAfter)
		}
	}
	return out
}

// issuerField translates the fields by which ca names what a CA is made from to the request's.
func issuerField(field string) string {
	switch field {
	case "certificates":
		return "ca_certificate_pem"
	case "key", "password":
		return "ca_key_pem"
	case "root_name":
		return "common_name"
	}
	return field
}

// withoutKey makes sure that no error carries a part of the CA's private key to the log or the caller, whatever the
// libraries that read it put into theirs: an error that quotes a line of the key is replaced.
func withoutKey(err error, key string) error {
	const quote = 12 // shorter lines occur by chance
	text := err.Error()
	for line := range strings.Lines(key) {
		line = strings.TrimSpace(line)
		if len(line) >= quote && !strings.HasPrefix(line, "-----") && strings.Contains(text, line) {
			return fault.InvalidField("ca_key_pem", "is no private key that can be read; give PKCS#8, PKCS#1 or SEC 1 in PEM, unencrypted")
		}
	}
	return err
}
