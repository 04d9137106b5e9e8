package renewals

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
)

const (
	issuer      = "bench"
	callTimeout = time.Minute
	// callers is how many calls of the operator run at once.
	callers = 32
	// askEvery is the grain of a latency. Asking takes processor time from what is measured, so it begins askFrom of the
	// shortest latency so far after the call.
	askEvery = 2 * time.Millisecond
	askFrom  = 0.7
)

// scene is a control plane with an operator.
type scene struct {
	*estate.Estate
	op       *client.Client
	server   *estate.Process
	agent    *estate.Process // the first that joined
	debug    string
	profiles string
}

// build makes the shipped binaries, stripped as they are shipped.
func build(ctx context.Context, dir string) error {
	root, err := estate.Root()
	if err != nil {
		return err
	}
	return estate.Build(ctx, root, dir, os.Stderr, "-trimpath", "-ldflags=-s -w")
}

// open starts a control plane of its own below dir.
func open(ctx context.Context, bin, dir, profiles string) (_ *scene, err error) {
	e, err := estate.New(estate.Config{Dir: dir, Bin: bin})
	if err != nil {
		return nil, err
	}
	s := &scene{Estate: e, profiles: profiles}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	addrs, err := estate.FreeAddrs(1)
	if err != nil {
		return nil, err
	}
	s.debug = addrs[0]
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	p, err := client.LoadProfile(s.Path("server", "client.yaml"))
	if err != nil {
		return nil, err
	}
	addr, err := client.Address(p.ServerURL)
	if err != nil {
		return nil, err
	}
	s.op, err = client.New(client.Config{Server: addr, Key: p.APIKey, CA: p.CACertificate, Timeout: callTimeout, Version: "bench", Now: time.Now})
	if err != nil {
		return nil, err
	}
	_, err = s.op.Issuers.CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: issuer, Kind: "local"})
	return s, err
}

func (s *scene) start(ctx context.Context) (err error) {
	s.server, err = s.StartServer(ctx, "CERTMESH_LISTEN_DEBUG="+s.debug)
	return err
}

func (s *scene) close() {
	if s.op != nil {
		_ = s.op.Close() // nothing is under way
	}
	s.Close()
}

// place orders a certificate for each site and waits until all are served. It returns their ids.
func (s *scene) place(ctx context.Context, agent string, sites []*estate.Site) ([]string, error) {
	ids := make([]string, len(sites))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(callers)
	for i, site := range sites {
		g.Go(func() error {
			return patiently(gctx, func(ctx context.Context) error {
				_, err := s.op.Targets.CreateTarget(ctx, &operatorpb.CreateTargetRequest{Name: site.Host, Agent: agent, Kind: site.Kind(),
					SettingsJson: site.Settings(), VerifyAddress: site.Addr, ServerName: site.Host})
				if client.Code(err) == codes.AlreadyExists {
					err = nil
				}
				if err != nil {
					return err
				}
				r, err := s.op.Certificates.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: site.Host, Issuer: issuer, Profile: "tls-server",
					Names: &operatorpb.Names{Dns: []string{site.Host}}, Targets: []string{site.Host}, RequestId: site.Host})
				ids[i] = r.GetCertificate().GetId()
				return err
			})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return ids, s.settled(ctx)
}

// patiently repeats a call that the server is too busy for.
func patiently(ctx context.Context, call func(context.Context) error) error {
	for {
		err := call(ctx)
		if client.Code(err) != codes.ResourceExhausted {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// settled waits until no job is open and every placement serves what is wanted.
func (s *scene) settled(ctx context.Context) error {
	for {
		st, err := s.op.System.GetStatus(ctx, &operatorpb.GetStatusRequest{})
		if err != nil {
			return err
		}
		open := st.GetPlacementsLagging()
		for _, n := range st.GetOpenJobsByState() {
			open += n
		}
		if open == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not everything was deployed: %v, %d lagging: %w", st.GetOpenJobsByState(), st.GetPlacementsLagging(), ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// oneByOne renews a certificate n times, each after the former is served, and returns how long each took.
func (s *scene) oneByOne(ctx context.Context, id string, n int) ([]time.Duration, error) {
	var all []time.Duration
	before, err := s.certificate(ctx, id)
	if err != nil {
		return nil, err
	}
	shortest := time.Duration(0)
	for range n {
		want := before.GetLeaves()[0].GetGeneration() + 1
		began := time.Now()
		if _, err := s.op.Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: id}); err != nil {
			return nil, err
		}
		for wait := time.Duration(askFrom * float64(shortest)); ; wait = askEvery {
			// Asked and not watched: notices are gathered before they are sent, which is longer than what is measured.
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(wait):
			}
			if before, err = s.certificate(ctx, id); err != nil {
				return nil, err
			}
			if p := before.GetPlacements()[0]; p.GetCurrent() && p.GetServedGeneration() >= want {
				break
			}
		}
		took := time.Since(began)
		if all = append(all, took); shortest == 0 || took < shortest {
			shortest = took
		}
	}
	return all, nil
}

func (s *scene) certificate(ctx context.Context, id string) (*operatorpb.Certificate, error) {
	r, err := s.op.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: id})
	if err != nil {
		return nil, err
	}
	if c := r.GetCertificate(); len(c.GetLeaves()) == 1 && len(c.GetPlacements()) == 1 {
		return c, nil
	}
	return nil, fmt.Errorf("certificate %s is not one leaf at one target", id)
}

// burst asks for the renewal of all at once and returns when the last call was answered and when everything was served.
func (s *scene) burst(ctx context.Context, ids []string) (called, done time.Duration, err error) {
	began := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(callers)
	for _, id := range ids {
		g.Go(func() error {
			return patiently(gctx, func(ctx context.Context) error {
				_, err := s.op.Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: id})
				return err
			})
		})
	}
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	called = time.Since(began)
	err = s.settled(ctx)
	return called, time.Since(began), err
}

