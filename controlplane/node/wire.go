package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/certmesh/certmesh/cluster/permit"
	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/controlplane/internal/api"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/duty"
	"github.com/certmesh/certmesh/controlplane/internal/gateway/crl"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/controlplane/internal/rest"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/session"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// parts are what runs inside a node.
type parts struct {
	sessions *session.Server
	api      *api.API
	duties   *duty.Runner
	nudge    *nudge
	changes  *hub.Hub
	permits  *permit.Permits
	crls     *crl.Server
}

// wire makes the parts and hands each what it needs of the others.
func (n *Node) wire(ring *secret.Keyring, metrics prometheus.Registerer) (*parts, error) {
	p := &parts{changes: hub.New()}
	authorities := &authorities{store: n.store, ring: ring}
	permits, err := n.newPermits(metrics)
	if err != nil {
		return nil, err
	}
	p.permits = permits
	pipeline, err := issue.New(issue.Config{Store: n.store, Authority: authorities.issuer, Permits: permits, Clock: n.clk,
		NewID: id.New, Log: n.log, Metrics: metrics})
	if err != nil {
		return nil, err
	}
	p.nudge = newNudge(n.clk, n.size, func() {
		p.duties.Trigger(duty.RenewalCheck)
		p.duties.Trigger(duty.JobRetry)
		p.duties.Trigger(duty.ShortLivedExpiry)
	})
	if p.sessions, err = session.New(session.Config{NodeID: n.cfg.Node.ID, TrustDomain: n.cfg.Mesh.TrustDomain, Store: n.store,
		Mesh: n.mesh, Reload: n.trust.reload, Issue: pipeline, Hub: p.changes, Clock: n.clk, Log: n.log, Metrics: metrics, NewID: id.New,
		IdentityTTL: n.cfg.Mesh.IdentityTTL, VerifyTimeout: n.cfg.Jobs.VerifyTimeout, VerifyInterval: n.cfg.Jobs.VerifyInterval, BeatInterval: n.beatInterval(), MaxBeat: n.maxBeat(),
		Handshakes: n.cfg.Mesh.Handshakes, Changed: p.nudge.request,
		Nodes: n.otherNodes, Reachable: n.livingNodes, Alone: n.alone, RemoteWake: n.remoteWake, RemoteDisconnect: n.links.Disconnect, RemotePushState: n.links.PushState}); err != nil {
		return nil, err
	}
	if p.duties, err = duty.NewRunner(duty.Config{Node: n.cfg.Node.ID, Elected: true, RemoteTrigger: func(d string) { n.links.Trigger(d) }, Store: n.store, Clock: n.clk, Log: n.log, Metrics: metrics,
		Duties: duty.Table(duty.Deps{Node: n.cfg.Node.ID, Store: n.store, Settings: n.dutySettings(), Since: n.clk.Now(), Wake: p.sessions.Wake,
			WakeHeld: p.sessions.WakeLocal, Log: n.log,
			CRLs: &crl.Builder{Store: n.store, Signer: authorities.signer, Validity: n.cfg.PKI.CRLValidity, Log: n.log}})}); err != nil {
		return nil, err
	}
	if p.api, err = api.New(api.Config{Store: n.store, Sessions: p.sessions, Issuers: &localIssuers{ring: ring, publicURL: n.publicURL(), now: n.clk.Now},
		CheckTarget: n.checkTarget, Hub: p.changes, Clock: n.clk, Log: n.log, Metrics: metrics,
		Node: api.Node{ID: n.cfg.Node.ID, Version: n.opts.Version, Store: n.store.Dialect(), TrustDomain: n.cfg.Mesh.TrustDomain,
			StartedAt: n.clk.Now()},
		Duties:  p.dutyStatus,
		Changes: n.cfg.API.Changes, ChangesWaiting: n.cfg.API.ChangesWaiting,
		Revoked: func(string) { p.duties.Trigger(duty.CRLGeneration) }}); err != nil {
		return nil, err
	}
	p.crls = crl.NewServer(n.store, n.clk.Now, n.log)
	return p, nil
}

// beatInterval lets an agent miss two beats before it counts as stale.
func (n *Node) beatInterval() time.Duration {
	return min(max(n.cfg.Jobs.AgentStale/3, time.Second), 30*time.Second)
}

// maxBeat is what the interval may stretch to: an agent may still miss one beat, and its last one may wait to be written.
func (n *Node) maxBeat() time.Duration { return n.cfg.Jobs.AgentStale * 9 / 20 }

