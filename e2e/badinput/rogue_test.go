package badinput

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func TestRogueAgent(t *testing.T) {
	t.Parallel()
	b := &bench{Lab: estatetest.Start(t, brisk()...)}
	p, a := b.Join(estate.AgentOptions{Name: "host"})
	b.host, b.ca = a, b.Issuer("ca")
	r := &rogue{bench: b}
	r.enrol()
	r.begin()
	r.meddle(p)
	r.overreach()
	r.replay()
}

// rogue is an agent that is one by its identity alone.
type rogue struct {
	*bench
	id   string
	cert tls.Certificate
}

func key(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t testing.TB, k crypto.Signer, names ...string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: names}, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// client connects to the mesh listener with certs.
func (r *rogue) client(certs ...tls.Certificate) agentpb.AgentServiceClient {
	r.T.Helper()
	c, err := grpc.NewClient(r.Mesh, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})))
	r.OK(err)
	r.T.Cleanup(func() { _ = c.Close() }) // the test is over
	return agentpb.NewAgentServiceClient(c)
}

func (r *rogue) is(err error, what string, want ...codes.Code) {
	r.T.Helper()
	if got := status.Code(err); !slices.Contains(want, got) {
		r.T.Errorf("%s ended with %v, not %v: %v", what, got, want, err)
	}
}

// enrol tries wrong CSRs with a token for one use, which must not use it up.
func (r *rogue) enrol() {
	token, err := r.Token(r.Ctx)
	r.OK(err)
	c, own := r.client(), key(r.T, elliptic.P256())
	good := request(r.T, own)
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	r.OK(err)
	broken := slices.Clone(good)
	broken[len(broken)-1] ^= 1
	for name, csr := range map[string][]byte{
		"no CSR": nil, "a malformed CSR": []byte("not DER"), "a CSR and more": append(slices.Clone(good), 0), "a wrong signature": broken,
		"an RSA key": request(r.T, weak), "P-384": request(r.T, key(r.T, elliptic.P384())), "a large CSR": bytes.Repeat([]byte{0x30}, 100<<10),
	} {
		_, err := c.Enroll(r.Ctx, &agentpb.EnrollRequest{Token: token, Csr: csr, Name: "rogue"})
		r.is(err, "enrolment with "+name, codes.InvalidArgument, codes.FailedPrecondition, codes.ResourceExhausted)
	}
	_, err = c.Enroll(r.Ctx, &agentpb.EnrollRequest{Token: token, Csr: good, Name: strings.Repeat("n", 10<<10)})
	r.is(err, "enrolment with a long name", codes.OK, codes.InvalidArgument)
	if err != nil {
		_, err = c.Enroll(r.Ctx, &agentpb.EnrollRequest{Token: token, Csr: good, Name: "rogue"})
		r.is(err, "enrolment", codes.OK)
	}
	resp, err := c.Enroll(r.Ctx, &agentpb.EnrollRequest{Token: token, Csr: good, Name: "rogue"})
	r.is(err, "the same enrolment again", codes.OK)
	r.id = resp.GetAgentId()
	r.cert = tls.Certificate{Certificate: resp.GetChain(), PrivateKey: own}
	_, err = c.Enroll(r.Ctx, &agentpb.EnrollRequest{Token: token, Csr: request(r.T, key(r.T, elliptic.P256())), Name: "rogue-2"})
	r.is(err, "another host with a used token", codes.Unauthenticated, codes.PermissionDenied, codes.FailedPrecondition, codes.InvalidArgument)
}

func hello() *agentpb.Hello {
	return &agentpb.Hello{Protocol: 1, ProtocolMin: 1, BootId: "00000000000000000000000000000001", Capabilities: []string{"target/file@1"},
		Facts:   &agentpb.Facts{Hostname: "rogue"},
		Credits: []*agentpb.Credit{{Class: agentpb.WorkClass_WORK_CLASS_KEY, Amount: 4}, {Class: agentpb.WorkClass_WORK_CLASS_DEPLOY, Amount: 4}}}
}

