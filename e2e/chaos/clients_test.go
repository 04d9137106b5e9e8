package chaos

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/certmesh/certmesh/e2e/chaos/history"
	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
)

const (
	clients = 4
	// callPatience is below every fault that lasts, so that clients change nodes in its middle.
	callPatience = 3 * time.Second
	// pause is the mean pause of a client between two operations: some 100 operations a second from all.
	pause = 30 * time.Millisecond
)

// definite are the codes by which a node says that nothing was done.
var definite = []codes.Code{codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition,
	codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented}

// shelf is the certificates that may be ordered, and those that were.
type shelf struct {
	mu      sync.Mutex
	next    int
	names   []string
	ordered []string
}

// take returns the next name to be ordered, and its number; "" when all are.
func (s *shelf) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == len(s.names) {
		return ""
	}
	s.next++
	return s.names[s.next-1]
}

func (s *shelf) put(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ordered = append(s.ordered, name)
}

// pick returns a name that was ordered, "" when none was yet.
func (s *shelf) pick(r *rand.Rand) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ordered) == 0 {
		return ""
	}
	return s.ordered[r.IntN(len(s.ordered))]
}

// user is one client: it works against one node until that fails it.
type user struct {
	*trial
	number  int
	random  *rand.Rand
	node    int
	calls   int
	nodes   []*client.Client
	pending []call // orders of which nobody knows whether they were done
}

// call is an operation with the id it is repeated under.
type call struct{ name, requestID string }

func (s *trial) newUser(number int) *user {
	u := &user{trial: s, number: number, random: s.seeded(100 + number)}
	u.node = u.random.IntN(len(s.Nodes))
	for _, m := range s.Nodes {
		p, err := client.LoadProfile(m.Path(m.ID, "client.yaml"))
		s.OK(err)
		c, err := client.New(client.Config{Server: p.ServerURL, Key: p.APIKey, CA: p.CACertificate, Timeout: callPatience, Version: "chaos", Now: time.Now})
		s.OK(err)
		u.nodes = append(u.nodes, c)
	}
	return u
}

func (u *user) close() {
	for _, c := range u.nodes {
		_ = c.Close() // nothing is on its way
	}
}

// work does one operation after the other until ctx ends.
func (u *user) work(ctx context.Context) {
	for ctx.Err() == nil {
		u.one(ctx)
		estate.Pause(ctx, time.Duration(u.random.Int64N(int64(2*pause))))
	}
}

func (u *user) one(ctx context.Context) {
	dice := u.random.IntN(100)
	name := u.pick(u.random)
	switch {
	case dice < 15 || name == "":
		c := call{u.take(), u.id()}
		if c.name == "" {
			if len(u.pending) == 0 {
				return
			}
			c, u.pending = u.pending[0], u.pending[1:]
		}
		u.order(ctx, c)
	case dice < 20 && len(u.pending) > 0:
		c := u.pending[0]
		u.pending = u.pending[1:]
		u.order(ctx, c)
	case dice < 45:
		u.renew(ctx, call{name, u.id()})
	case dice < 47 && mortal(name):
		u.revoke(ctx, call{name, u.id()})
	case dice < 50:
		u.crl(ctx)
	default:
		u.read(ctx, call{name, u.id()})
	}
}

// mortal tells whether a certificate may be revoked: most are not, or none would be left to be renewed.
func mortal(name string) bool { return strings.HasSuffix(name, "3") || strings.HasSuffix(name, "7") }

// id is a new request id.
func (u *user) id() string {
	u.calls++
	return fmt.Sprintf("u%d-%d", u.number, u.calls)
}

