package storetest_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// estate is a store with builders of what a test needs.
type estate struct {
	*store.Store
	t   *testing.T
	e   storetest.Engine
	dsn string
	ctx context.Context
	now time.Time
	db  *sql.DB
	n   int
}

func newEstate(t *testing.T, e storetest.Engine, change ...func(*store.Config)) *estate {
	t.Helper()
	dsn := e.New(t)
	x := &estate{t: t, e: e, dsn: dsn, now: time.Date(2026, 5, 4, 3, 2, 1, 987654000, time.UTC)}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	x.ctx = ctx
	x.Store = e.OpenAt(t, dsn, change...)
	return x
}

// sql reads and writes past the store.
func (x *estate) sql() *sql.DB {
	if x.db == nil {
		x.db = x.e.SQL(x.t, x.dsn)
	}
	return x.db
}

func (x *estate) op(after ...time.Duration) domain.Op {
	at := x.now
	for _, d := range after {
		at = at.Add(d)
	}
	return domain.Op{Actor: "operator:alice", RequestID: "req_1", RemoteAddr: "192.0.2.7:4711", At: at}
}

func (x *estate) must(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

func refused(t *testing.T, err error, class fault.Class, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want %s", class)
	}
	if !fault.Is(err, class) {
		t.Fatalf("error of class %s: %v; want %s", fault.ClassOf(err), err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("error %q does not say %q", err, w)
		}
	}
}

// digest stands for the hash of a secret.
func digest(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

// der makes a DER element of n bytes of content.
func der(n int, fill byte) []byte {
	content := slices.Repeat([]byte{fill}, n)
	switch {
	case n < 0x80:
		return append([]byte{0x30, byte(n)}, content...)
	case n < 0x100:
		return append([]byte{0x30, 0x81, byte(n)}, content...)
	default:
		return append([]byte{0x30, 0x82, byte(n >> 8), byte(n)}, content...)
	}
}

func (x *estate) token(uses int) domain.JoinToken {
	x.t.Helper()
	k := domain.JoinToken{ID: id.New(id.Token), Hash: digest("secret"), MaxUses: uses, ExpiresAt: x.now.Add(time.Hour),
		Labels: map[string]string{"rack": "7"}, CreatedBy: "alice"}
	x.must(x.CreateJoinToken(x.ctx, k, x.op()))
	return k
}

func (x *estate) enrollment(k domain.JoinToken, spki, name string) domain.Enrollment {
	return domain.Enrollment{TokenID: k.ID, TokenHash: k.Hash, SPKI: spki, AgentID: id.New(id.Agent), Name: name,
		Facts: domain.Facts{OS: "linux", Hostname: name}, Op: x.op()}
}

func (x *estate) agent(name string) domain.Agent {
	x.t.Helper()
	a, err := x.Enroll(x.ctx, x.enrollment(x.token(1), "spki-"+name, name))
	x.must(err)
	return a
}

func (x *estate) target(a domain.Agent, name string) domain.Target {
	x.t.Helper()
	g := domain.Target{ID: id.New(id.Target), Name: name, AgentID: a.ID, Kind: "file", Settings: []byte(`{"path":"/srv"}`),
		VerifyAddress: "127.0.0.1:443", ServerName: "a.example", Enabled: true, CreatedAt: x.now, Revision: 1}
	x.must(x.CreateTarget(x.ctx, g, x.op()))
	return g
}

func (x *estate) issuer(name string) domain.Issuer {
	x.t.Helper()
	i := domain.Issuer{ID: id.New(id.Issuer), Name: name, Kind: domain.IssuerLocal, Settings: []byte(`{"a":1}`), CreatedAt: x.now}
	ca := domain.CA{Chain: [][]byte{der(5, 1), der(200, 2)}, KeyURI: "sealed:sk_1", PublicURL: "http://pki.example:8080"}
	x.must(x.CreateIssuer(x.ctx, i, ca, nil, x.op()))
	return i
}

func (x *estate) profile(name string) domain.Profile {
	x.t.Helper()
	p := domain.Profile{ID: id.New(id.Profile), Name: name, KeyAlgorithm: domain.ECDSAP256, Allowed: []domain.KeyAlgorithm{domain.ECDSAP256},
		EKUs: []domain.EKU{domain.EKUServerAuth}, TTL: 90 * 24 * time.Hour, MaxTTL: 100 * 24 * time.Hour, CreatedAt: x.now}
	x.must(x.SeedProfiles(x.ctx, []domain.Profile{p}))
	return p
}

// order is a certificate that can be ordered; issuer and profile are made once.
func (x *estate) order(name string, targets ...domain.Target) domain.NewCertificate {
	x.t.Helper()
	if x.n++; x.n == 1 {
		x.issuer("ca")
		x.profile("server")
	}
	n := domain.NewCertificate{Certificate: domain.Certificate{ID: id.New(id.Certificate), Name: name,
		Names:    domain.Names{CommonName: name + ".example", DNS: []string{name + ".example"}},
		IssuerID: "ca", ProfileID: "server", Owner: "team"}, Op: x.op()}
	for _, g := range targets {
		n.TargetIDs = append(n.TargetIDs, g.ID)
	}
	return n
}

func (x *estate) create(n domain.NewCertificate) (domain.Certificate, []domain.Job) {
	x.t.Helper()
	c, jobs, err := x.CreateCertificate(x.ctx, n)
	x.must(err)
	return c, jobs
}

// issue writes a version past the store, as if generation g of the certificate had been issued to the agent and its job
// been completed.
func (x *estate) issue(c domain.Certificate, agentID, serial string, g int64, notAfter time.Time) {
	x.t.Helper()
	for _, st := range []struct {
		text string
		args []any
	}{
		{`INSERT INTO version (issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm,
not_before, not_after, revoked_at, revocation_reason, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 'spki', 'ECDSA-P256', $9, $10, NULL, 0, $9)`,
			[]any{c.IssuerID, serial, c.ID, agentID, g, der(300, 9), append(der(130, 1), der(3, 2)...), "fp" + serial, x.now.UnixMicro(), notAfter.UnixMicro()}},
		{`UPDATE leaf SET current_generation = $1, generation = $1, serial = $2, not_before = $3, not_after = $4 WHERE certificate_id = $5 AND agent_id = $6`,
			[]any{g, serial, x.now.UnixMicro(), notAfter.UnixMicro(), c.ID, agentID}},
		{`UPDATE job SET state = 'Completed', open_key = NULL, finished_at = $1 WHERE certificate_id = $2 AND agent_id = $3 AND finished_at IS NULL`,
			[]any{x.now.UnixMicro(), c.ID, agentID}},
	} {
		if _, err := x.sql().ExecContext(x.ctx, st.text, st.args...); err != nil {
			x.t.Fatal(err)
		}
	}
}

// dueAt reads leaf.due_at; ok is false for NULL.
func (x *estate) dueAt(table, certificateID, column, key string) (time.Time, bool) {
	x.t.Helper()
	var us sql.NullInt64
	err := x.sql().QueryRowContext(x.ctx, fmt.Sprintf("SELECT due_at FROM %s WHERE certificate_id = $1 AND %s = $2", table, column),
		certificateID, key).Scan(&us)
	x.must(err)
	return time.UnixMicro(us.Int64).UTC(), us.Valid
}

// actions returns the trail of a resource, oldest first.
func (x *estate) actions(resource string) []string {
	x.t.Helper()
	events, _, err := x.AuditEvents(x.ctx, resource, domain.PageRequest{Size: 1000})
	x.must(err)
	var out []string
	for _, e := range slices.Backward(events) {
		out = append(out, e.Action)
	}
	return out
}
