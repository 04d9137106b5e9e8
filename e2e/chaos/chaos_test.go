package chaos

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

func TestMain(m *testing.M) { estatetest.Main(m) }

const (
	defaultRounds = 10
	// maxCertificates bounds an estate; once reached, rounds renew.
	maxCertificates = 6
	// countEvery is after how many rounds all is brought to rest and counted.
	countEvery = 5
	// perRound is far more than a round takes on a busy machine.
	perRound = 30 * time.Second
)

func number(t *testing.T, name string, fallback uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		t.Fatalf("%s=%q is not a number", name, text)
	}
	return n
}

func TestChaos(t *testing.T) {
	t.Parallel()
	rounds := int(number(t, "CERTMESH_CHAOS_ROUNDS", defaultRounds))
	seed := number(t, "CERTMESH_CHAOS_SEED", rand.Uint64()>>1)
	for i, engine := range []string{"SQLite", "PostgreSQL"} {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			t.Logf("%s=%d repeats the moments of this run, as far as the machine does", "CERTMESH_CHAOS_SEED", seed)
			storm(t, engine, (rounds+1-i)/2, rand.New(rand.NewPCG(seed, uint64(i))))
		})
	}
}

// run is one storm over one estate.
type run struct {
	*estatetest.Lab
	env    []string
	random *rand.Rand
	agents map[string]*host
	names  []string // of the agents
	roots  string
	// certs are the certificates whose orders were acknowledged, with their targets.
	certs []*cert
	kills map[string]int
}

type host struct {
	agent *estate.Process
	id    string
}

type cert struct {
	name    string
	targets []placed
}

// placed is where a certificate is to be seen: at a site or in a file.
type placed struct {
	target, agent string
	site          *estate.Site
	path          string
}

func storm(t *testing.T, engine string, rounds int, random *rand.Rand) {
	l := estatetest.NewFor(t, time.Duration(rounds)*perRound+estatetest.Patience)
	r := &run{Lab: l, random: random, agents: map[string]*host{}, names: []string{"one", "two"}, kills: map[string]int{}}
	// Safety nets and back-offs are not what is tried; waiting for them would only take time.
	r.env = []string{"CERTMESH_SCHEDULER_RETRY_INTERVAL=1s", "CERTMESH_SCHEDULER_JOB_PROCESSOR_INTERVAL=1s"}
	if engine == "PostgreSQL" {
		dsn, stop, err := r.StartPostgres(r.Ctx)
		r.OK(err)
		t.Cleanup(stop)
		r.env = append(r.env, "CERTMESH_STORE_DSN="+dsn)
	}
	r.StartServer(r.env...)
	for _, name := range r.names {
		p, a := r.Join(estate.AgentOptions{Name: name})
		r.agents[name] = &host{p, a.ID}
	}
	r.roots = estate.SelfSigned(r.Issuer("ca").ChainPEM)
	r.orderAtSites()
	for n := range rounds {
		r.round(n)
		if n%countEvery == countEvery-1 || n == rounds-1 {
			r.count()
		}
	}
	t.Logf("%d rounds, %d certificates, killed: %v", rounds, len(r.certs), r.kills)
}

// orderAtSites orders the certificate that both agents place at a TLS server.
func (r *run) orderAtSites() {
	c := &cert{name: "sites"}
	args := []string{"certs", "create", c.name, "--dns", "sites.example.test", "--issuer", "ca"}
	for _, name := range r.names {
		site, err := r.StartBuiltin(name, "site", "sites.example.test")
		r.OK(err)
		r.T.Cleanup(site.Stop)
		r.Do(site.TargetArgs("site-"+name, name)...)
		c.targets = append(c.targets, placed{target: "site-" + name, agent: name, site: site})
		args = append(args, "--target", "site-"+name)
	}
	r.Do(args...)
	r.certs = append(r.certs, c)
}

// round gives the estate something to do and kills a part of it meanwhile.
func (r *run) round(n int) {
	r.T.Helper()
	var work func(context.Context) error
	if len(r.certs) < maxCertificates && (n%2 == 0 || len(r.certs) == 1) {
		work = r.order(n)
	} else {
		work = r.renew()
	}
	victims := r.victims()
	// Most of what can be interrupted happens in the first half second.
	moment := time.Duration(r.random.Int64N(int64(700 * time.Millisecond)))
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { err = work(r.Ctx) })
	t := time.NewTimer(moment)
	<-t.C
	for _, v := range victims {
		r.kills[v]++
		if v == "server" {
			r.Server.Kill()
		} else {
			r.agents[v].agent.Kill()
		}
	}
	for _, v := range victims {
		if v == "server" {
			r.StartServer(r.env...)
			continue
		}
		p, serr := r.StartAgent(estate.AgentOptions{Name: v})
		r.OK(serr)
		r.agents[v].agent = p
	}
	wg.Wait()
	r.OK(err)
}