func says(h *agentpb.Hello) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: h}}
}

// begin opens streams in ways that must not work.
func (r *rogue) begin() {
	ended := func(c agentpb.AgentServiceClient, m *agentpb.ConnectRequest) (*agentpb.Goodbye, error) {
		r.T.Helper()
		ctx, cancel := context.WithTimeout(r.Ctx, 20*time.Second)
		defer cancel()
		s, err := c.Connect(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.Send(m); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		var bye *agentpb.Goodbye
		for {
			in, err := s.Recv()
			switch {
			case err != nil:
				return bye, err
			case in.GetGoodbye() != nil:
				bye = in.GetGoodbye()
			default:
				r.T.Errorf("it was answered: %v", in)
			}
		}
	}
	_, err := ended(r.client(), says(hello()))
	r.is(err, "a stream without an identity", codes.Unauthenticated)
	c := r.client(r.cert)
	_, err = ended(c, &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{}}})
	r.is(err, "a stream that begins with a beat", codes.InvalidArgument)
	_, err = ended(c, &agentpb.ConnectRequest{})
	r.is(err, "a stream that begins with nothing", codes.InvalidArgument)
	h := hello()
	h.AgentId = r.host.ID
	_, err = ended(c, says(h))
	r.is(err, "a stream under another agent's id", codes.PermissionDenied, codes.InvalidArgument, codes.Unauthenticated)
	h = hello()
	h.Protocol, h.ProtocolMin = 99, 98
	bye, err := ended(c, says(h))
	if bye.GetReason() != agentpb.Goodbye_REASON_PROTOCOL {
		r.is(err, "a stream of an unknown protocol", codes.FailedPrecondition, codes.Unimplemented, codes.InvalidArgument)
	}
	h = hello()
	h.Facts.Hostname = strings.Repeat("x", 1<<20)
	_, err = ended(c, says(h))
	r.is(err, "an oversized message", codes.ResourceExhausted)
	r.fine()
}

// stream is a conversation that began well.
type stream struct {
	agentpb.AgentService_ConnectClient
	in chan *agentpb.ConnectResponse
}

func (r *rogue) connect() *stream {
	r.T.Helper()
	ctx, cancel := context.WithCancel(r.Ctx)
	r.T.Cleanup(cancel)
	c, err := r.client(r.cert).Connect(ctx)
	r.OK(err)
	s := &stream{c, make(chan *agentpb.ConnectResponse, 100)}
	go func() {
		defer close(s.in)
		for {
			m, err := c.Recv()
			if err != nil {
				return
			}
			s.in <- m
		}
	}()
	r.OK(c.Send(says(hello())))
	r.next(s, "a welcome", func(m *agentpb.ConnectResponse) bool { return m.GetWelcome() != nil })
	return s
}

// next skips to a message.
func (r *rogue) next(s *stream, what string, want func(*agentpb.ConnectResponse) bool) *agentpb.ConnectResponse {
	r.T.Helper()
	for {
		select {
		case m, ok := <-s.in:
			if !ok {
				r.T.Fatalf("the stream ended before %s came", what)
			}
			if want(m) {
				return m
			}
		case <-r.Ctx.Done():
			r.T.Fatalf("waited in vain for %s", what)
		}
	}
}

// tell sends m on a stream of its own; the control plane may end that, which is as good as not listening.
func (r *rogue) tell(m *agentpb.ConnectRequest) {
	r.T.Helper()
	s := r.connect()
	r.OK(s.Send(m))
	_ = s.CloseSend() // it may be gone already
	for range s.in {
	}
}

