package session

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Options are those of every server that Register is called with; credentials come on top. Buffers are small because an
// agent is idle nearly always, and windows are fixed so that a stalled agent costs a bounded amount.
func (s *Server) Options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.streaming),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxHeaderListSize(8 << 10),
		grpc.MaxConcurrentStreams(8),
		grpc.ReadBufferSize(1 << 10),
		grpc.WriteBufferSize(4 << 10),
		grpc.InitialWindowSize(64 << 10),
		grpc.InitialConnWindowSize(128 << 10),
		grpc.ConnectionTimeout(20 * time.Second),
		// Agents ping a silent connection every 60 s.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second, PermitWithoutStream: true}),
		// This side notices a dead agent a little later; a connection without a stream (Enroll) is closed when it is done.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 2 * time.Minute, Time: 90 * time.Second, Timeout: 20 * time.Second}),
	}
}

type requestKey struct{}

// requestOf is the id under which a call is logged and audited.
func requestOf(ctx context.Context) string {
	r, _ := ctx.Value(requestKey{}).(string)
	return r
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	request := s.cfg.NewID(id.Request)
	ctx = context.WithValue(ctx, requestKey{}, request)
	start := s.cfg.Clock.Now()
	var resp any
	err := contain(s.cfg.Log, info.FullMethod, func() error {
		var err error
		resp, err = handle(ctx, req)
		return err
	})
	if err = s.finished(ctx, info.FullMethod, request, start, err); err != nil {
		return nil, err
	}
	return resp, nil
}

// streamContext carries the request id into a stream's handler.
type streamContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *streamContext) Context() context.Context { return s.ctx }

func (s *Server) streaming(srv any, wire grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	request := s.cfg.NewID(id.Request)
	ctx := context.WithValue(wire.Context(), requestKey{}, request)
	start := s.cfg.Clock.Now()
	err := contain(s.cfg.Log, info.FullMethod, func() error { return handle(srv, &streamContext{wire, ctx}) })
	return s.finished(ctx, info.FullMethod, request, start, err)
}

// finished translates the error, once, and logs the call.
func (s *Server) finished(ctx context.Context, method, request string, start time.Time, err error) error {
	st := statusOf(err, request, s.cfg.Clock.Now())
	code := status.Code(st)
	level := slog.LevelInfo
	attrs := []any{"method", method[strings.LastIndexByte(method, '/')+1:], "code", code.String(), "request_id", request,
		"remote_addr", remoteOf(ctx), "duration_ms", s.cfg.Clock.Since(start).Milliseconds()}
	if err != nil {
		attrs = append(attrs, "err", clean(err.Error(), maxFailure))
		if code == codes.Internal || fault.Is(err, fault.Internal) && code == codes.Unknown {
			level = slog.LevelError
		}
	}
	s.cfg.Log.Log(ctx, level, "agent call", attrs...)
	return st
}