// do records a call to the user's node. After a failure of the node it goes on with another.
func (u *user) do(ctx context.Context, k history.Kind, c call, f func(context.Context, *client.Client) (history.Answer, error)) history.Phase {
	node := u.Nodes[u.node]
	end := u.recorder.Invoke(history.Event{Kind: k, Client: u.number, Node: node.ID, Name: c.name, RequestID: c.requestID})
	// A call that is under way when time is up is still answered: clients do not end in its middle.
	ctx = metadata.AppendToOutgoingContext(context.WithoutCancel(ctx), "x-request-id", c.requestID)
	answer, err := f(ctx, u.nodes[u.node])
	switch {
	case err == nil:
		end(history.OK, answer)
		return history.OK
	case slices.Contains(definite, client.Code(err)):
		end(history.Fail, history.Answer{Error: err.Error()})
		return history.Fail
	}
	end(history.Info, history.Answer{Error: err.Error()})
	u.node = (u.node + 1 + u.random.IntN(len(u.Nodes)-1)) % len(u.Nodes)
	return history.Info
}

func (u *user) order(ctx context.Context, c call) {
	phase := u.do(ctx, history.Order, c, func(ctx context.Context, at *client.Client) (history.Answer, error) {
		r, err := at.Certificates.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: c.name, Issuer: "ca", Profile: "tls-server", RequestId: c.requestID,
			Names: &operatorpb.Names{Dns: []string{c.name + ".example.test"}}, Targets: u.targets[c.name]})
		return history.Answer{CertificateID: r.GetCertificate().GetId(), Status: r.GetCertificate().GetStatus(), Jobs: jobs(r.GetJobs())}, err
	})
	switch phase {
	case history.OK:
		u.put(c.name)
	case history.Info:
		u.pending = append(u.pending, c)
	default: // it was refused, which the checker sees
	}
}

func (u *user) renew(ctx context.Context, c call) {
	u.do(ctx, history.Renew, c, func(ctx context.Context, at *client.Client) (history.Answer, error) {
		r, err := at.Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: c.name, RequestId: c.requestID})
		return history.Answer{Jobs: jobs(r.GetJobs())}, err
	})
}

func (u *user) revoke(ctx context.Context, c call) {
	u.do(ctx, history.Revoke, c, func(ctx context.Context, at *client.Client) (history.Answer, error) {
		r, err := at.Certificates.RevokeCertificate(ctx, &operatorpb.RevokeCertificateRequest{Id: c.name, Reason: "superseded"})
		return history.Answer{CertificateID: r.GetCertificate().GetId(), Status: r.GetCertificate().GetStatus(), Serials: r.GetSerials()}, err
	})
}

func (u *user) read(ctx context.Context, c call) {
	u.do(ctx, history.Read, c, func(ctx context.Context, at *client.Client) (history.Answer, error) {
		r, err := at.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: c.name})
		return seen(r.GetCertificate()), err
	})
}

func seen(c *operatorpb.Certificate) history.Answer {
	a := history.Answer{CertificateID: c.GetId(), Status: c.GetStatus(), Generations: map[string]int64{}}
	for _, l := range c.GetLeaves() {
		a.Generations[l.GetAgentId()] = l.GetGeneration()
	}
	return a
}

func (u *user) crl(ctx context.Context) {
	m := u.Nodes[u.node]
	u.do(ctx, history.CRL, call{u.issuer, u.id()}, func(ctx context.Context, _ *client.Client) (history.Answer, error) {
		l, err := crlOf(ctx, m, u.issuer)
		if err != nil {
			return history.Answer{}, err
		}
		return history.Answer{Number: l.Number.Int64()}, nil
	})
}

// crlOf fetches the complete CRL that a node serves.
func crlOf(ctx context.Context, m *estate.ClusterNode, issuer string) (*x509.RevocationList, error) {
	status, der, err := m.Get(ctx, "http://"+m.PKI+"/.well-known/pki/crl/"+issuer)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("the CRL: %d %s", status, der)
	}
	return x509.ParseRevocationList(der)
}

func jobs(list []*operatorpb.Job) []history.Job {
	out := make([]history.Job, len(list))
	for i, j := range list {
		out[i] = history.Job{ID: j.GetId(), Kind: j.GetKind(), RequestID: j.GetRequestId(), Generation: j.GetGeneration()}
	}
	return out
}
