package node

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMayGoOn(t *testing.T) {
	t.Parallel()
	lag := []RolloverLag{{Name: "web1"}}
	for name, c := range map[string]struct {
		judge func(RolloverProgress, int) error
		p     RolloverProgress
		force int
		want  string // empty: allowed
	}{
		"all acknowledged":         {mayActivate, RolloverProgress{Agents: 3, TokensTotal: 9}, 0, ""},
		"one has not":              {mayActivate, RolloverProgress{Agents: 3, Lagging: 2, Lags: lag}, 0, "2 of 3 agents"},
		"forced":                   {mayActivate, RolloverProgress{Agents: 3, Lagging: 2, Lags: lag}, 2, ""},
		"more than forced":         {mayActivate, RolloverProgress{Agents: 3, Lagging: 2, Lags: lag}, 1, "--force 2"},
		"nobody vouches":           {mayActivate, RolloverProgress{Agents: 3, Lagging: 2, Lags: lag}, 0, "will have to join again"},
		"somebody vouches":         {mayActivate, RolloverProgress{Agents: 3, Lagging: 2, Lags: lag, Mesh: domain.Mesh{CA: domain.CA{Vouched: [][]byte{{1}}}}}, 0, "can still come back"},
		"all moved":                {mayFinish, RolloverProgress{Agents: 3}, 0, ""},
		"one depends":              {mayFinish, RolloverProgress{Agents: 3, Lagging: 1, Lags: lag}, 0, "web1"},
		"a token names it":         {mayFinish, RolloverProgress{Agents: 3, TokensTotal: 1, Tokens: []domain.JoinToken{{ID: "jt_1"}}}, 0, "jt_1"},
		"both":                     {mayFinish, RolloverProgress{Agents: 3, Lagging: 1, Lags: lag, TokensTotal: 1}, 1, "--force 2"},
		"both, forced":             {mayFinish, RolloverProgress{Agents: 3, Lagging: 1, Lags: lag, TokensTotal: 1}, 2, ""},
		"a negative force is none": {mayFinish, RolloverProgress{}, -1, "force"},
	} {
		err := c.judge(c.p, c.force)
		if c.want == "" && err != nil || c.want != "" && (!fault.Is(err, fault.Conflict) && !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// accepted says whether a client that trusts roots alone accepts what the node shows.
func accepted(t *testing.T, n *Node, roots ...[]byte) error {
	t.Helper()
	pool := x509.NewCertPool()
	for _, r := range roots {
		c, err := x509.ParseCertificate(r)
		if err != nil {
			t.Fatal(err)
		}
		pool.AddCert(c)
	}
	c, err := tls.Dial("tcp", n.Addresses().Mesh, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"h2"}})
	if err != nil {
		return err
	}
	return c.Close()
}

// A running node follows every step by itself, and shows what both those of the former root and those of the next accept
// until the end.
func TestNodeFollowsARollover(t *testing.T) {
	t.Parallel()
	n := startDev(t, t.TempDir(), map[string]string{"node.names": "localhost"})
	cfg := *n.opts.Configuration
	ctx := t.Context()
	until := func(what string, ok func() bool) {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for !ok() {
			if time.Now().After(deadline) {
				t.Fatalf("waited in vain until %s", what)
			}
			n.trust.look()
			<-time.After(10 * time.Millisecond)
		}
	}
	former := n.mesh().Root().Raw
	p, err := StartRollover(ctx, &cfg)
	if err != nil {
		t.Fatal(err)
	}
	next := p.Mesh.Roots[1]
	until("both roots are trusted", func() bool { return n.trust.revision.Load() == p.Mesh.Revision })
	if n.mesh().Generation() != 1 || accepted(t, n, former) != nil || accepted(t, n, next) == nil {
		t.Errorf("started: generation %d signs; former root: %v, next: %v", n.mesh().Generation(), accepted(t, n, former), accepted(t, n, next))
	}
	if p, err = ActivateRollover(ctx, &cfg, 0); err != nil {
		t.Fatal(err)
	}
	until("the next CA signs", func() bool { return n.trust.revision.Load() == p.Mesh.Revision })
	if n.mesh().Generation() != 2 || accepted(t, n, former) != nil || accepted(t, n, next) != nil {
		t.Errorf("activated: generation %d signs; former root: %v, next: %v", n.mesh().Generation(), accepted(t, n, former), accepted(t, n, next))
	}
	if chain := n.trust.certificate().Certificate; len(chain) != 4 || sha256.Sum256(chain[3]) != sha256.Sum256(next) {
		t.Errorf("activated: %d certificates are shown", len(chain))
	}
	formerKey, _ := strings.CutPrefix(p.Rollover.Other.KeyURI, "sealed:")
	if p, err = FinishRollover(ctx, &cfg, 0); err != nil {
		t.Fatal(err)
	}
	until("the former root is dropped", func() bool { return n.trust.revision.Load() == p.Mesh.Revision })
	if accepted(t, n, former) == nil || accepted(t, n, next) != nil || len(n.trust.certificate().Certificate) != 2 {
		t.Errorf("finished: former root: %v, next: %v", accepted(t, n, former), accepted(t, n, next))
	}
	if _, err := n.store.SealedKey(ctx, formerKey); formerKey == "" || !fault.Is(err, fault.NotFound) {
		t.Errorf("the former key %q is kept: %v", formerKey, err)
	}
}
