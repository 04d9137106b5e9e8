package api

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// watcher is an open Watch whose first message has arrived.
type watcher struct {
	stream grpc.ServerStreamingClient[operatorpb.WatchResponse]
	cancel context.CancelFunc
}

func (r *rig) watch(t *testing.T, req *operatorpb.WatchRequest) watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(r.as(t, authz.Viewer))
	t.Cleanup(cancel)
	s, err := r.system().Watch(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	w := watcher{s, cancel}
	if first := w.next(t); len(first.GetChanges()) != 0 || first.GetLagged() {
		t.Fatalf("the first message is %v; want an empty one", first)
	}
	return w
}

func (w watcher) next(t *testing.T) *operatorpb.WatchResponse {
	t.Helper()
	m, err := w.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// paused waits until n watchers pause after a message; their tickers wait too.
func (r *rig) paused(t *testing.T, n int) {
	t.Helper()
	if err := r.clock.BlockUntilContext(r.as(t, authz.Viewer), 2*n); err != nil {
		t.Fatal(err)
	}
}

func TestWatchCoalesces(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	w := r.watch(t, &operatorpb.WatchRequest{})
	r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "j0"})
	if got := see(w.next(t), "changes.id"); got != "j0" {
		t.Fatalf("changes %s", got)
	}
	// A burst while the watcher pauses is one message, each resource in it once.
	r.paused(t, 1)
	for i := range 1000 {
		r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: fmt.Sprintf("j%d", i%3)}, hub.Notice{Kind: hub.Certificates, ID: "c"})
	}
	r.clock.Advance(watchPause)
	if got := w.next(t); see(got, "changes.id") != "j0|c|j1|j2" || see(got, "changes.kind") != "jobs|certificates|jobs|jobs" || got.GetLagged() {
		t.Errorf("got %v", got)
	}
}

// TestWatchSeesWhatTheAPIChanges: writes of one operator reach another's screen.
func TestWatchSeesWhatTheAPIChanges(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]struct{ changes string }{
		operatorpb.CertificatesService_RenewCertificate_FullMethodName:  {"certificates/" + certID + "|jobs/" + jobID},
		operatorpb.CertificatesService_RevokeCertificate_FullMethodName: {"certificates/" + certID + "|jobs/" + jobID},
		operatorpb.AgentsService_RetireAgent_FullMethodName:             {"agents/" + webAgent + "|jobs/" + jobID + "|certificates/" + certID},
		operatorpb.AgentsService_ReleaseAgent_FullMethodName:            {"agents/" + mailAgent},
		operatorpb.JobsService_CancelJob_FullMethodName:                 {"jobs/" + jobID + "|certificates/" + certID},
		operatorpb.CertificatesService_DeployCertificate_FullMethodName: {"certificates/" + certID + "|jobs/" + jobID},
		operatorpb.JobsService_ApproveJob_FullMethodName:                {"jobs/" + waitingJob + "|certificates/" + otherCert},
		operatorpb.JobsService_RejectJob_FullMethodName:                 {"jobs/" + waitingJob + "|certificates/" + otherCert},
		operatorpb.IssuersService_CreateIssuer_FullMethodName:           {"issuers/*"},
		operatorpb.TargetsService_CreateTarget_FullMethodName:           {"targets/*"},
		operatorpb.CertificatesService_CreateCertificate_FullMethodName: {"certificates/*|jobs/*"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t).estate(t)
			sub := r.Hub.Subscribe(nil, "")
			defer sub.Close()
			m := methodOf(t, goodRequests[name])
			if _, err := m.call(r.as(t, authz.Admin), t, r.conn, goodRequests[name]); err != nil {
				t.Fatal(err)
			}
			changes, _ := sub.Take()
			var got string
			for i, c := range changes {
				if i > 0 {
					got += "|"
				}
				if want.changes[len(want.changes)-1] == '*' {
					c.ID = "*"
				}
				got += c.Kind + "/" + c.ID
			}
			if got != want.changes {
				t.Errorf("notices %s, want %s", got, want.changes)
			}
		})
	}
}

