package cluster_test

import (
	"crypto/tls"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
)

// TestLoopback: real sockets, a certificate renewed under way, and a restart at the same address.
func TestLoopback(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	listen := func(address string) net.Listener {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	certificates, configs := map[string]*atomic.Pointer[tls.Certificate]{}, map[string]cluster.Config{}
	var nodes []*cluster.Node
	for _, id := range three {
		cfg := e.Config(id, 3, three...)
		cfg.Listener, cfg.Dial = listen("127.0.0.1:0"), nil
		cfg.Self.RaftAddress = cfg.Listener.Addr().String()
		certificates[id] = &atomic.Pointer[tls.Certificate]{}
		// It expires while the test runs, and every connection with it.
		certificates[id].Store(e.Authority.Identity(t, "node", id, 2*time.Second))
		cfg.Certificate = certificates[id].Load
		configs[id] = cfg
		nodes = append(nodes, e.Start(cfg))
	}
	settled(e, nodes...)
	expired := time.Now().Add(2 * time.Second)
	for _, id := range three {
		certificates[id].Store(e.Authority.Node(t, id))
	}
	leader := e.Leader(nodes...)
	stopped := without(nodes, leader)[0]
	e.Stop(stopped)
	cfg := configs[stopped.ID()]
	cfg.Listener = listen(cfg.Self.GetRaftAddress())
	again := e.Start(cfg)
	e.Wait("the old certificates have expired", func() bool { return time.Now().After(expired) })
	nodes = append(without(nodes, stopped), again)
	// Every connection breaks at that moment, so there may be an election.
	e.Wait("decisions go on", func() bool { return e.Leader(nodes...).Propose(t.Context(), configurationChanged()) == nil })
	e.Wait("all know it", func() bool { return again.ConfigurationRevision() >= 1 })
}