// meddle answers for work that is another agent's.
func (r *rogue) meddle(p *estate.Process) {
	path := filepath.Join(r.SiteDir("host"), "mine.pem")
	r.OK(r.target("mine", map[string]any{"pem_path": path}))
	if err := p.Stop(20 * time.Second); err != nil {
		r.T.Fatalf("the agent did not stop: %v", err)
	}
	r.Do("certs", "create", "mine", "--dns", "mine.example.test", "--issuer", "ca", "--target", "mine")
	jobs, err := r.Jobs(r.Ctx, "--open")
	r.OK(err)
	if len(jobs) != 1 {
		r.T.Fatalf("one job should be open: %+v", jobs)
	}
	job := jobs[0]
	csr := request(r.T, key(r.T, elliptic.P256()), "mine.example.test")
	for attempt := range int64(3) {
		r.tell(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{Id: job.ID, Attempt: attempt}}})
		r.tell(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Csr{Csr: &agentpb.Csr{Id: job.ID, Attempt: attempt, Csr: csr}}})
		r.tell(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Result{Result: &agentpb.Result{Id: job.ID, Attempt: attempt,
			Outcome: &agentpb.Result_Deployed{Deployed: &agentpb.Deployed{InstalledFingerprint: make([]byte, 32)}}}}})
		r.tell(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{AssignmentId: job.ID, Attempt: attempt,
			Failure: &agentpb.Failure{Class: "rejected", Message: "no"}}}})
	}
	var now estate.Job
	r.Get(&now, "jobs", "get", job.ID)
	if now.State != job.State || now.Tries != 0 || now.Error != "" {
		r.T.Errorf("another agent changed the job: %+v, before %+v", now, job)
	}
	if v := r.Versions("mine"); len(v) != 0 {
		r.T.Errorf("another agent's CSR was signed: %+v", v)
	}
	_, err = r.StartAgent(estate.AgentOptions{Name: "host"})
	r.OK(err)
	r.Current("mine")
}

// overreach orders something for the rogue itself, which asks for more than was ordered.
func (r *rogue) overreach() {
	r.Do("targets", "create", "own", "--agent", r.id, "--kind", "file", "--settings", `{"pem_path":"/nowhere/own.pem"}`)
	r.Do("certs", "create", "own", "--dns", "own.example.test", "--issuer", "ca", "--target", "own")
	own := key(r.T, elliptic.P256())
	wrong := slices.Clone(request(r.T, own, "own.example.test"))
	wrong[len(wrong)-1] ^= 1
	for name, try := range map[string]struct {
		csr  []byte
		word string
	}{
		"an extra name":     {request(r.T, own, "own.example.test", "bank.example.test"), "bank.example.test"},
		"another name":      {request(r.T, own, "bank.example.test"), "bank.example.test"},
		"a weak key":        {request(r.T, key(r.T, elliptic.P224()), "own.example.test"), "P-224"},
		"a wrong signature": {wrong, "signature"},
		"no CSR":            {[]byte("x"), "PKCS#10"},
	} {
		s := r.connect()
		m := r.next(s, "an assignment", func(m *agentpb.ConnectResponse) bool { return m.GetAssignment().GetKey() != nil })
		a := m.GetAssignment()
		r.OK(s.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{Id: a.GetId(), Attempt: a.GetAttempt()}}}))
		r.OK(s.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Csr{Csr: &agentpb.Csr{Id: a.GetId(), Attempt: a.GetAttempt(), Csr: try.csr}}}))
		set := r.next(s, "the refusal of "+name, func(m *agentpb.ConnectResponse) bool { return m.GetSettled().GetId() == a.GetId() }).GetSettled()
		if set.GetOutcome() != agentpb.Settled_OUTCOME_FAILED || !strings.Contains(set.GetFailure().GetMessage(), try.word) {
			r.T.Errorf("%s: settled as %v: %v", name, set.GetOutcome(), set.GetFailure())
		}
		if v := r.Versions("own"); len(v) != 0 {
			r.T.Fatalf("%s was signed: %+v", name, v)
		}
		_ = s.CloseSend() // it may be gone already
		var jobs []estate.Job
		r.Until("the refusal to be shown", func() error {
			var err error
			if jobs, err = r.Jobs(r.Ctx, "--certificate", "own"); err == nil && !slices.ContainsFunc(jobs, func(j estate.Job) bool { return j.Error != "" }) {
				err = fmt.Errorf("no job has an error: %+v", jobs)
			}
			return err
		})
		if !slices.ContainsFunc(jobs, func(j estate.Job) bool { return j.State != "Failed" }) {
			// A refusal for good; the operator orders anew.
			r.Do("certs", "renew", "own")
		}
	}
}

