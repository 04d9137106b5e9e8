package permits

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
	"github.com/certmesh/certmesh/cluster/link"
	"github.com/certmesh/certmesh/cluster/permit"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// nodeVariable holds the settings of a node as JSON: then this program is a node, and no test.
const nodeVariable = "CERTMESH_PERMITS_NODE"

// settings are what a node is started with.
type settings struct {
	ID, Dir, Raft, Mesh, CA string
	// Nodes are the mesh addresses of all, by id.
	Nodes       map[string]string
	Root        []byte
	Certificate []byte
	Key         []byte
	LeaseTime   time.Duration
	InFlight    int
	Rate        float64
	Workers     int
}

// nodeMain is a node; it runs until its standard input ends, which is when the test does.
func nodeMain() error {
	var s settings
	if err := json.Unmarshal([]byte(os.Getenv(nodeVariable)), &s); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // Its end is what matters.
		cancel()
	}()
	n := &node{settings: s, log: slog.New(slog.NewTextHandler(os.Stderr, nil)), ready: make(chan struct{})}
	return n.run(ctx)
}

// node is what a control plane's node is, as far as permits go.
type node struct {
	settings
	log    *slog.Logger
	mesh   *link.Mesh
	leader *permit.Leader
	// ready is closed once node is set.
	ready chan struct{}
	node  *cluster.Node
}

func (n *node) run(ctx context.Context) error {
	clk := clockwork.NewRealClock()
	pair, err := tls.X509KeyPair(n.Certificate, n.Key)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.Root)
	certificate, trusted := func() *tls.Certificate { return &pair }, func() *x509.CertPool { return roots }
	instance := strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.Itoa(os.Getpid())
	n.mesh, err = link.New(link.Config{NodeID: n.ID, ClusterID: "clu_permits", Program: "test", Instance: instance, TrustDomain: trustDomain,
		Certificate: certificate, Roots: trusted, Handler: deaf{}, Clock: clk, Log: n.log})
	if err != nil {
		return err
	}
	defer n.mesh.Stop()
	meshListener, err := net.Listen("tcp", n.Mesh)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})))
	n.mesh.Register(server)
	go func() { _ = server.Serve(meshListener) }()
	defer server.Stop()
	raftListener, err := net.Listen("tcp", n.Raft)
	if err != nil {
		return err
	}
	if n.leader, err = permit.NewLeader(permit.LeaderConfig{Log: late{n}, Lease: n.LeaseTime, Clock: clk, Logger: n.log,
		Limits: func(string) permit.Limits { return permit.Limits{InFlight: n.InFlight, Rate: n.Rate} }}); err != nil {
		return err
	}
	var join []string
	for _, address := range n.Nodes {
		join = append(join, address)
	}
	n.node, err = cluster.Start(ctx, cluster.Config{ID: n.ID, ClusterID: "clu_permits", Self: &clusterpb.Member{RaftAddress: n.Raft, MeshAddress: n.Mesh, Program: "test"},
		Dir: n.Dir, Listener: raftListener, Certificate: certificate, Roots: trusted, TrustDomain: trustDomain, Join: join, BootstrapExpect: len(n.Nodes),
		Peers: dialer{n.mesh}, Clock: clk, Log: n.log, Timing: clustertest.Timing(),
		Leading: func(ctx context.Context, _ cluster.Term) error {
			<-n.ready
			n.leader.Lead(ctx)
			return nil
		}})
	if err != nil {
		return err
	}
	close(n.ready)
	n.mesh.Serve(answers{n})
	n.mesh.Update(n.Nodes)
	permits, err := permit.New(ctx, permit.Config{Leaser: route{n}, Instance: instance, Lease: n.LeaseTime, Clock: clk, Log: n.log})
	if err != nil {
		return err
	}
	var workers sync.WaitGroup
	for w := range n.Workers {
		workers.Go(func() { n.work(ctx, permits, fmt.Sprintf("%s-%s-%d", n.ID, instance, w)) })
	}
	<-ctx.Done()
	permits.Close()
	workers.Wait()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return n.node.Stop(stop)
}

