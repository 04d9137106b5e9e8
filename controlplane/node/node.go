// Package node is the door of the control plane: it wires the parts of one certmeshd and holds no logic of its own. It
// alone knows the store; everything else is handed the few methods it declares.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/link"
	"github.com/certmesh/certmesh/cluster/permit"
	"github.com/certmesh/certmesh/connectors/catalog/onhost"
	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/controlplane/internal/config"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Options are what Start needs.
type Options struct {
	Configuration *Configuration
	Mode          Mode
	Version       string
	Log           *slog.Logger
	// Clock may be nil: the real one.
	Clock clockwork.Clock

	// faults and targets are seams for the crash tests of this package.
	faults  store.Faults
	targets []target.Kind
}

// Addresses are where the listeners really listen.
type Addresses struct{ API, GRPC, Mesh, Raft, PKI, Debug string }

// Node is a running control-plane node.
type Node struct {
	cfg  *config.Config
	opts Options
	log  *slog.Logger
	clk  clockwork.Clock

	lock     *os.File
	store    *store.Store
	member   *membership
	trust    *trust
	links    *link.Mesh
	raft     *cluster.Node
	granter  *permit.Leader
	joined   chan struct{} // closed when raft and granter are there
	parts    *parts
	draining atomic.Bool
	failed   chan error

	grpcServer, meshServer *grpc.Server
	apiServer, pkiServer   *http.Server
	debugServer            *http.Server // nil: off
	consoleServer          *grpc.Server
	addresses              Addresses
	profile                string

	background context.CancelFunc
	done       sync.WaitGroup
	stop       sync.Once
}

// Start brings a node up: the store, the trust, the parts, and at last the listeners. What was begun is taken back when
// a later step fails. ctx bounds the start only.
func Start(ctx context.Context, o Options) (*Node, error) {
	if o.Clock == nil {
		o.Clock = clockwork.NewRealClock()
	}
	if o.targets == nil {
		o.targets = onhost.Targets()
	}
	n := &Node{cfg: &o.Configuration.loaded.Config, opts: o, log: o.Log, clk: o.Clock, failed: make(chan error, 1), joined: make(chan struct{})}
	if err := n.start(ctx); err != nil {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return nil, errors.Join(err, n.Stop(stopCtx))
	}
	return n, nil
}

func (n *Node) start(ctx context.Context) error {
	began := n.clk.Now()
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := n.openStore(ctx, metrics); err != nil {
		return err
	}
	ring, err := n.keyring()
	if err != nil {
		return err
	}
	lis, err := n.listen()
	if err != nil {
		return err
	}
	if n.trust, err = openTrust(ctx, trustConfig{Store: n.store, Ring: ring, Clock: n.clk, Log: n.log, NodeID: n.cfg.Node.ID,
		TrustDomain: n.cfg.Mesh.TrustDomain, Names: n.cfg.Node.Names, TTL: n.cfg.Mesh.IdentityTTL}); err != nil {
		lis.close()
		return err
	}
	// After the trust domain was compared: a token serves once.
	if n.member, err = enter(ctx, n.store, n.cfg, n.clk, n.log); err != nil {
		lis.close()
		return err
	}
	if err := n.store.SeedProfiles(ctx, seedProfiles(n.clk.Now())); err != nil {
		lis.close()
		return fmt.Errorf("seed the profiles: %w", err)
	}
	if n.opts.Mode == Dev {
		if n.profile, err = n.writeClientProfile(ctx); err != nil {
			lis.close()
			return err
		}
	}
	if n.links, err = n.newLinks(metrics); err != nil {
		lis.close()
		return err
	}
	if n.parts, err = n.wire(ring, metrics); err != nil {
		lis.close()
		return err
	}
	metrics.MustRegister(newEstate(n.store, n.clk, n.log))
	// Before anybody is served: sessions and duties ask who else there is.
	if err := n.joinCluster(ctx, lis.raft, metrics); err != nil {
		lis.close()
		return err
	}
	n.serve(lis, metrics)
	n.serveConsole(lis.console)
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	n.background = cancel
	n.done.Go(func() { n.trust.keep(background) })
	n.done.Go(func() { n.trust.watch(background, n.trustChanged) })
	n.done.Go(func() { n.parts.nudge.run(background) })
	n.done.Go(func() { n.followMembers(background) })
	n.done.Go(func() { n.shareChanges(background, n.parts.changes) })
	n.done.Go(func() {
		if err := n.member.keep(background); err != nil {
			n.end(err)
		}
	})
	n.done.Go(func() {
		select {
		case err := <-n.raft.Failed():
			n.end(fmt.Errorf("the cluster: %w", err))
		case <-background.Done():
		}
	})
	n.parts.sessions.Start()
	n.parts.duties.Start()
	n.log.Info("ready", "node", n.cfg.Node.ID, "store", n.store.Dialect(), "version", n.opts.Version, "grpc", n.addresses.GRPC,
		"mesh", n.addresses.Mesh, "api", n.addresses.API, "pki", n.addresses.PKI, "took_ms", n.clk.Since(began).Milliseconds())
	return nil
}

