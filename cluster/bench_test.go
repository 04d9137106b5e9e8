package cluster_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
)

// BenchmarkFailover measures, with the default timing, how long after the leader was cut off another node establishes.
func BenchmarkFailover(b *testing.B) {
	e, r := clustertest.NewEstate(b), newReigns()
	var nodes []*cluster.Node
	for _, id := range three {
		cfg := r.watch(e.Config(id, 3, three...))
		cfg.Timing = cluster.Timing{Patience: time.Second}
		nodes = append(nodes, e.Start(cfg))
	}
	settled(e, nodes...)
	leader := caughtUp(e, nodes)
	var took []time.Duration
	for b.Loop() {
		drain(r.began)
		cut := time.Now()
		e.Isolate(leader.ID(), three...)
		if awaitOther(r.began, leader.ID()) {
			took = append(took, time.Since(cut))
		}
		b.StopTimer()
		e.Heal()
		leader = caughtUp(e, nodes)
		b.StartTimer()
	}
	if len(took) == 0 {
		b.Fatal("nobody took over")
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "p50-ms")
	b.ReportMetric(float64(took[len(took)*9/10].Milliseconds()), "p90-ms")
	b.ReportMetric(float64(took[len(took)-1].Milliseconds()), "max-ms")
	b.ReportMetric(0, "ns/op")
}

// caughtUp waits until one node leads and all have everything that was decided.
func caughtUp(e *clustertest.Estate, nodes []*cluster.Node) *cluster.Node {
	var leader *cluster.Node
	e.Wait("all have caught up", func() bool {
		leader = e.Leader(nodes...)
		if leader.Propose(context.Background(), configurationChanged()) != nil {
			return false
		}
		want := leader.ConfigurationRevision()
		for _, n := range nodes {
			e.Wait("the revision", func() bool { return n.ConfigurationRevision() >= want || !leader.IsLeader() })
		}
		return leader.IsLeader()
	})
	return leader
}

// awaitOther waits until another node than the one that was cut off establishes; false: it led no more when it was.
func awaitOther(began <-chan string, cut string) bool {
	for {
		select {
		case id := <-began:
			if id != cut {
				return true
			}
		case <-time.After(5 * time.Second):
			return false
		}
	}
}

func drain(ch chan string) {
	for {
		select {
		case <-ch:
		default:
			return
		}
	}
}