func (n *Node) dutySettings() duty.Settings {
	s, j := n.cfg.Scheduler, n.cfg.Jobs
	return duty.Settings{
		RenewalCheck: s.RenewalCheckInterval, JobProcessor: s.JobProcessorInterval, JobRetry: s.RetryInterval,
		JobTimeout: s.JobTimeoutInterval, AgentHealth: s.AgentHealthCheckInterval, ShortLivedExpiry: s.ShortLivedExpiryInterval,
		CRLGeneration: s.CRLGenerationInterval, Retention: s.RetentionInterval,
		Limits: domain.ReapLimits{AwaitingCSR: j.AwaitingCSRTimeout, AwaitingApproval: j.AwaitingApprovalTimeout,
			Running: j.RunningTimeout},
		AgentStale: j.AgentStale, AgentOffline: j.AgentOffline, KeepJobs: j.Keep,
	}
}

func (p *parts) dutyStatus() []api.DutyStatus {
	all := p.duties.Status()
	out := make([]api.DutyStatus, len(all))
	for i, s := range all {
		out[i] = api.DutyStatus(s)
	}
	return out
}

// checkTarget lets the connector judge its settings before they are stored; the agent judges them again with its own
// configuration.
func (n *Node) checkTarget(kind string, settings json.RawMessage) []target.Problem {
	kinds := n.opts.targets
	i := slices.IndexFunc(kinds, func(k target.Kind) bool { return k.Name == kind })
	if i < 0 {
		names := make([]string, len(kinds))
		for j, k := range kinds {
			names[j] = k.Name
		}
		return []target.Problem{{Field: "kind", Message: fmt.Sprintf("%q is no kind of target; use one of %v", kind, names)}}
	}
	return kinds[i].Check(settings)
}

// serve starts the listeners.
func (n *Node) serve(l *listeners, metrics prometheus.Gatherer) {
	n.grpcServer = grpc.NewServer(append(n.parts.api.Interceptors(), grpc.Creds(credentials.NewTLS(n.trust.server())))...)
	n.parts.api.Register(n.grpcServer)
	n.meshServer = grpc.NewServer(append(n.parts.sessions.Options(),
		grpc.Creds(credentials.NewTLS(session.TLS(n.trust.certificate, n.trust.pool))))...)
	n.parts.sessions.Register(n.meshServer)
	n.links.Register(n.meshServer)
	n.apiServer = httpServer(rest.Handler(rest.Config{Ping: n.store.Ping, Draining: n.draining.Load, Metrics: metrics}), n.log)
	n.apiServer.TLSConfig = n.trust.server("h2", "http/1.1")
	n.pkiServer = httpServer(n.parts.crls.Handler(), n.log)

	if l.debug != nil {
		n.debugServer = httpServer(profiles(), n.log)
		n.debugServer.WriteTimeout = 3 * time.Minute // a CPU profile is as long as it is asked for
		n.run("listen.debug", func() error { return n.debugServer.Serve(l.debug) })
	}

	n.run("listen.grpc", func() error { return n.grpcServer.Serve(l.grpc) })
	n.run("listen.mesh", func() error { return n.meshServer.Serve(l.mesh) })
	n.run("listen.api", func() error { return n.apiServer.ServeTLS(l.api, "", "") })
	n.run("listen.pki", func() error { return n.pkiServer.Serve(l.pki) })
}

// profiles are Go's own, on a listener that is off unless it is asked for.
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// httpServer bounds what a slow or hostile client can hold.
func httpServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		// Garbage on the port is worth a line for whoever looks, not an alarm.
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// serveConsole answers certmeshd's own commands.
func (n *Node) serveConsole(l net.Listener) {
	n.consoleServer = grpc.NewServer(grpc.MaxConcurrentStreams(16))
	clusterpb.RegisterConsoleServiceServer(n.consoleServer, &desk{n: n})
	n.run("the console's socket", func() error { return n.consoleServer.Serve(l) })
}

// run serves one listener until it ends; an end that nobody asked for fails the node.
func (n *Node) run(name string, serve func() error) {
	n.done.Go(func() {
		err := serve()
		if err == nil || n.draining.Load() || errors.Is(err, http.ErrServerClosed) || errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
			return
		}
		n.end(fmt.Errorf("%s: %w", name, err))
	})
}