// Failed receives when the node is of no use any more: a listener has ended although nobody stopped it, or the node does
// not belong to the cluster. It receives nil when an operator has asked the node to end.
func (n *Node) Failed() <-chan error { return n.failed }

// end makes Failed receive err, if it is the first.
func (n *Node) end(err error) {
	select {
	case n.failed <- err:
	default:
	}
}

// Addresses are where the listeners really listen, which differs from the configuration when a port was 0.
func (n *Node) Addresses() Addresses { return n.addresses }

// ClientProfile is the path of the operators' profile that Dev writes; empty in other modes.
func (n *Node) ClientProfile() string { return n.profile }

// Stop is the mirror image of Start: not ready any more, duties end, agents are told, calls in flight finish, the store
// closes. What has not finished when ctx ends is cut off. Stopping twice is fine.
func (n *Node) Stop(ctx context.Context) error {
	var errs []error
	n.stop.Do(func() {
		n.draining.Store(true)
		if n.raft != nil {
			n.leaveLeading(ctx)
		}
		if n.parts != nil {
			n.parts.duties.Stop()
			if err := n.parts.sessions.Stop(ctx); err != nil {
				errs = append(errs, fmt.Errorf("end the agents' streams: %w", err))
			}
			n.parts.api.Drain()
			n.parts.permits.Close()
		}
		if n.raft != nil {
			// What is lost with it is made anew; the calls in flight below are not.
			stopping, cancel := context.WithTimeout(ctx, leaveTimeout)
			if err := n.raft.Stop(stopping); err != nil {
				errs = append(errs, fmt.Errorf("stop Raft: %w", err))
			}
			cancel()
		}
		if n.links != nil {
			n.links.Stop()
		}
		for _, s := range []*grpc.Server{n.consoleServer, n.meshServer, n.grpcServer} {
			if s != nil {
				stopGRPC(ctx, s)
			}
		}
		for _, s := range []*http.Server{n.apiServer, n.pkiServer, n.debugServer} {
			if s == nil {
				continue
			}
			if err := s.Shutdown(ctx); err != nil {
				_ = s.Close() // Shutdown has said what there is to say
				errs = append(errs, fmt.Errorf("stop HTTP: %w", err))
			}
		}
		if n.background != nil {
			n.background()
		}
		n.done.Wait()
		if n.store != nil {
			stopCut := context.AfterFunc(ctx, n.store.Cut)
			defer stopCut()
			if err := n.store.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close the store: %w", err))
			}
		}
		if n.lock != nil {
			_ = n.lock.Close() // the lock goes with the process anyway
		}
	})
	return errors.Join(errs...)
}

// stopGRPC lets calls finish until ctx ends.
func stopGRPC(ctx context.Context, s *grpc.Server) {
	gone := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(gone)
	}()
	select {
	case <-gone:
	case <-ctx.Done():
		s.Stop()
		<-gone
	}
}

// openStore takes the data directory, opens the store and sees to its schema.
func (n *Node) openStore(ctx context.Context, metrics prometheus.Registerer) error {
	if err := os.MkdirAll(n.cfg.Node.DataDir, 0o700); err != nil {
		return fault.Wrap(fault.Invalid, err, "cannot make the data directory (node.data_dir)")
	}
	var err error
	if n.lock, err = lockDir(n.cfg.Node.DataDir); err != nil {
		return err
	}
	n.store, err = store.Open(ctx, store.Config{DSN: n.cfg.Store.DSN, NodeID: n.cfg.Node.ID, MaxReaders: n.cfg.Store.MaxReaders,
		Now: n.clk.Now, NewID: id.New, Log: n.log, Metrics: metrics, Faults: n.opts.faults})
	if err != nil {
		return err
	}
	return n.awaitStore(ctx)
}

