package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
)

// operator is what the swarm does as an operator would.
type operator struct{ c *client.Client }

const (
	// calling is how many calls are in flight at once; targetsPerOrder what one certificate may be placed at.
	calling         = 16
	targetsPerOrder = 100
	callTimeout     = time.Minute
	// orderTimeout is how long the agents may take for one command before the swarm gives up waiting.
	orderTimeout = 3 * time.Minute
)

func newOperator(profile string) (*operator, error) {
	p, err := client.LoadProfile(profile)
	if err != nil {
		return nil, err
	}
	addr, err := client.Address(p.ServerURL)
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Config{Server: addr, Key: p.APIKey, CA: p.CACertificate, Timeout: callTimeout, Version: "swarm", Now: time.Now})
	if err != nil {
		return nil, err
	}
	return &operator{c}, nil
}

func (o *operator) close() { _ = o.c.Close() }

func (o *operator) token(ctx context.Context, uses int) (string, error) {
	r, err := o.c.Agents.CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{MaxUses: int32(uses), Ttl: durationpb.New(24 * time.Hour)})
	return r.GetToken(), err
}

// command carries out one line of standard input.
func (s *swarm) command(ctx context.Context, f []string) error {
	if s.operator == nil {
		return fmt.Errorf("%q needs --operator", f[0])
	}
	n := len(s.certificates)
	if len(f) > 1 {
		var err error
		if n, err = strconv.Atoi(f[1]); err != nil || n < 1 {
			return fmt.Errorf("%q is not a number of certificates", f[1])
		}
	}
	switch f[0] {
	case "targets":
		return s.place(ctx)
	case "order":
		return s.carryOut(ctx, "order", s.orders())
	case "renew":
		var calls []func(context.Context) (int, error)
		for _, name := range s.certificates[:min(n, len(s.certificates))] {
			calls = append(calls, func(ctx context.Context) (int, error) {
				r, err := s.operator.c.Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: name})
				return len(r.GetJobs()), err
			})
		}
		return s.carryOut(ctx, "renew", calls)
	default:
		return fmt.Errorf("%q is no command: targets, order, renew [CERTIFICATES] or quit", f[0])
	}
}

func (v *virtual) target(k int) string { return fmt.Sprintf("%s-%d-t%d", v.s.o.name, v.number, k) }

// place gives every agent its targets.
func (s *swarm) place(ctx context.Context) error {
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(calling)
	for _, v := range s.agents {
		id := v.id.Load()
		if id == nil {
			continue
		}
		for k := range s.o.targets {
			g.Go(func() error {
				settings, err := json.Marshal(map[string]string{"dir": "/swarm/" + v.target(k)})
				if err != nil {
					return err
				}
				_, err = s.operator.c.Targets.CreateTarget(ctx, &operatorpb.CreateTargetRequest{Name: v.target(k), Agent: *id, Kind: "file", SettingsJson: string(settings)})
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	s.out.event("command", map[string]any{"name": "targets", "agents": s.joined.Load(), "ms": time.Since(began).Milliseconds()})
	return nil
}

// orders are the calls that order certificates for all targets, a hundred targets each.
func (s *swarm) orders() []func(context.Context) (int, error) {
	var names []string
	for k := range s.o.targets {
		for _, v := range s.agents {
			if v.id.Load() != nil {
				names = append(names, v.target(k))
			}
		}
	}
	var calls []func(context.Context) (int, error)
	for i := 0; i < len(names); i += targetsPerOrder {
		part := names[i:min(i+targetsPerOrder, len(names))]
		host := fmt.Sprintf("%s-%d", s.o.name, i/targetsPerOrder)
		s.certificates = append(s.certificates, host)
		calls = append(calls, func(ctx context.Context) (int, error) {
			r, err := s.operator.c.Certificates.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: host, Issuer: "swarm", Profile: "tls-server",
				Names: &operatorpb.Names{Dns: []string{host + ".swarm.test"}}, Targets: part, RequestId: host})
			return len(r.GetJobs()), err
		})
	}
	return calls
}

// carryOut makes the calls and waits until every agent they concern has acknowledged and then finished what it was given.
func (s *swarm) carryOut(ctx context.Context, name string, calls []func(context.Context) (int, error)) error {
	if name == "order" {
		_, err := s.operator.c.Issuers.CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "swarm", Kind: "local"})
		if err != nil && client.Code(err) != codes.AlreadyExists {
			return err
		}
	}
	s.acked.Store(0)
	s.done.Store(0)
	s.order.Add(1)
	began := time.Now()
	jobs := make([]int, len(calls))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(calling)
	for i, call := range calls {
		g.Go(func() (err error) {
			jobs[i], err = call(gctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	called := time.Since(began)
	want := int64(0)
	for _, n := range jobs {
		want += int64(n)
	}
	want = min(want, s.joined.Load())
	ctx, cancel := context.WithTimeout(ctx, orderTimeout)
	defer cancel()
	outcome := map[string]any{"name": name, "calls": len(calls), "agents": want, "calls_ms": called.Milliseconds()}
	for _, w := range []struct {
		key       string
		count, at interface{ Load() int64 }
	}{{"acknowledged", &s.acked, &s.ackedAt}, {"done", &s.done, &s.doneAt}} {
		reached := until(ctx, func() bool { return w.count.Load() >= want })
		outcome[w.key] = w.count.Load()
		if reached && want > 0 {
			outcome[w.key+"_ms"] = time.UnixMicro(w.at.Load()).Sub(began).Milliseconds()
		}
	}
	s.out.event("command", outcome)
	return nil
}

// until looks at a condition until it holds; false: ctx ended first.
func until(ctx context.Context, holds func() bool) bool {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for !holds() {
		select {
		case <-t.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