// replay does its work as it should, once, and reports it many times.
func (r *rogue) replay() {
	const name = "again"
	r.Do("targets", "create", name, "--agent", r.id, "--kind", "file", "--settings", `{"pem_path":"/nowhere/again.pem"}`)
	r.Do("certs", "create", name, "--dns", "again.example.test", "--issuer", "ca", "--target", name)
	id := r.Certificate(name).ID
	s := r.connect()
	take := func(of func(*agentpb.Assignment) string) *agentpb.Assignment {
		r.T.Helper()
		a := r.next(s, "an assignment", func(m *agentpb.ConnectResponse) bool { return m.GetAssignment() != nil && of(m.GetAssignment()) == id }).GetAssignment()
		r.OK(s.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{Id: a.GetId(), Attempt: a.GetAttempt()}}}))
		return a
	}
	settled := func(a *agentpb.Assignment, want agentpb.Settled_Outcome) {
		r.T.Helper()
		m := r.next(s, "an end", func(m *agentpb.ConnectResponse) bool { return m.GetSettled().GetId() == a.GetId() })
		if got := m.GetSettled().GetOutcome(); got != want {
			r.T.Errorf("%s was settled as %v, not %v", a.GetClass(), got, want)
		}
	}
	csr := request(r.T, key(r.T, elliptic.P256()), "again.example.test")
	k := take(func(a *agentpb.Assignment) string { return a.GetKey().GetCertificateId() })
	asked := func(attempt int64, csr []byte) {
		r.T.Helper()
		r.OK(s.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Csr{Csr: &agentpb.Csr{Id: k.GetId(), Attempt: attempt, Csr: csr}}}))
	}
	asked(k.GetAttempt(), csr)
	settled(k, agentpb.Settled_OUTCOME_OK)

	d := take(func(a *agentpb.Assignment) string { return a.GetDeploy().GetCertificateId() })
	sum := sha256.Sum256(d.GetDeploy().GetChain()[0])
	done := func(attempt int64, fingerprint []byte) {
		r.T.Helper()
		r.OK(s.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Result{Result: &agentpb.Result{Id: d.GetId(), Attempt: attempt,
			Outcome: &agentpb.Result_Deployed{Deployed: &agentpb.Deployed{InstalledFingerprint: fingerprint}}}}}))
	}
	done(d.GetAttempt(), sum[:])
	settled(d, agentpb.Settled_OUTCOME_OK)
	before := r.Current(name)
	jobs, err := r.Jobs(r.Ctx, "--certificate", name)
	r.OK(err)

	other := request(r.T, key(r.T, elliptic.P256()), "again.example.test")
	for _, attempt := range []int64{k.GetAttempt(), k.GetAttempt() + 1, 1 << 40} {
		asked(attempt, other)
		r.next(s, "an answer", func(m *agentpb.ConnectResponse) bool { return m.GetSettled().GetId() == k.GetId() })
		done(attempt, make([]byte, 32))
		r.next(s, "an answer", func(m *agentpb.ConnectResponse) bool { return m.GetSettled().GetId() == d.GetId() })
	}
	if v := r.Versions(name); len(v) != 1 {
		r.T.Errorf("what was sent again was signed again: %+v", v)
	}
	if after := r.Current(name); after.Placements[0] != before.Placements[0] {
		r.T.Errorf("what was sent again changed the placement: %+v, before %+v", after.Placements[0], before.Placements[0])
	}
	now, err := r.Jobs(r.Ctx, "--certificate", name)
	r.OK(err)
	if !slices.Equal(now, jobs) {
		r.T.Errorf("what was sent again changed the jobs: %+v, before %+v", now, jobs)
	}
}
