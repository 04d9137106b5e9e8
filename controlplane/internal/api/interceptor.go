package api

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/fair"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// maxRequest is far above the largest sensible order (100 targets, 100 names) and a CA chain in PEM.
	maxRequest = 1 << 20
	// maxStreams bounds the calls in flight of one connection; a terminal uses two or three.
	maxStreams = 128
	// waitingShare of those that may wait to change something may be of one API key.
	waitingShare = 4
	// busyDelay is what a caller beyond that is told to wait.
	busyDelay = 2 * time.Second
	// auditTimeout bounds the write of a refusal's audit row, which must not outlive a dead store.
	auditTimeout = 3 * time.Second
)

// call is what the interceptors learn about a request. It is made by observe and travels in the context.
type call struct {
	method    string
	requestID string
	remote    string
	principal authz.Principal
	known     bool
}

func (c *call) actor() string {
	if !c.known {
		return authz.Anonymous
	}
	return c.principal.Actor()
}

type callKey struct{}

func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{}
}

// Interceptors are the options of every server that Register is called with.
func (a *API) Interceptors() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(a.unary),
		grpc.ChainStreamInterceptor(a.stream),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxStreams),
		// Watch may be silent for hours; both ends find a dead connection by pings.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 20 * time.Second, PermitWithoutStream: true}),
	}
}

func (a *API) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	c := a.newCall(ctx, info.FullMethod)
	ctx = context.WithValue(ctx, callKey{}, c)
	// The header is lost only with the connection.
	_ = grpc.SetHeader(ctx, metadata.Pairs(requestIDHeader, c.requestID))
	start := a.Clock.Now()
	var answer any
	err := a.guard(c, func() error {
		if err := a.admit(ctx, c); err != nil {
			return err
		}
		if err := a.check(req); err != nil {
			return err
		}
		leave, err := a.turn(ctx, c)
		if err != nil {
			return err
		}
		defer leave()
		answer, err = handle(ctx, req)
		return err
	})
	err = a.finish(ctx, c, err, start)
	a.calls.WithLabelValues(c.method, status.Code(err).String()).Observe(a.Clock.Since(start).Seconds())
	if err != nil {
		return nil, err
	}
	return answer, nil
}

func (a *API) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	c := a.newCall(ss.Context(), info.FullMethod)
	ctx := context.WithValue(ss.Context(), callKey{}, c)
	_ = ss.SetHeader(metadata.Pairs(requestIDHeader, c.requestID))
	start := a.Clock.Now()
	err := a.guard(c, func() error {
		if err := a.admit(ctx, c); err != nil {
			return err
		}
		return handle(srv, &checkedStream{ServerStream: ss, ctx: ctx, check: a.check})
	})
	return a.finish(ctx, c, err, start)
}

// checkedStream validates what a stream receives.
type checkedStream struct {
	grpc.ServerStream
	ctx   context.Context
	check func(any) error
}

func (s *checkedStream) Context() context.Context { return s.ctx }

func (s *checkedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.check(m)
}

const requestIDHeader = "x-request-id"

var requestID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (a *API) newCall(ctx context.Context, method string) *call {
	c := &call{method: method, requestID: firstOf(ctx, requestIDHeader)}
	if !requestID.MatchString(c.requestID) {
		c.requestID = newID(id.Request)
	}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		c.remote = p.Addr.String()
		if host, _, err := net.SplitHostPort(c.remote); err == nil {
			c.remote = host
		}
	}
	return c
}

// guard turns a panic into an error; the process serves on.
func (a *API) guard(c *call, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			a.Log.Error("api panic", "method", c.method, "request_id", c.requestID, "panic", p, "stack", string(debug.Stack()))
			err = fault.New(fault.Internal, "panic in %s", c.method)
		}
	}()
	return f()
}

