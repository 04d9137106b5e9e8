package storetest_test

import (
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func TestMetaFirstWriterWins(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		_, err := x.Meta(x.ctx, "trust_domain")
		refused(t, err, fault.NotFound)
		var wg sync.WaitGroup
		got := make([]string, 8)
		for i := range got {
			wg.Go(func() {
				v, err := x.SetMetaIfAbsent(x.ctx, "trust_domain", string(rune('a'+i)))
				if err != nil {
					t.Error(err)
				}
				got[i] = v
			})
		}
		wg.Wait()
		have, err := x.Meta(x.ctx, "trust_domain")
		x.must(err)
		for _, g := range got {
			same(t, "value in force", g, have)
		}
		_, err = x.SetMetaIfAbsent(x.ctx, "x", "a\x00b")
		refused(t, err, fault.Invalid)
	})
}

func TestInstallCAOnce(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		_, _, err := x.TrustBundle(x.ctx)
		refused(t, err, fault.NotFound)
		_, err = x.CA(x.ctx, domain.MeshCA)
		refused(t, err, fault.NotFound)
		ca := domain.CA{ID: domain.MeshCA, Chain: [][]byte{der(70000-4465, 1), der(127, 2), der(128, 3)}, KeyURI: "sealed:sk_a",
			RootKeyURI: "sealed:sk_b", PublicURL: "http://pki.example", CreatedAt: x.now}
		key := domain.SealedKey{ID: "sk_a", Purpose: "mesh", KEKID: "kek1", WrappedDEK: []byte{0, 1, 2}, Ciphertext: []byte{255, 0}, CreatedAt: x.now}
		roots := [][]byte{der(128, 3)}
		got, err := x.InstallCA(x.ctx, ca, []domain.SealedKey{key}, roots, x.op())
		x.must(err)
		want := ca
		want.CreatedAt, want.Generation = domain.Micro(ca.CreatedAt), 1
		same(t, "CA", got, want)
		second := ca
		second.KeyURI, second.PublicURL = "sealed:sk_z", "http://other"
		got, err = x.InstallCA(x.ctx, second, []domain.SealedKey{{ID: "sk_z", CreatedAt: x.now, WrappedDEK: []byte{1}, Ciphertext: []byte{1}}}, [][]byte{der(1, 1)}, x.op())
		x.must(err)
		same(t, "CA in force", got, want)
		version, bundle, err := x.TrustBundle(x.ctx)
		x.must(err)
		same(t, "version", version, int64(1))
		same(t, "roots", bundle, roots)
		gotKey, err := x.SealedKey(x.ctx, "sk_a")
		x.must(err)
		same(t, "key", gotKey, key)
		_, err = x.SealedKey(x.ctx, "sk_z")
		refused(t, err, fault.NotFound)
		all, err := x.CAs(x.ctx)
		x.must(err)
		same(t, "CAs", all, []domain.CA{want})
		same(t, "trail", x.actions("ca/mesh"), []string{"ca.installed"})
	})
}