func TestWatchLags(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	w := r.watch(t, &operatorpb.WatchRequest{Kinds: []string{"jobs"}})
	r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "first"})
	w.next(t)
	r.paused(t, 1)
	for i := range 10_000 {
		r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: fmt.Sprint(i)})
	}
	r.clock.Advance(watchPause)
	got := w.next(t)
	if !got.GetLagged() || len(got.GetChanges()) > 1000 {
		t.Fatalf("lagged %v with %d changes", got.GetLagged(), len(got.GetChanges()))
	}
	r.paused(t, 1)
	r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "last"})
	r.clock.Advance(watchPause)
	if got := w.next(t); got.GetLagged() || see(got, "changes.id") != "last" {
		t.Errorf("after the lag: %v", got)
	}
}

func TestWatchEndsOnDrain(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	idle, pausing := r.watch(t, &operatorpb.WatchRequest{}), r.watch(t, &operatorpb.WatchRequest{Id: "x"})
	r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "x"})
	idle.next(t)
	pausing.next(t)
	r.Drain()
	r.Drain()
	for _, w := range []watcher{idle, pausing} {
		_, err := w.stream.Recv()
		wantCode(t, err, codes.Unavailable, "connect again")
	}
	// A watch that begins while the node drains gets its first message and the reason.
	s, err := r.system().Watch(r.as(t, authz.Viewer), &operatorpb.WatchRequest{})
	if err == nil {
		if _, err = s.Recv(); err == nil {
			_, err = s.Recv()
		}
	}
	wantCode(t, err, codes.Unavailable)
}

func TestWatchEndsWithItsClient(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	w := r.watch(t, &operatorpb.WatchRequest{})
	w.cancel()
	if _, err := w.stream.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("%v", err)
	}
	eventually(t, "the subscription ends", func() bool { return r.Hub.Subscribers() == 0 && r.watchers.Load() == 0 })
}

// TestWatchEndsWithItsKey: a revoked key does not listen on; a store that is down ends nothing.
func TestWatchEndsWithItsKey(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	w := r.watch(t, &operatorpb.WatchRequest{})
	r.store.setBefore(func(string) error { return fault.New(fault.Retryable, "the store is away") })
	if err := r.clock.BlockUntilContext(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(keyRecheck)
	r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "x"})
	w.next(t)
	r.paused(t, 1)
	r.clock.Advance(watchPause)
	r.store.setBefore(nil)
	r.store.mu.Lock()
	for i := range r.store.keys {
		r.store.keys[i].RevokedAt = start
	}
	r.store.mu.Unlock()
	if err := r.clock.BlockUntilContext(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(keyRecheck)
	_, err := w.stream.Recv()
	wantCode(t, err, codes.Unauthenticated, "revoked")
}

func TestWatchersAreBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.watchers.Store(maxWatchers)
	s, err := r.system().Watch(r.as(t, authz.Viewer), &operatorpb.WatchRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	wantCode(t, err, codes.ResourceExhausted, "watchers already")
	if n := r.watchers.Load(); n != maxWatchers {
		t.Errorf("%d watchers are counted", n)
	}
	r.watchers.Store(0)
	r.watch(t, &operatorpb.WatchRequest{})
}

// brokenStream fails every Send, as one does whose client is gone.
type brokenStream struct {
	grpc.ServerStream
	ctx context.Context
}

var errGone = errors.New("gone")

func (b brokenStream) Context() context.Context             { return b.ctx }
func (b brokenStream) Send(*operatorpb.WatchResponse) error { return errGone }
func (b brokenStream) SetHeader(metadata.MD) error          { return nil }

func TestWatchOfABrokenStreamEnds(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	if err := (system{API: r.API}).Watch(&operatorpb.WatchRequest{}, brokenStream{ctx: t.Context()}); !errors.Is(err, errGone) {
		t.Error(err)
	}
	if r.Hub.Subscribers() != 0 {
		t.Error("the subscription stays")
	}
}
