package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// memoryWire is an agent's stream without a network: everything from the handler on is the product's.
type memoryWire struct {
	grpc.ServerStream
	ctx context.Context
	in  chan *agentpb.ConnectRequest
	out chan *agentpb.ConnectResponse
	err error // valid once ctx has ended
}

func (w *memoryWire) Context() context.Context { return w.ctx }

func (w *memoryWire) Recv() (*agentpb.ConnectRequest, error) {
	select {
	case m, ok := <-w.in:
		if !ok {
			return nil, io.EOF
		}
		return m, nil
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	}
}

func (w *memoryWire) Send(m *agentpb.ConnectResponse) error {
	select {
	case w.out <- m:
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
}

// raceAgent is an enrolled host of the real store.
type raceAgent struct {
	id     string
	peer   *peer.Peer
	stream *memoryWire
}

// connect opens a stream at a node; Hello has not been said.
func (a *raceAgent) connect(ctx context.Context, wg *sync.WaitGroup, s *Server) *memoryWire {
	ctx, cancel := context.WithCancel(peer.NewContext(ctx, a.peer))
	w := &memoryWire{ctx: ctx, in: make(chan *agentpb.ConnectRequest, 4), out: make(chan *agentpb.ConnectResponse, 64)}
	wg.Go(func() {
		defer cancel()
		w.err = s.Connect(w)
	})
	return w
}

type noIssuer struct{}

func (noIssuer) Issue(context.Context, issue.Request) (issue.Outcome, error) {
	return issue.Outcome{}, fault.New(fault.Retryable, "nothing is issued here")
}

// TestWakeUpRacesHello: ten thousand times an agent says Hello at one node while a job for it is committed at the same or
// another one, with its former stream still there, gone, or going. Every job arrives; no net sweeps for those that would
// not. With the race detector they are fewer.
func TestWakeUpRacesHello(t *testing.T) {
	t.Parallel()
	const groups, size = 4, 25
	rounds := raceRounds
	if testing.Short() {
		rounds = 10
	}
	w := storetest.NewWorld(t, storetest.Engines(t)[0])
	mesh := newMesh(t, time.Now())
	root := [][]byte{mesh.Root().Raw}
	if _, err := w.S.InstallCA(t.Context(), domain.CA{ID: domain.MeshCA, Chain: root, KeyURI: "sealed:none"}, nil, root, w.Op()); err != nil {
		t.Fatal(err)
	}
	var servers [2]*Server
	for i := range servers {
		s, err := New(Config{NodeID: fmt.Sprint("node-", i), TrustDomain: testDomain, Store: w.S, Mesh: func() *ca.Authority { return mesh },
			Issue: noIssuer{}, Hub: hub.New(), Clock: clockwork.NewRealClock(), Log: slog.New(slog.DiscardHandler), NewID: id.New, Handshakes: 64,
			RemoteWake: func(node string, agentIDs []string) {
				if other := servers[1-i]; node == "" || node == other.cfg.NodeID {
					other.WakeHeld(agentIDs)
				}
			}})
		if err != nil {
			t.Fatal(err)
		}
		servers[i] = s
	}
	ctx, cancel := context.WithCancel(context.Background())
	var streams, all sync.WaitGroup
	defer func() {
		cancel()
		streams.Wait()
		stop, end := context.WithTimeout(context.Background(), patience)
		defer end()
		for _, s := range servers {
			if err := s.Stop(stop); err != nil {
				t.Error(err)
			}
		}
	}()
	var done atomic.Int64
	for n := range groups {
		duty := w.Duty(t, fmt.Sprint("renew", n))
		var agents []*raceAgent
		var due []domain.NewJob
		for range size {
			a := newRaceAgent(t, w, mesh, fmt.Sprintf("web%d-%d", n, len(agents)))
			c, first := w.Order(t, "c."+a.id+".test", domain.Policy{}, w.Target(t, a.id, "t"+a.id).ID)
			if _, err := w.S.CancelJob(t.Context(), first[0].ID, w.Op()); err != nil {
				t.Fatal(err)
			}
			agents = append(agents, a)
			due = append(due, domain.NewJob{CertificateID: c.ID, AgentID: a.id, Reason: "race"})
		}
		all.Go(func() {
			rnd := mrand.New(mrand.NewPCG(uint64(n), 1))
			for r := range rounds {
				jobs := make(chan map[string]string, 1)
				creator := servers[rnd.IntN(2)]
				create := func() {
					made, err := w.S.CreateLeafJobs(ctx, duty, due, w.Op())
					ids := map[string]string{}
					for i, m := range made {
						err = errors.Join(err, m.Err)
						ids[due[i].AgentID] = m.Job.ID
					}
					if err != nil {
						t.Error(err)
					}
					for _, a := range agents {
						creator.Wake(a.id)
					}
					jobs <- ids
				}
				early := rnd.IntN(size + 1) // so many say Hello before the creation is begun
				for i, a := range agents {
					if i == early {
						go create()
					}
					former := a.stream
					a.stream = a.connect(ctx, &streams, servers[rnd.IntN(2)])
					if former != nil && rnd.IntN(2) == 0 {
						close(former.in)
					}
					// One credit: a former stream has none left, and would not notice by dispatching that it is stale.
					a.stream.in <- hello(credits([]int32{1, 16}[rnd.IntN(2)], 0))
				}
				if early == size {
					go create()
				}
				ids := <-jobs
				for _, a := range agents {
					job := ids[a.id]
					if job == "" || !a.stream.assigned(t, job, fmt.Sprintf("agent %s round %d", a.id, r)) {
						return
					}
					a.stream.in <- failedWith(job, 1, fault.Rejected, "it was only a race")
				}
				for _, a := range agents {
					if !a.stream.settled(t, ids[a.id]) {
						return
					}
					done.Add(1)
				}
			}
		})
	}
	all.Wait()
	if got := int(done.Load()); got != groups*size*rounds && !t.Failed() {
		t.Errorf("%d races of %d", got, groups*size*rounds)
	}
}

// assigned waits for the assignment of the job.
func (w *memoryWire) assigned(t *testing.T, job, which string) bool {
	return w.await(t, which+": the job was not loaded and nobody woke its agent", func(m *agentpb.ConnectResponse) bool { return m.GetAssignment().GetId() == job })
}

func (w *memoryWire) settled(t *testing.T, job string) bool {
	return w.await(t, job+" is not settled", func(m *agentpb.ConnectResponse) bool { return m.GetSettled().GetId() == job })
}

func (w *memoryWire) await(t *testing.T, late string, good func(*agentpb.ConnectResponse) bool) bool {
	deadline := time.NewTimer(3 * patience) // the machine may have other things to do than races
	defer deadline.Stop()
	for {
		select {
		case m := <-w.out:
			if good(m) {
				return true
			}
		case <-w.ctx.Done():
			t.Errorf("%s: the stream ended: %v", late, w.err)
			return false
		case <-deadline.C:
			t.Error(late)
			return false
		}
	}
}

func newRaceAgent(t *testing.T, w *storetest.World, mesh *ca.Authority, name string) *raceAgent {
	t.Helper()
	a := w.Agent(t, name)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, identity := sign(t, mesh, ca.KindAgent, a.ID, key, time.Now(), time.Hour)
	identity.AgentID = a.ID
	if err := w.S.RecordIdentity(t.Context(), identity, w.Op()); err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return &raceAgent{id: a.ID, peer: &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf}}}}}}
}