func TestProfilesIssuersTargetsRoundTrip(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		p := domain.Profile{ID: id.New(id.Profile), Name: "server", KeyAlgorithm: domain.RSA3072,
			Allowed: []domain.KeyAlgorithm{domain.RSA3072, domain.Ed25519}, EKUs: []domain.EKU{domain.EKUServerAuth, domain.EKUClientAuth},
			TTL: 47 * 24 * time.Hour, MaxTTL: 90 * 24 * time.Hour, CreatedAt: x.now}
		x.must(x.SeedProfiles(x.ctx, []domain.Profile{p}))
		changed := p
		changed.ID, changed.TTL = id.New(id.Profile), time.Hour
		x.must(x.SeedProfiles(x.ctx, []domain.Profile{changed, {Name: "bare", CreatedAt: x.now}}))
		for _, key := range []string{p.ID, "server"} {
			got, err := x.Profile(x.ctx, key)
			x.must(err)
			same(t, "profile", got, p)
		}
		all, next, err := x.Profiles(x.ctx, domain.PageRequest{})
		x.must(err)
		if len(all) != 2 || next != "" {
			t.Fatalf("%d profiles, next %q", len(all), next)
		}
		same(t, "trail", x.actions("profile/"+p.ID), []string{"profile.created"})

		i := domain.Issuer{ID: id.New(id.Issuer), Name: "ca", Kind: domain.IssuerLocal, Settings: []byte(`{"x": "y"}`), CreatedAt: x.now}
		ca := domain.CA{ID: i.ID, Chain: [][]byte{der(9, 1)}, KeyURI: "sealed:sk_1", CreatedAt: x.now}
		x.must(x.CreateIssuer(x.ctx, i, ca, []domain.SealedKey{{ID: "sk_1", Purpose: "issuer", KEKID: "k", WrappedDEK: []byte{1}, Ciphertext: []byte{2}, CreatedAt: x.now}}, x.op()))
		gotCA, err := x.CA(x.ctx, i.ID)
		x.must(err)
		ca.Generation = 1 // its first
		same(t, "issuer's CA", gotCA, ca)
		for _, key := range []string{i.ID, "ca"} {
			got, err := x.Issuer(x.ctx, key)
			x.must(err)
			same(t, "issuer", got, i)
		}
		taken := i
		taken.ID = id.New(id.Issuer)
		refused(t, x.CreateIssuer(x.ctx, taken, ca, nil, x.op()), fault.Invalid, "ca.id")
		refused(t, x.CreateIssuer(x.ctx, taken, domain.CA{Chain: ca.Chain, KeyURI: "k"}, nil, x.op()), fault.Conflict, `"ca" is taken`, "issuers get ca")
		taken.Name = taken.ID
		refused(t, x.CreateIssuer(x.ctx, taken, domain.CA{Chain: ca.Chain, KeyURI: "k"}, nil, x.op()), fault.Invalid, "name")
		if _, err := x.SealedKey(x.ctx, "sk_1"); err != nil {
			t.Fatal(err)
		}
		issuers, _, err := x.Issuers(x.ctx, domain.PageRequest{Size: 1})
		x.must(err)
		same(t, "issuers", issuers, []domain.Issuer{i})

		a := x.agent("web-1")
		g := x.target(a, "site")
		for _, key := range []string{g.ID, "site"} {
			got, err := x.Target(x.ctx, key)
			x.must(err)
			same(t, "target", got, g)
		}
		off := domain.Target{ID: id.New(id.Target), Name: "off", AgentID: "web-1", Kind: "nginx", CreatedAt: x.now}
		x.must(x.CreateTarget(x.ctx, off, x.op()))
		off.AgentID, off.Settings, off.Revision = a.ID, []byte("{}"), 1
		for _, key := range []string{a.ID, "web-1", ""} {
			list, next, err := x.Targets(x.ctx, key, domain.PageRequest{Size: 1})
			x.must(err)
			same(t, "first page", list, []domain.Target{g})
			list, next, err = x.Targets(x.ctx, key, domain.PageRequest{Size: 1, After: next})
			x.must(err)
			same(t, "second page", list, []domain.Target{off})
			same(t, "cursor after the last page", next, "")
		}
		list, err := x.TargetsOfAgent(x.ctx, a.ID)
		x.must(err)
		same(t, "targets of the agent", list, []domain.Target{g, off})
		g.ID = id.New(id.Target)
		refused(t, x.CreateTarget(x.ctx, g, x.op()), fault.Conflict, `target name "site" is taken`)
		g.Name, g.AgentID = "third", "nobody"
		refused(t, x.CreateTarget(x.ctx, g, x.op()), fault.Invalid, "agent_id", "nobody")
		_, err = x.RetireAgent(x.ctx, a.ID, "gone", x.op())
		x.must(err)
		g.AgentID = a.ID
		refused(t, x.CreateTarget(x.ctx, g, x.op()), fault.Invalid, "retired")
	})
}

