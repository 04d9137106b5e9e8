package node

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// percentile of sorted times, in milliseconds.
func percentile(sorted []time.Duration, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(int(p*float64(len(sorted))), len(sorted)-1)].Microseconds()) / 1000
}

// BenchmarkBurst measures renewals of one owner, one after another, while another owner's burst of orders waits for the same
// agent: from the call to the recorded proof that the new certificate is served. Promised is less than a second. The burst
// has CERTMESH_BURST orders (2,000 unless set); renewals are measured while jobs of it are open, and burst-left says how many
// were when the last one was asked for.
func BenchmarkBurst(b *testing.B) {
	burst := 2000
	if s := os.Getenv("CERTMESH_BURST"); s != "" {
		var err error
		if burst, err = strconv.Atoi(s); err != nil || burst < 1 {
			b.Fatalf("CERTMESH_BURST=%q is not a number above zero", s)
		}
	}
	for _, e := range storetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			w := newWorldWith(b, e, nil)
			ctx := b.Context()
			names := make([]string, burst)
			for i := range names {
				names[i] = fmt.Sprintf("c%d", i)
			}
			w.place(names...)
			w.place("one")
			order := func(name, owner string) *operatorpb.CreateCertificateRequest {
				return &operatorpb.CreateCertificateRequest{Name: name, Owner: owner, Issuer: "internal", Profile: "tls-server",
					Names: &operatorpb.Names{Dns: []string{name + ".test"}}, Targets: []string{name}}
			}
			call(w, ctx, "order", func(ctx context.Context, c clients) (*operatorpb.CreateCertificateResponse, error) {
				return c.certs.CreateCertificate(ctx, order("one", "small"))
			})
			w.served(ctx, "one", 1)
			certs := clientsOf(w.operator).certs
			var ordered sync.WaitGroup
			ordered.Go(func() {
				each(burst, func(i int) {
					if _, err := certs.CreateCertificate(w.octx, order(names[i], "big")); err != nil {
						b.Error(err)
					}
				})
			})
			open := func() (n int64) {
				counts, err := w.node.store.Counts(ctx)
				if err != nil {
					b.Fatal(err)
				}
				for _, jobs := range counts.OpenJobs {
					n += jobs
				}
				return n
			}
			for open() < int64(burst/20) {
				pause(ctx)
			}
			var took []time.Duration
			var left int64
			b.ResetTimer()
			for generation := int64(2); generation <= 21; generation++ {
				n := open()
				if n == 0 {
					break
				}
				left = n
				begun := time.Now()
				call(w, ctx, "renew", func(ctx context.Context, c clients) (*operatorpb.RenewCertificateResponse, error) {
					return c.certs.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: "one"})
				})
				w.served(ctx, "one", generation)
				took = append(took, time.Since(begun))
			}
			b.StopTimer()
			ordered.Wait()
			slices.Sort(took)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(percentile(took, 0.5), "p50-ms")
			b.ReportMetric(percentile(took, 1), "max-ms")
			b.ReportMetric(float64(len(took)), "renewals")
			b.ReportMetric(float64(left), "burst-left")
		})
	}
}

// BenchmarkOverload offers more changes than a node takes: a thousand callers in a closed loop, who come back when they are
// told to. What is admitted must answer soon, and the rest be refused and not queued without end.
func BenchmarkOverload(b *testing.B) {
	const connections, each, length = 10, 100, 5 * time.Second
	for _, e := range storetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			w := newWorldWith(b, e, nil)
			var mu sync.Mutex
			var took []time.Duration
			var refused atomic.Int64
			end := time.Now().Add(length)
			var wg sync.WaitGroup
			b.ResetTimer()
			for range connections {
				ctx, conn := operator(b, w.node)
				b.Cleanup(func() { _ = conn.Close() })
				c := clientsOf(conn)
				for range each {
					wg.Go(func() {
						for time.Now().Before(end) {
							begun := time.Now()
							_, err := c.agents.CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
							switch {
							case err == nil:
								mu.Lock()
								took = append(took, time.Since(begun))
								mu.Unlock()
							case status.Code(err) == codes.ResourceExhausted:
								refused.Add(1)
								select {
								case <-time.After(2 * time.Second): // as RetryInfo says
								case <-ctx.Done():
								}
							default:
								b.Error(err)
								return
							}
						}
					})
				}
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(len(took))/length.Seconds(), "admitted/s")
			b.ReportMetric(percentile(took, 0.5), "p50-ms")
			b.ReportMetric(percentile(took, 0.99), "p99-ms")
			b.ReportMetric(float64(refused.Load()), "refused")
		})
	}
}

// BenchmarkMalformed measures the issuance of good requests alone and beside as many bad ones as 64 callers can send: the
// ratio of the rates is promised to be at least 0.8.
func BenchmarkMalformed(b *testing.B) {
	for _, e := range storetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			const n = 4000
			p, work, csrs := prepareIssue(b, e.Open(b), 2*n)
			run := func(from int) time.Duration {
				begun := time.Now()
				each(n, func(i int) {
					if _, err := p.Issue(b.Context(), issue.Request{Work: work[from+i], CSR: csrs[from+i]}); err != nil {
						b.Error(err)
					}
				})
				return time.Since(begun)
			}
			alone := run(0)
			ctx, cancel := context.WithCancel(b.Context())
			var bad atomic.Int64
			var wg sync.WaitGroup
			for i := range 64 {
				broken := slices.Clone(csrs[n+i])
				broken[len(broken)-1] ^= 1 // the signature is wrong, which is the dearest way to be wrong
				w := work[n+i]
				w.Owner, w.Job.AgentID = "careless", "agt_careless"
				wg.Go(func() {
					for ctx.Err() == nil {
						if _, err := p.Issue(ctx, issue.Request{Work: w, CSR: broken}); err != nil {
							bad.Add(1)
						}
						// Together as many a second as one core could check; a loop without rest would measure itself.
						select {
						case <-time.After(5 * time.Millisecond):
						case <-ctx.Done():
						}
					}
				})
			}
			beside := run(n)
			cancel()
			wg.Wait()
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(n)/alone.Seconds(), "alone/s")
			b.ReportMetric(float64(n)/beside.Seconds(), "beside/s")
			b.ReportMetric(alone.Seconds()/beside.Seconds(), "ratio")
			b.ReportMetric(float64(bad.Load())/beside.Seconds(), "malformed/s")
		})
	}
}