// schema brings the schema up to date if it is to, and checks it.
func (n *Node) schema(ctx context.Context) error {
	if n.cfg.Store.Migrate {
		if err := n.store.Migrate(ctx); err != nil {
			return fmt.Errorf("bring the schema up to date: %w", err)
		}
	}
	return n.store.CheckSchema(ctx)
}

// awaitStore waits until the database answers and has its schema: a node that starts together with its database, or while that is away, is not
// to be started again by hand. An answer that is a refusal (no such database, a wrong password) is returned at once.
func (n *Node) awaitStore(ctx context.Context) error {
	const patience, again = 5 * time.Second, time.Second
	said := ""
	for {
		ask, cancel := context.WithTimeout(ctx, patience)
		err := n.store.Ping(ask)
		late := ask.Err() != nil
		cancel()
		if err == nil {
			// It may go away meanwhile; a step of the schema takes as long as it takes.
			err = n.schema(ctx)
		}
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fault.Wrap(fault.Retryable, err, "the database did not answer (store.dsn)")
		case !late && !fault.Is(err, fault.Retryable):
			return err
		}
		if text := err.Error(); text != said {
			said = text
			n.log.Warn("the database does not answer; this node waits for it (store.dsn)", "error", err)
		}
		t := n.clk.NewTimer(again)
		select {
		case <-ctx.Done():
			t.Stop()
		case <-t.Chan():
		}
	}
}

// lockDir keeps a second node away from a data directory in use.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "cannot write to the data directory (node.data_dir)")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		return nil, fault.Wrap(fault.Conflict, err, "another certmeshd uses the data directory %s; stop it, or set node.data_dir", dir)
	}
	return f, nil
}

// keyring opens the key-encryption keys; dev makes one beside its data.
func (n *Node) keyring() (*secret.Keyring, error) {
	if n.opts.Mode == Dev {
		return secret.LoadOrCreateFile(n.cfg.Secrets.KEKFile)
	}
	return secret.LoadFile(n.cfg.Secrets.KEKFile)
}

// listeners are bound before anything is made, so that a port in use costs nothing.
type listeners struct{ api, grpc, mesh, raft, pki, debug, console net.Listener }

func (l *listeners) close() {
	for _, x := range []net.Listener{l.api, l.grpc, l.mesh, l.raft, l.pki, l.debug, l.console} {
		if x != nil {
			_ = x.Close() // it has served nothing
		}
	}
}

func (n *Node) listen() (*listeners, error) {
	l := &listeners{}
	for _, b := range []struct {
		key, addr string
		to        *net.Listener
		at        *string
	}{
		{"listen.api", n.cfg.Listen.API, &l.api, &n.addresses.API},
		{"listen.grpc", n.cfg.Listen.GRPC, &l.grpc, &n.addresses.GRPC},
		{"listen.mesh", n.cfg.Listen.Mesh, &l.mesh, &n.addresses.Mesh},
		{"listen.raft", n.cfg.Listen.Raft, &l.raft, &n.addresses.Raft},
		{"listen.pki", n.cfg.Listen.PKI, &l.pki, &n.addresses.PKI},
		{"listen.debug", n.cfg.Listen.Debug, &l.debug, &n.addresses.Debug},
	} {
		if b.addr == "" {
			continue // only listen.debug may be
		}
		x, err := net.Listen("tcp", b.addr)
		if err != nil {
			l.close()
			return nil, fault.Wrap(fault.Invalid, err, "%s: cannot listen; choose another address or stop what uses it", b.key)
		}
		*b.to, *b.at = x, x.Addr().String()
	}
	var err error
	if l.console, err = listenConsole(n.cfg.Node.DataDir); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// publicURL is the base of CRL and CA URLs: configured, or in dev the pki listener itself.
func (n *Node) publicURL() string {
	if n.cfg.PKI.PublicURL != "" {
		return n.cfg.PKI.PublicURL
	}
	return "http://" + n.addresses.PKI
}