// renewed makes sure that every certificate was renewed and each site serves its own.
func (s *scene) renewed(ctx context.Context, ids []string, sites []*estate.Site, generation int64) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(callers)
	for i, id := range ids {
		g.Go(func() error {
			c, err := s.certificate(gctx, id)
			if err != nil {
				return err
			}
			p := c.GetPlacements()[0]
			if p.GetServedGeneration() < generation {
				return fmt.Errorf("%s serves generation %d, not %d: %s", c.GetName(), p.GetServedGeneration(), generation, p.GetLastError())
			}
			leaf, err := estate.Served(gctx, sites[i].Addr, sites[i].Host)
			if err == nil && estate.Fingerprint(leaf) != p.GetServedFingerprint() {
				err = fmt.Errorf("%s does not serve what is recorded", c.GetName())
			}
			return err
		})
	}
	return g.Wait()
}

// profile takes a CPU profile of the server until it is stopped.
func (s *scene) profile(ctx context.Context, name string) (stop func()) {
	if s.profiles == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 1; ctx.Err() == nil; n++ {
			// In slices, because a profile that is given up is lost.
			if err := fetch(ctx, "http://"+s.debug+"/debug/pprof/profile?seconds=2", filepath.Join(s.profiles, fmt.Sprintf("%s-%d.pb.gz", name, n))); err != nil {
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

func fetch(ctx context.Context, url, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// processor is the processor time that a process has used.
func processor(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// After the name, which may hold anything, utime and stime are the 12th and 13th field, in hundredths of a second.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	var spent time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		spent += time.Duration(n) * (time.Second / 100)
	}
	return spent, nil
}

// used starts to count processor time; the returned function says what server and agent took for each of n renewals.
func (s *scene) used(n int) (func() ([]figure, error), error) {
	pids := map[string]int{"server-cpu-ms/op": s.server.PID(), "agent-cpu-ms/op": s.agent.PID()}
	before := map[string]time.Duration{}
	for unit, pid := range pids {
		var err error
		if before[unit], err = processor(pid); err != nil {
			return nil, err
		}
	}
	return func() ([]figure, error) {
		var out []figure
		for unit, pid := range pids {
			after, err := processor(pid)
			if err != nil {
				return nil, err
			}
			out = append(out, figure{unit, ms(after-before[unit]) / float64(n)})
		}
		return out, nil
	}, nil
}

// resident is what the kernel says a process has in memory, in bytes.
func resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	var size, pages int64
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &size, &pages); err != nil {
		return 0, err
	}
	return pages * int64(os.Getpagesize()), nil
}
