package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/api"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// BenchmarkIssue measures the pipeline from a CSR to the recorded certificate, as the stream runs it: check, prepare, lint,
// intent, signature, verification, version, with a real CA and store. PostgreSQL runs with fsync off; requests are made
// beforehand.
func BenchmarkIssue(b *testing.B) {
	for _, e := range storetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			s := e.Open(b)
			p, work, csrs := prepareIssue(b, s, b.N)
			// What docs/operations.md advises for nodes that issue much.
			defer debug.SetGCPercent(debug.SetGCPercent(400))
			report := e.ReportCPU(b)
			done := profiled(b)
			b.ResetTimer()
			var next atomic.Int64
			var wg sync.WaitGroup
			for range 256 {
				wg.Go(func() {
					for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
						if _, err := p.Issue(b.Context(), issue.Request{Work: work[i], CSR: csrs[i]}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			done()
			report(b.N)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "issued/s")
		})
	}
}

// profiled writes a CPU profile of what runs until done is called into the folder that CERTMESH_PROFILES names, if any.
func profiled(b *testing.B) (done func()) {
	b.Helper()
	dir := os.Getenv("CERTMESH_PROFILES")
	if dir == "" || b.N == 1 {
		return func() {}
	}
	f, err := os.Create(filepath.Join(dir, strings.ReplaceAll(b.Name(), "/", "-")+".cpu"))
	if err != nil {
		b.Fatal(err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		b.Fatal(err)
	}
	return func() {
		pprof.StopCPUProfile()
		if err := f.Close(); err != nil {
			b.Error(err)
		}
	}
}

// prepareIssue returns n accepted issuance jobs with their requests.
func prepareIssue(b *testing.B, s *store.Store, n int) (*issue.Pipeline, []domain.Work, [][]byte) {
	b.Helper()
	ctx := b.Context()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	clk := clockwork.NewRealClock()
	key := make([]byte, secret.KeySize)
	ring, err := secret.NewKeyring(key)
	must(err)
	now := domain.Micro(clk.Now())
	op := domain.Op{Actor: "console", RequestID: id.New(id.Request), At: now}
	must(s.SeedProfiles(ctx, seedProfiles(now)))
	issuer, material, keys, err := (&localIssuers{ring: ring, publicURL: "http://pki.test", now: clk.Now}).CreateLocal(ctx, api.LocalCA{Name: "internal"})
	must(err)
	must(s.CreateIssuer(ctx, issuer, material, keys, op))
	authorities := &authorities{store: s, ring: ring}
	p, err := issue.New(issue.Config{Store: s, Authority: authorities.issuer, Clock: clk, NewID: id.New, Log: quiet()})
	must(err)

	token := domain.JoinToken{ID: id.New(id.Token), Hash: make([]byte, 32), MaxUses: 1, ExpiresAt: now.Add(time.Hour), CreatedAt: now}
	must(s.CreateJoinToken(ctx, token, op))
	agent, err := s.Enroll(ctx, domain.Enrollment{TokenID: token.ID, TokenHash: token.Hash, SPKI: "spki", AgentID: id.New(id.Agent), Name: "web1", Op: op})
	must(err)
	must(s.RecordIdentity(ctx, domain.Identity{Serial: "1", AgentID: agent.ID, SPKI: "spki", NotBefore: now, NotAfter: now.Add(time.Hour), CreatedAt: now}, op))
	session := s.OpenSessions(ctx, []domain.SessionOpen{{AgentID: agent.ID, Node: "n1", BootID: "b", Protocol: 1, IdentitySerial: "1", At: now}})[0]
	must(session.Err)
	csrs := make([][]byte, n)
	each(n, func(i int) {
		name := fmt.Sprintf("c%d.test", i)
		site := domain.Target{ID: id.New(id.Target), Name: name, AgentID: agent.ID, Kind: "file", Settings: []byte("{}"), Enabled: true, CreatedAt: now, Revision: 1}
		if err := s.CreateTarget(ctx, site, op); err != nil {
			b.Error(err)
			return
		}
		_, _, err := s.CreateCertificate(ctx, domain.NewCertificate{Op: op, TargetIDs: []string{site.ID}, Certificate: domain.Certificate{ID: id.New(id.Certificate),
			Name: name, Names: domain.Names{DNS: []string{name}}, IssuerID: issuer.ID, ProfileID: seedProfiles(now)[0].ID, CreatedAt: now}})
		if err != nil {
			b.Error(err)
		}
	})
	if b.Failed() {
		b.FailNow()
	}
	var work []domain.Work
	for more := true; more; {
		query := domain.WorkQuery{AgentID: agent.ID}
		for _, w := range work {
			query.Out = append(query.Out, domain.JobRef{JobID: w.Job.ID, Attempt: w.Job.Attempt})
		}
		page, err := s.OpenWork(ctx, []domain.WorkQuery{query})
		must(err)
		work, more = append(work, page[0].Work...), len(page[0].More) > 0
	}
	if len(work) != n {
		b.Fatalf("%d jobs of %d", len(work), n)
	}
	each(n, func(i int) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err == nil {
			csrs[i], err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: work[i].Names.DNS}, k)
		}
		if err == nil {
			err = s.Dispatch(ctx, []domain.Dispatch{{JobID: work[i].Job.ID, AgentID: agent.ID, Attempt: work[i].Job.Attempt, Epoch: session.Epoch, At: now}})[0]
		}
		if err == nil {
			work[i].Job.Attempt++
			err = s.Accept(ctx, []domain.Acceptance{{JobID: work[i].Job.ID, AgentID: agent.ID, Attempt: work[i].Job.Attempt, At: now}})[0]
		}
		if err != nil {
			b.Error(err)
		}
	})
	if b.Failed() {
		b.FailNow()
	}
	return p, work, csrs
}

// each calls f for 0 to n-1, 64 at a time.
func each(n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// BenchmarkRenewal measures one renewal at a time, from the operator's call to the recorded proof that it is served, over a
// real stream with an agent on disk and a target in memory.
func BenchmarkRenewal(b *testing.B) {
	for _, e := range storetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			w := newWorldWith(b, e, nil)
			ctx := b.Context()
			w.place("one")
			call(w, ctx, "order", func(ctx context.Context, c clients) (*operatorpb.CreateCertificateResponse, error) {
				return c.certs.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: "site", Issuer: "internal", Profile: "tls-server",
					Names: &operatorpb.Names{Dns: []string{"site.test"}}, Targets: []string{"one"}})
			})
			w.served(ctx, "site", 1)
			generation := int64(1)
			for b.Loop() {
				generation++
				call(w, ctx, "renew", func(ctx context.Context, c clients) (*operatorpb.RenewCertificateResponse, error) {
					return c.certs.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: "site"})
				})
				w.served(ctx, "site", generation)
			}
		})
	}
}