// admit says who calls and whether they may.
func (a *API) admit(ctx context.Context, c *call) error {
	need, ok := authz.PermissionOf(c.method)
	if !ok {
		return fault.New(fault.Unsupported, "this server has no method %s; compare the versions of tool and server", c.method)
	}
	keys := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(keys) != 1 {
		return fault.New(fault.Unauthorized, "an API key is needed: set CERTMESH_API_KEY or run certmesh login")
	}
	scheme, key, ok := strings.Cut(keys[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return fault.New(fault.Unauthorized, "the authorization metadata must be: Bearer <API key>")
	}
	p, err := authz.Authenticate(ctx, a.Store, key, a.now())
	// The holder of an expired or revoked key has shown who it is: the trail names it.
	c.principal, c.known = p, p.KeyID != ""
	if err != nil {
		return err
	}
	if !p.Role.May(need) {
		return fault.New(fault.Forbidden, "API key %s has the role %s, which lacks the permission %s; use a key with a higher role", p.Name, p.Role, need)
	}
	return nil
}

// turn waits until a call that changes something may begin; API keys take turns. Reads never wait. A caller that is refused
// has cost no transaction and is told when to come back.
func (a *API) turn(ctx context.Context, c *call) (leave func(), err error) {
	if need, _ := authz.PermissionOf(c.method); need == authz.Read {
		return func() {}, nil
	}
	leave, err = a.changes.Enter(ctx, c.principal.KeyID)
	switch {
	case errors.Is(err, fair.ErrFull):
		a.turned.WithLabelValues("busy").Inc()
		return nil, fault.Limited(a.Clock.Now().Add(busyDelay), "this node is changing as much as it can; come back in %s", busyDelay)
	case err != nil:
		a.turned.WithLabelValues("left").Inc()
	}
	return leave, err
}

func (a *API) check(m any) error {
	msg, ok := m.(proto.Message)
	if !ok {
		return fault.New(fault.Internal, "%T is not a protobuf message", m)
	}
	return validate(msg)
}

// finish audits what was refused or failed, logs the call and returns the status for the caller.
func (a *API) finish(ctx context.Context, c *call, err error, start time.Time) error {
	need, _ := authz.PermissionOf(c.method)
	denied := fault.Is(err, fault.Unauthorized) || fault.Is(err, fault.Forbidden)
	// That a node was busy is in the metrics: a row for each would make it busier.
	if denied || err != nil && need != authz.Read && !fault.Is(err, fault.RateLimited) {
		a.auditRefusal(ctx, c, err, denied)
	}
	st := statusOf(ctx, err, c.requestID, a.Clock.Now())
	attrs := []any{
		"method", c.method, "code", st.Code().String(), "actor", c.actor(), "request_id", c.requestID,
		"remote_addr", c.remote, "duration_ms", a.Clock.Since(start).Milliseconds(),
	}
	level := slog.LevelInfo
	if err != nil {
		// The whole chain goes to the log; the caller sees the classified sentence alone.
		attrs = append(attrs, "error", err.Error())
		if st.Code() == codes.Internal {
			level = slog.LevelError
		}
	}
	a.Log.Log(ctx, level, "api call", attrs...)
	return st.Err()
}

// auditRefusal writes the row of a call that changed nothing. Such rows are bounded, those of strangers apart so that
// they cannot crowd out the others; the log has them all.
func (a *API) auditRefusal(ctx context.Context, c *call, err error, denied bool) {
	limit := a.strangers
	if c.known {
		limit = a.refused
	}
	if !limit.AllowN(a.Clock.Now(), 1) {
		return
	}
	action := "api.failed"
	if denied {
		action = "api.denied"
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTimeout)
	defer cancel()
	event := domain.AuditEvent{
		ID: newID(id.Audit), At: a.now(), Actor: c.actor(), Action: action,
		Resource: "rpc/" + strings.TrimPrefix(c.method, "/certmesh.operator.v1."), Outcome: string(fault.ClassOf(err)),
		RequestID: c.requestID, RemoteAddr: c.remote, Detail: map[string]string{"message": sentence(err)},
	}
	if err := a.Store.Audit(ctx, []domain.AuditEvent{event}); err != nil {
		a.Log.Error("audit of a refusal failed", "request_id", c.requestID, "error", err)
	}
}

func firstOf(ctx context.Context, key string) string {
	if v := metadata.ValueFromIncomingContext(ctx, key); len(v) > 0 {
		return v[0]
	}
	return ""
}