func TestThingsThatAreNotThere(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		for _, key := range []string{"", "no", "cert_0", "agt_0", "a\x00b", "\xff", "' OR 1=1 --", strings.Repeat("x", 100000)} {
			for name, get := range map[string]func() error{
				"profile":     func() error { _, err := x.Profile(x.ctx, key); return err },
				"issuer":      func() error { _, err := x.Issuer(x.ctx, key); return err },
				"target":      func() error { _, err := x.Target(x.ctx, key); return err },
				"agent":       func() error { _, err := x.Agent(x.ctx, key); return err },
				"certificate": func() error { _, err := x.CertificateView(x.ctx, key); return err },
				"job":         func() error { _, err := x.Job(x.ctx, key); return err },
				"identity":    func() error { _, err := x.Identity(x.ctx, key); return err },
				"crl":         func() error { _, err := x.CRL(x.ctx, key, 0); return err },
				"renew":       func() error { _, err := x.RenewCertificate(x.ctx, key, "r", x.op()); return err },
				"revoke":      func() error { _, _, err := x.RevokeCertificate(x.ctx, key, 1, x.op()); return err },
				"cancel":      func() error { _, err := x.CancelJob(x.ctx, key, x.op()); return err },
				"retire":      func() error { _, err := x.RetireAgent(x.ctx, key, "r", x.op()); return err },
				"quarantine":  func() error { return x.QuarantineAgent(x.ctx, key, "r", x.op()) },
				"release":     func() error { _, err := x.ReleaseAgent(x.ctx, key, x.op()); return err },
				"versions":    func() error { _, _, err := x.Versions(x.ctx, key, domain.PageRequest{}); return err },
			} {
				if err := get(); !fault.Is(err, fault.NotFound) {
					t.Errorf("%s %.20q: %v", name, key, err)
				}
			}
		}
		_, err := x.CertificateView(x.ctx, "web")
		refused(t, err, fault.NotFound, `no certificate "web"; certs list shows them`)
	})
}

func TestAPIKeys(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		k := domain.APIKey{ID: id.New(id.APIKey), Name: "alice", Role: "admin", Hash: digest("k"), ExpiresAt: x.now.Add(time.Hour), CreatedAt: x.now}
		x.must(x.CreateAPIKey(x.ctx, k, x.op()))
		got, err := x.APIKeyByHash(x.ctx, k.Hash)
		x.must(err)
		same(t, "key", got, k)
		_, err = x.APIKeyByHash(x.ctx, digest("other"))
		refused(t, err, fault.NotFound)
		_, err = x.APIKeyByHash(x.ctx, nil)
		refused(t, err, fault.NotFound)
		k.ID = id.New(id.APIKey)
		refused(t, x.CreateAPIKey(x.ctx, k, x.op()), fault.Conflict)
		k.Hash = digest("k2")
		refused(t, x.CreateAPIKey(x.ctx, k, x.op()), fault.Conflict, `"alice" is taken`)
		k.Hash = []byte("short")
		refused(t, x.CreateAPIKey(x.ctx, k, x.op()), fault.Invalid, "hash")
		for range 2 { // the second time changes nothing
			revoked, err := x.RevokeAPIKey(x.ctx, "alice", x.op())
			x.must(err)
			if !revoked.RevokedAt.Equal(x.now) || revoked.Hash != nil {
				t.Errorf("%+v", revoked)
			}
		}
		got, err = x.APIKeyByHash(x.ctx, digest("k"))
		x.must(err)
		all, err := x.APIKeys(x.ctx)
		x.must(err)
		if !got.RevokedAt.Equal(x.now) || len(all) != 1 || all[0].Name != "alice" || all[0].Hash != nil {
			t.Errorf("%+v %+v", got, all)
		}
		_, err = x.RevokeAPIKey(x.ctx, "bob", x.op())
		refused(t, err, fault.NotFound, "bob")
	})
}

func TestAuditTrail(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		var events []domain.AuditEvent
		for i := range 230 {
			events = append(events, domain.AuditEvent{At: x.now.Add(time.Duration(i) * time.Second), Actor: "anonymous", Action: "agent.refused",
				Resource: "agent/" + string(rune('a'+i%2)), Outcome: "unauthorized", RequestID: "r", RemoteAddr: "198.51.100.1:9", Detail: map[string]string{"why": "<ü>"}})
		}
		x.must(x.Audit(x.ctx, events))
		x.must(x.Audit(x.ctx, nil))
		refused(t, x.Audit(x.ctx, []domain.AuditEvent{{Action: "x"}}), fault.Internal)
		var got []domain.AuditEvent
		page := domain.PageRequest{Size: 50}
		for {
			some, next, err := x.AuditEvents(x.ctx, "agent/b", page)
			x.must(err)
			got = append(got, some...)
			if next == "" {
				break
			}
			page.After = next
		}
		if len(got) != 115 {
			t.Fatalf("%d events, want 115", len(got))
		}
		for i, e := range got {
			want := events[229-2*i]
			want.ID, want.At = e.ID, domain.Micro(want.At)
			same(t, "event", e, want)
		}
		all, _, err := x.AuditEvents(x.ctx, "", domain.PageRequest{Size: 1000})
		x.must(err)
		same(t, "number of all", len(all), 230)
	})
}