func (r *run) victims() []string {
	switch d := r.random.IntN(10); {
	case d < 4:
		return []string{"server"}
	case d < 8:
		return []string{r.names[r.random.IntN(len(r.names))]}
	case d < 9:
		return append([]string{"server"}, r.names...)
	default:
		return r.names
	}
}

// order returns the work of ordering a new certificate, placed by two files on one or two agents.
func (r *run) order(n int) func(context.Context) error {
	c := &cert{name: fmt.Sprintf("cert-%d", n)}
	for i := range 2 {
		agent := r.names[r.random.IntN(len(r.names))]
		target := fmt.Sprintf("%s-%d", c.name, i)
		p := placed{target: target, agent: agent, path: filepath.Join(r.SiteDir(agent), target+".pem")}
		c.targets = append(c.targets, p)
		r.Do("targets", "create", target, "--agent", agent, "--kind", "file", "--settings", fmt.Sprintf(`{"pem_path":%q}`, p.path))
	}
	r.certs = append(r.certs, c)
	args := []string{"certs", "create", c.name, "--dns", c.name + ".example.test", "--issuer", "ca", "--request-id", c.name,
		"--target", c.targets[0].target, "--target", c.targets[1].target}
	return func(ctx context.Context) error { return r.insist(ctx, args...) }
}

// renew returns the work of renewing a certificate that is there. Said again, it may renew once more.
func (r *run) renew() func(context.Context) error {
	c := r.certs[r.random.IntN(len(r.certs))]
	return func(ctx context.Context) error { return r.insist(ctx, "certs", "renew", c.name) }
}

// insist makes a call until it is answered, as a script that looks at the exit status would.
func (r *run) insist(ctx context.Context, args ...string) error {
	return estate.Wait(ctx, "an answer to "+strings.Join(args, " "), func(ctx context.Context) error {
		_, err := r.CLI(ctx, append(args, "--timeout", "5s")...)
		var ce *estate.CLIError
		if errors.As(err, &ce) && ce.Code == 2 {
			return estate.Stop(err)
		}
		return err
	})
}

// count waits until all is at rest and checks what must then be so.
func (r *run) count() {
	r.T.Helper()
	for _, c := range r.certs {
		r.Current(c.name)
	}
	r.Quiet()
	found, err := r.Certificates(r.Ctx)
	r.OK(err)
	if len(found) != len(r.certs) {
		r.T.Errorf("%d certificates were ordered, %d are there", len(r.certs), len(found))
	}
	serials := map[string]string{}
	for _, c := range r.certs {
		r.countOne(c, serials)
	}
	if r.T.Failed() {
		r.T.FailNow()
	}
}

func (r *run) countOne(c *cert, serials map[string]string) {
	r.T.Helper()
	now := r.Current(c.name)
	leaves := map[string]estate.Leaf{} // by agent's id
	for _, l := range now.Leaves {
		leaves[l.AgentID] = l
		if l.Generation != l.OrderedGeneration {
			r.T.Errorf("%s at %s: nothing is open, but generation %d was ordered and %d is held", c.name, l.AgentID, l.OrderedGeneration, l.Generation)
		}
	}
	of := map[string]bool{}
	for _, v := range r.Versions(c.name) {
		key := fmt.Sprintf("%s generation %d at %s", c.name, v.Generation, v.AgentID)
		if of[key] {
			r.T.Errorf("two leaves of %s", key)
		}
		of[key] = true
		if other := serials[v.Serial]; other != "" {
			r.T.Errorf("the serial %s is of %s and of %s", v.Serial, other, key)
		}
		serials[v.Serial] = key
	}
	for _, p := range c.targets {
		leaf := leaves[r.agents[p.agent].id]
		seen, err := p.look(r.Ctx, r.roots)
		switch {
		case err != nil:
			r.T.Errorf("%s at %s: %v", c.name, p.target, err)
		case seen != leaf.Serial:
			r.T.Errorf("%s at %s: %s is seen, %s is wanted", c.name, p.target, seen, leaf.Serial)
		}
		r.Keys(p.agent, now.ID, 1)
	}
}

// look returns the serial that is to be seen at a placement.
func (p placed) look(ctx context.Context, roots string) (string, error) {
	if p.site != nil {
		leaf, err := estate.Trusted(ctx, p.site.Addr, p.site.Host, roots)
		if err != nil {
			return "", err
		}
		return estate.Serial(leaf), nil
	}
	pair, err := tls.LoadX509KeyPair(p.path, p.path)
	if err != nil {
		return "", err
	}
	return estate.Serial(pair.Leaf), nil
}
