package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// The ways to misbehave.
const (
	halfOpen    = "half-open"
	slowReader  = "slow-reader"
	neverAccept = "never-accept"
)

var badKinds = []string{halfOpen, slowReader, neverAccept}

// again is how long a bad agent waits before it tries again.
const again = time.Second

// misbehave is an agent of the given bad kind until ctx ends.
func (v *virtual) misbehave(ctx context.Context, kind string) {
	v.bad = true
	switch {
	case kind == slowReader:
		v.run(ctx, v.wrapped(ctx, func(c net.Conn) net.Conn { return &slow{Conn: c, v: v, ctx: ctx} }))
	case kind == halfOpen && v.number%2 == 0:
		v.run(ctx, v.wrapped(ctx, func(c net.Conn) net.Conn { return &silent{Conn: c, v: v} }))
	case kind == halfOpen:
		v.repeat(ctx, v.sayNothing)
	default:
		id := &rogue{}
		v.repeat(ctx, func(ctx context.Context) error { return v.neverAccept(ctx, id) })
	}
}

// repeat runs f again and again.
func (v *virtual) repeat(ctx context.Context, f func(context.Context) error) {
	t := time.NewTicker(again)
	defer t.Stop()
	for ctx.Err() == nil {
		if err := f(ctx); err != nil && ctx.Err() == nil {
			v.s.notes.add("misbehaving: " + shorten(err.Error()))
		}
		v.start()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
}

// wrapped dials and puts a conn of its own around each connection; the connection ends with ctx, whatever it blocks on.
func (v *virtual) wrapped(ctx context.Context, wrap func(net.Conn) net.Conn) func(context.Context, string) (net.Conn, error) {
	return func(dctx context.Context, addr string) (net.Conn, error) {
		c, err := v.dial(dctx, addr)
		if err != nil {
			return nil, err
		}
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetReadBuffer(4 << 10) // a hint; the kernel has its own minimum
		}
		context.AfterFunc(ctx, func() { _ = c.Close() })
		return wrap(c), nil
	}
}

// slow reads some hundred bytes a second once it is connected.
type slow struct {
	net.Conn
	v   *virtual
	ctx context.Context
}

func (s *slow) Read(p []byte) (int, error) {
	if !s.v.connected.Load() {
		return s.Conn.Read(p)
	}
	t := time.NewTimer(100 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
	return s.Conn.Read(p[:min(len(p), 16)])
}

// silent neither says nor hears anything once it is connected, as a host that has lost its network.
type silent struct {
	net.Conn
	v *virtual
}

func (s *silent) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	for err == nil && s.v.connected.Load() {
		_, err = s.Conn.Read(p)
	}
	return n, err
}

func (s *silent) Write(p []byte) (int, error) {
	if s.v.connected.Load() {
		return len(p), nil
	}
	return s.Conn.Write(p)
}

// sayNothing connects and waits until the server hangs up.
func (v *virtual) sayNothing(ctx context.Context) error {
	c, err := v.dial(ctx, v.s.o.server)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	defer func() { _ = c.Close() }() // given up either way
	v.s.bad.Add(1)
	defer v.s.bad.Add(-1)
	v.start()
	_, err = io.Copy(io.Discard, c)
	return err
}

// rogue is an identity without an agent behind it.
type rogue struct {
	id   string
	cert tls.Certificate
}

// neverAccept holds one stream that grants credit and answers no assignment.
func (v *virtual) neverAccept(ctx context.Context, r *rogue) error {
	if r.id == "" {
		if err := v.enrol(ctx, r); err != nil {
			return err
		}
	}
	conn, err := v.connect(r.cert)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // given up either way
	st, err := agentpb.NewAgentServiceClient(conn).Connect(ctx)
	if err != nil {
		return err
	}
	err = st.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: &agentpb.Hello{Protocol: 1, ProtocolMin: 1,
		BootId: fmt.Sprint("rogue-", v.number), Capabilities: []string{"target/file@1"}, Facts: v.s.facts, Credits: []*agentpb.Credit{
			{Class: agentpb.WorkClass_WORK_CLASS_KEY, Amount: 64}, {Class: agentpb.WorkClass_WORK_CLASS_DEPLOY, Amount: 64}}}}})
	if err != nil {
		return err
	}
	v.s.bad.Add(1)
	defer v.s.bad.Add(-1)
	for {
		m, err := st.Recv()
		if err != nil {
			return err
		}
		switch {
		case m.GetWelcome() != nil:
			if v.id.Swap(&r.id) == nil {
				v.s.joined.Add(1)
			}
			v.start()
		case m.GetAssignment() != nil:
			v.s.notes.add("assignment ignored")
			if err := st.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Credit{Credit: &agentpb.Credit{
				Class: m.GetAssignment().GetClass(), Amount: 1}}}); err != nil {
				return err
			}
		}
	}
}

func (v *virtual) enrol(ctx context.Context, r *rogue) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	conn, err := v.connect()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // given up either way
	resp, err := agentpb.NewAgentServiceClient(conn).Enroll(ctx, &agentpb.EnrollRequest{Token: v.s.token, Csr: csr,
		Name: fmt.Sprintf("%s-%d", v.s.o.name, v.number), Facts: v.s.facts})
	if err != nil {
		return err
	}
	r.id, r.cert = resp.GetAgentId(), tls.Certificate{Certificate: resp.GetChain(), PrivateKey: key}
	return nil
}

func (v *virtual) connect(certs ...tls.Certificate) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+v.s.o.server, grpc.WithContextDialer(v.dial), grpc.WithReadBufferSize(1<<10),
		grpc.WithWriteBufferSize(4<<10), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13,
			InsecureSkipVerify: true,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if len(certs) == 0 {
					return &tls.Certificate{}, nil
				}
				return &certs[0], nil
			}})))
}
