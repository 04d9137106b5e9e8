package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/chaos/history"
	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
)

const (
	nodes  = 3
	agents = 3
	// short is how long faults and operations last unless a number of minutes is given.
	short = 25 * time.Second
	// perMinute is how many certificates may be ordered in a minute; clients take them faster while they last.
	perMinute = 60
	// rest is within how long all must have come to rest when nothing is done any more: the longest back-off of a
	// deployment, and room for a machine that does much else.
	rest = 3 * time.Minute
)

// trial is a cluster on which clients work while the nemesis rages.
type trial struct {
	*estatetest.Lab
	*estate.Cluster
	shelf

	seed     uint64
	recorder *history.Recorder
	began    time.Time
	issuer   string // the id of the one CA
	agents   []*subject
	targets  map[string][]string // the targets' ids of each certificate that may be ordered, by name
	paths    map[string]string   // of targets, by id
	mu       sync.Mutex
	hits     map[string]int
}

// subject is an agent that is killed and started again.
type subject struct {
	name    string
	process *estate.Process
}

// TestCluster is the chaos suite of the cluster: see the package's documentation.
func TestCluster(t *testing.T) {
	t.Parallel()
	lasts := short
	if minutes := number(t, "CERTMESH_CHAOS_MINUTES", 0); minutes > 0 {
		lasts = time.Duration(minutes) * time.Minute
	}
	s := &trial{seed: number(t, "CERTMESH_CHAOS_SEED", rand.Uint64()>>1), targets: map[string][]string{}, paths: map[string]string{}, hits: map[string]int{}}
	t.Logf("CERTMESH_CHAOS_SEED=%d repeats the faults and operations of this run, as far as the machine does", s.seed)
	s.Lab = estatetest.NewFor(t, lasts+rest+estatetest.Patience)
	s.build(max(1, int(lasts.Minutes()*perMinute)))

	file, err := os.Create(s.Path("history.jsonl"))
	s.OK(err)
	s.began = time.Now()
	s.recorder = history.NewRecorder(file, s.since)
	var users sync.WaitGroup
	working, stop := context.WithCancel(s.Ctx)
	raging, enough := context.WithTimeout(s.Ctx, lasts)
	for i := range clients {
		u := s.newUser(i)
		users.Go(func() { defer u.close(); u.work(working) })
	}
	err = s.rage(raging, plan(s.seeded(1), lasts, nodes, agents))
	enough()
	stop()
	users.Wait()
	s.OK(err)
	s.settle()
	end := s.state()
	events, err := s.recorder.Events()
	s.OK(err)
	s.OK(file.Close())
	violations := history.Check(events, end)
	for _, v := range violations {
		t.Errorf("%s", v)
	}
	if t.Failed() {
		s.keep(end)
	}
	s.tally(events)
	t.Logf("%d operations, %d certificates, %d versions, %d jobs, %d duties taken, faults: %v", len(events)/2, len(end.Certificates),
		len(end.Versions), len(end.Jobs), len(end.Duties), s.hits)
}

// tally logs how operations ended, and fails a run in which too little was done to prove anything.
func (s *trial) tally(events []history.Event) {
	s.T.Helper()
	outcomes, refusals := map[string]int{}, map[string]int{}
	for _, e := range events {
		if e.Phase != history.Invoke {
			outcomes[string(e.Kind)+" "+string(e.Phase)]++
		}
		if e.Phase == history.Fail {
			refusals[string(e.Kind)+": "+e.Error]++
		}
	}
	s.T.Logf("outcomes: %v", outcomes)
	for text, n := range refusals {
		if strings.HasPrefix(text, string(history.Order)) || n > len(events)/100 {
			s.T.Logf("refused %d times: %s", n, text)
		}
	}
	for _, kind := range []history.Kind{history.Order, history.Renew, history.Read} {
		if outcomes[string(kind)+" ok"] == 0 {
			s.T.Errorf("of no operation %q anything was heard but errors", kind)
		}
	}
}

func (s *trial) since() time.Duration { return time.Since(s.began) }

// seeded is a source of its own for each part of a run, so that one does not shift the others.
func (s *trial) seeded(part int) *rand.Rand {
	return rand.New(rand.NewPCG(s.seed, uint64(part)))
}

func (s *trial) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hits[what]++
}

// build starts nodes and agents behind a network that can be cut, and makes the targets of n certificates.
func (s *trial) build(n int) {
	s.T.Helper()
	network := estate.NewNetwork()
	s.T.Cleanup(network.Close)
	var err error
	s.Cluster, err = s.NewClusterOf(s.Ctx, estate.ClusterOptions{Nodes: nodes, Durable: true, Network: network,
		// The duties keep their intervals of minutes and hours: a trigger that is lost shows as work that is not done. Only the
		// net under wake-ups is drawn tighter than 30 seconds.
		Env: []string{"CERTMESH_SCHEDULER_JOB_PROCESSOR_INTERVAL=10s"}})
	s.OK(err)
	s.T.Cleanup(s.CloseCluster)
	s.OK(s.StartAll(s.Ctx))
	s.issuer = s.Issuer("ca").ID
	for i := range agents {
		a := &subject{name: fmt.Sprintf("host-%d", i+1)}
		s.agents = append(s.agents, a)
		token, err := s.Token(s.Ctx)
		s.OK(err)
		s.OK(s.startAgent(a, token))
		_, err = s.WaitAgent(s.Ctx, a.process, a.name, "Online")
		s.OK(err)
	}
	s.makeTargets(n)
}

func (s *trial) startAgent(a *subject, token ...string) error {
	p, err := s.StartAgent(estate.AgentOptions{Name: a.name, Token: strings.Join(token, ""), Env: []string{"CERTMESH_SERVER_URL=" + s.MeshAddresses()}})
	if err != nil {
		return err
	}
	a.process = p
	s.Network.Party(a.name, p.PID)
	return nil
}

// makeTargets makes files on one or two agents for each certificate.
func (s *trial) makeTargets(n int) {
	s.T.Helper()
	p, err := client.LoadProfile(s.Nodes[0].Path(s.Nodes[0].ID, "client.yaml"))
	s.OK(err)
	c, err := client.New(client.Config{Server: p.ServerURL, Key: p.APIKey, CA: p.CACertificate, Timeout: time.Minute, Version: "chaos", Now: time.Now})
	s.OK(err)
	defer func() { _ = c.Close() }() // nothing is on its way
	random := s.seeded(2)
	for i := range n {
		name := fmt.Sprintf("cert-%03d", i)
		for k := range 1 + random.IntN(2) {
			agent := s.agents[(i+k)%agents].name
			target := fmt.Sprintf("%s-%d", name, k)
			path := filepath.Join(s.SiteDir(agent), target+".pem")
			r, err := c.Targets.CreateTarget(s.Ctx, &operatorpb.CreateTargetRequest{Name: target, Agent: agent, Kind: "file", SettingsJson: fmt.Sprintf(`{"pem_path":%q}`, path)})
			s.OK(err)
			s.targets[name] = append(s.targets[name], r.GetTarget().GetId())
			s.paths[r.GetTarget().GetId()] = path
		}
		s.names = append(s.names, name)
	}
}
