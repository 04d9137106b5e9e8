package cluster_test

import (
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
	leader := e.Leader(nodes...)
	var took []time.Duration
	for b.Loop() {
		drain(r.began)
		cut := time.Now()
		e.Isolate(leader.ID(), three...)
		for id := range r.began {
			if id != leader.ID() {
				break
			}
		}
		took = append(took, time.Since(cut))
		b.StopTimer()
		e.Heal()
		e.Wait("everyone follows the new leader", func() bool {
			now := e.Leader(nodes...)
			return now != leader || len(nodes) == 1
		})
		leader = e.Leader(nodes...)
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "p50-ms")
	b.ReportMetric(float64(took[len(took)-1].Milliseconds()), "max-ms")
	b.ReportMetric(0, "ns/op")
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