// work calls the issuer as often as it may.
func (n *node) work(ctx context.Context, permits *permit.Permits, name string) {
	client := &http.Client{Transport: &http.Transport{}}
	for i := 0; ctx.Err() == nil; i++ {
		wait, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := permits.Do(wait, "iss_1", func(ctx context.Context) error { return n.call(ctx, client, fmt.Sprintf("%s-%d", name, i)) })
		cancel()
		if err == nil || !fault.Is(err, fault.RateLimited) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (n *node) call(ctx context.Context, client *http.Client, id string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, n.CA, nil)
	if err != nil {
		return err
	}
	leader, _ := n.node.Leader()
	r.Header.Set(headerNode, n.ID)
	r.Header.Set(headerCall, id)
	r.Header.Set(headerBegun, strconv.FormatInt(time.Now().UnixNano(), 10))
	r.Header.Set(headerLeader, leader)
	resp, err := client.Do(r)
	if err != nil {
		n.gone(client, id)
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusTooManyRequests {
		return nil
	}
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil {
		return err
	}
	return fault.Limited(time.Now().Add(time.Duration(seconds)*time.Second), "the issuer wants to be left alone")
}

// gone waits until the issuer has noticed that a call was given up. A call counts until its function returns.
func (n *node) gone(client *http.Client, id string) {
	for range 100 {
		r, err := http.NewRequest(http.MethodGet, n.CA, nil)
		if err != nil {
			return
		}
		r.Header.Set(headerCall, id)
		resp, err := client.Do(r)
		if err != nil {
			return
		}
		said, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(said) == "false" {
			return
		}
	}
}

// route implements permit.Leaser: it asks who leads.
type route struct{ *node }

// Lease implements permit.Leaser.
func (n route) Lease(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	switch leader, _ := n.node.node.Leader(); leader {
	case "":
		return nil, fault.New(fault.Retryable, "nobody leads")
	case n.ID:
		return n.leader.Lease(ctx, n.ID, r)
	default:
		return n.mesh.AskLease(ctx, leader, r)
	}
}

// answers implements link.Members.
type answers struct{ *node }

func (a answers) Peers(ctx context.Context, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	return a.node.node.Peers(ctx, r)
}

func (a answers) Join(ctx context.Context, id string, r *clusterpb.JoinRequest) error {
	return a.node.node.Join(ctx, id, r)
}

func (a answers) Remove(ctx context.Context, id string) error { return a.node.node.Remove(ctx, id) }

func (a answers) Lease(ctx context.Context, id string, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	return a.leader.Lease(ctx, id, r)
}

// dialer implements cluster.Dialer.
type dialer struct{ m *link.Mesh }

func (d dialer) Peers(ctx context.Context, address string, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	return d.m.AskPeers(ctx, address, r)
}

func (d dialer) Join(ctx context.Context, address string, r *clusterpb.JoinRequest) error {
	return d.m.AskJoin(ctx, address, r)
}

// late is the log of a node that starts.
type late struct{ n *node }

func (l late) Propose(ctx context.Context, c *clusterpb.Command) error {
	return l.n.node.Propose(ctx, c)
}
func (l late) Leases() []*clusterpb.PermitLease { return l.n.node.Leases() }
func (l late) Pauses() []*clusterpb.PauseIssuer { return l.n.node.Pauses() }
func (l late) LastLeaseID() uint64              { return l.n.node.LastLeaseID() }

// deaf implements link.Handler.
type deaf struct{}

func (deaf) Wake([]string)                       {}
func (deaf) Changed([]*clusterpb.Resource, bool) {}
func (deaf) Disconnect(string, string)           {}
func (deaf) PushState(string)                    {}
func (deaf) Trigger(string)                      {}
func (deaf) Resync(string)                       {}
