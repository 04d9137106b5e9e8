package cluster

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	// The driver by the name "pgx".
	_ "github.com/jackc/pgx/v5/stdlib"
	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/e2e/bench/streams"
	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
)

const (
	issuer      = "bench"
	callTimeout = time.Minute
	// grain is how often a condition is looked at whose time is measured.
	grain = 5 * time.Millisecond
)

// figure is one result of a measurement.
type figure struct {
	unit  string
	value float64
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the q-th of all, which it sorts.
func quantile(all []time.Duration, q float64) time.Duration {
	slices.Sort(all)
	return all[min(int(q*float64(len(all))), len(all)-1)]
}

// scene is a cluster with an operator at each node and a look into the database past them.
type scene struct {
	*estate.Cluster
	estate *estate.Estate
	bin    string
	dir    string
	debug  map[*estate.ClusterNode]string
	ops    map[*estate.ClusterNode]*client.Client
	db     *sql.DB
	server int // process id of PostgreSQL
	swarms []*streams.Swarm
}

// open starts n nodes below dir, waits until they are whole, and makes an issuer.
func open(ctx context.Context, bin, dir string, n int) (_ *scene, err error) {
	e, err := estate.New(estate.Config{Dir: dir, Bin: bin})
	if err != nil {
		return nil, err
	}
	s := &scene{estate: e, bin: bin, dir: dir, debug: map[*estate.ClusterNode]string{}, ops: map[*estate.ClusterNode]*client.Client{}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.Cluster, err = e.NewCluster(ctx, n); err != nil {
		return nil, err
	}
	addrs, err := estate.FreeAddrs(n)
	if err != nil {
		return nil, err
	}
	for i, m := range s.Nodes {
		s.debug[m] = addrs[i]
		m.AddEnv("CERTMESH_LISTEN_DEBUG=" + addrs[i])
	}
	if err := s.StartAll(ctx); err != nil {
		return nil, err
	}
	for _, m := range s.Nodes {
		if s.ops[m], err = operator(s.profile(m)); err != nil {
			return nil, err
		}
	}
	if s.db, err = sql.Open("pgx", s.DSN); err != nil {
		return nil, err
	}
	s.db.SetMaxOpenConns(1)
	if s.server, err = s.postmaster(ctx); err != nil {
		return nil, err
	}
	if err := s.whole(ctx); err != nil {
		return nil, err
	}
	_, err = s.ops[s.Nodes[0]].Issuers.CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: issuer, Kind: "local"})
	return s, err
}

// profile is the file of the command line's profile for a node.
func (s *scene) profile(m *estate.ClusterNode) string { return m.Path(m.ID, "client.yaml") }

func operator(profile string) (*client.Client, error) {
	p, err := client.LoadProfile(profile)
	if err != nil {
		return nil, err
	}
	addr, err := client.Address(p.ServerURL)
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{Server: addr, Key: p.APIKey, CA: p.CACertificate, Timeout: callTimeout, Version: "bench", Now: time.Now})
}

func (s *scene) close() {
	for _, w := range s.swarms {
		w.Stop(30 * time.Second)
	}
	for _, op := range s.ops {
		_ = op.Close() // nothing is under way
	}
	if s.db != nil {
		_ = s.db.Close() // it goes with its server
	}
	if s.Cluster != nil {
		s.CloseCluster()
	}
	s.estate.Close()
}

// swarm starts so many agents with a target each at the nodes given and waits until all are connected.
func (s *scene) swarm(ctx context.Context, servers string, agents int) (*streams.Swarm, error) {
	w, err := streams.StartSwarm(ctx, s.bin, s.dir, "--server", servers, "--operator", s.profile(s.Nodes[0]), "--name", fmt.Sprintf("swarm%d", len(s.swarms)),
		"--agents", fmt.Sprint(agents), "--targets-per-agent", "1")
	if err != nil {
		return nil, err
	}
	s.swarms = append(s.swarms, w)
	_, err = w.Wait(ctx, "all to join", func(st streams.SwarmStatus) bool { return st.AllConnected > 0 })
	return w, err
}

// whole waits until every node runs, votes, has applied the same and is linked to all others, and one of them leads.
func (s *scene) whole(ctx context.Context) error {
	return s.until(ctx, "the nodes to be whole", func(ctx context.Context) error {
		leaders := 0.0
		var applied []float64
		for _, m := range s.Nodes {
			v, err := streams.Metrics(ctx, m.Estate)
			if err != nil {
				return err
			}
			leaders += v["certmesh_raft_leader"]
			applied = append(applied, v["certmesh_raft_applied_index"])
			if voters, up := v[`certmesh_raft_members{suffrage="voter"}`], v["certmesh_link_up"]; int(voters) != len(s.Nodes) || int(up) != len(s.Nodes)-1 {
				return fmt.Errorf("%s sees %v voters and %v links", m.ID, voters, up)
			}
		}
		if leaders != 1 || slices.Min(applied) != slices.Max(applied) {
			return fmt.Errorf("%v nodes lead, and have applied %v", leaders, applied)
		}
		return nil
	})
}

// until is estate.Wait with a pause that does not grow.
func (s *scene) until(ctx context.Context, what string, holds func(context.Context) error) error {
	for {
		err := holds(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for %s: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// leader is the node that says it leads.
func (s *scene) leader(ctx context.Context) (*estate.ClusterNode, error) {
	for _, m := range s.Nodes {
		v, err := streams.Metrics(ctx, m.Estate)
		if err != nil {
			return nil, err
		}
		if v["certmesh_raft_leader"] == 1 {
			return m, nil
		}
	}
	return nil, errors.New("no node leads")
}

func (s *scene) others(m *estate.ClusterNode) []*estate.ClusterNode {
	return slices.DeleteFunc(slices.Clone(s.Nodes), func(o *estate.ClusterNode) bool { return o == m })
}

// settled waits until no job is open and no placement is other than it should be. It asks the database, so that nothing that
// is counted at the nodes comes of it.
func (s *scene) settled(ctx context.Context) error {
	return s.until(ctx, "all jobs to end", func(ctx context.Context) error {
		var jobs, due int
		err := s.db.QueryRowContext(ctx, "SELECT (SELECT count(*) FROM job WHERE finished_at IS NULL), (SELECT count(*) FROM placement WHERE due_at IS NOT NULL)").Scan(&jobs, &due)
		if err == nil && jobs+due > 0 {
			err = fmt.Errorf("%d jobs are open and %d placements lag", jobs, due)
		}
		return err
	})
}

// order makes a target and a certificate on an agent at a node, waits until it is in place, and returns its id.
func (s *scene) order(ctx context.Context, m *estate.ClusterNode, agent, pem string) (string, error) {
	op := s.ops[m]
	_, err := op.Targets.CreateTarget(ctx, &operatorpb.CreateTargetRequest{Name: agent, Agent: agent, Kind: "file", SettingsJson: fmt.Sprintf("{%q: %q}", "pem_path", pem)})
	if err != nil && client.Code(err) != codes.AlreadyExists {
		return "", err
	}
	r, err := op.Certificates.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: agent, Issuer: issuer, Profile: "tls-server",
		Names: &operatorpb.Names{Dns: []string{agent + ".example.test"}}, Targets: []string{agent}, RequestId: agent})
	if err != nil {
		return "", err
	}
	return r.GetCertificate().GetId(), s.settled(ctx)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
