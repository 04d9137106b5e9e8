package node

import (
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

// BenchmarkIssueNodes compares the pipeline of one node with those of three on the same database and the same processors,
// in turns: each node has a store, connections and shared commits of its own, and they divide the same number of requests
// and callers. Promised is a ratio of at least 0.75. The nodes are in one process, so that what three runtimes cost is
// left to e2e/bench/cluster.
func BenchmarkIssueNodes(b *testing.B) {
	const turns, each, callers = 3, 2000, 256
	for _, e := range storetest.Engines(b) {
		if e.Name == "sqlite" {
			continue // has one node
		}
		b.Run(e.Name, func(b *testing.B) {
			dsn := e.New(b)
			first, work, csrs := prepareIssue(b, e.OpenAt(b, dsn), 2*turns*each)
			nodes := []*issue.Pipeline{first}
			ring, err := secret.NewKeyring(make([]byte, secret.KeySize)) // prepareIssue has the same
			if err != nil {
				b.Fatal(err)
			}
			for _, name := range []string{"n2", "n3"} {
				s := e.OpenAt(b, dsn, func(c *store.Config) { c.NodeID = name })
				p, err := issue.New(issue.Config{Store: s, Authority: (&authorities{store: s, ring: ring}).issuer, Clock: clockwork.NewRealClock(), NewID: id.New, Log: quiet()})
				if err != nil {
					b.Fatal(err)
				}
				nodes = append(nodes, p)
			}
			defer debug.SetGCPercent(debug.SetGCPercent(400)) // as BenchmarkIssue
			next := 0
			rate := func(nodes []*issue.Pipeline, n int) float64 {
				var at atomic.Int64
				at.Store(int64(next))
				next += n
				begun := time.Now()
				var wg sync.WaitGroup
				for i := range callers {
					p := nodes[i%len(nodes)]
					wg.Go(func() {
						for j := int(at.Add(1)) - 1; j < next; j = int(at.Add(1)) - 1 {
							if _, err := p.Issue(b.Context(), issue.Request{Work: work[j], CSR: csrs[j]}); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				return float64(n) / time.Since(begun).Seconds()
			}
			const warm = 200
			rate(nodes[:1], warm)
			rate(nodes, warm)
			var one, three []float64
			for turn := range turns {
				for j := range 2 {
					if (turn+j)%2 == 0 {
						one = append(one, rate(nodes[:1], each-warm))
					} else {
						three = append(three, rate(nodes, each-warm))
					}
				}
			}
			slices.Sort(one)
			slices.Sort(three)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(one[turns/2], "one-issued/s")
			b.ReportMetric(three[turns/2], "three-issued/s")
			b.ReportMetric(three[turns/2]/one[turns/2], "ratio")
		})
	}
}
