package api

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/fair"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// TestBusyNode: who comes when as many change something as may, and as many wait, is told when to come back, before
// anything was done; reads are served all the same, and a place that is free again is taken.
func TestBusyNode(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	r.changes = fair.NewGate(1, 0, 0)
	leave, err := r.changes.Enter(context.Background(), "somebody")
	if err != nil {
		t.Fatal(err)
	}
	before := len(r.store.audits)
	create := func() error {
		_, err := operatorpb.NewAgentsServiceClient(r.conn).CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
		return err
	}
	err = create()
	if status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("%v", err)
	}
	delay := false
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok && info.GetRetryDelay().AsDuration() == busyDelay {
			delay = true
		}
	}
	if !delay {
		t.Errorf("no delay in %v", status.Convert(err).Details())
	}
	if n := testutil.ToFloat64(r.turned.WithLabelValues("busy")); n != 1 {
		t.Errorf("%v refusals were counted", n)
	}
	if n := len(r.store.audits); n != before {
		t.Errorf("%d audit rows were written for a refusal", n-before)
	}
	if _, err := operatorpb.NewAgentsServiceClient(r.conn).ListAgents(ctx, &operatorpb.ListAgentsRequest{}); err != nil {
		t.Errorf("a read: %v", err)
	}
	leave()
	if err := create(); err != nil {
		t.Errorf("after the others: %v", err)
	}
}

// TestChangesWaitInTurns: a key that has as many calls waiting as it may is refused, another key's call waits and is served.
func TestChangesWaitInTurns(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	second := r.addKey(t, "second", authz.Admin, time.Time{}, false)
	r.changes = fair.NewGate(1, 2, 8)
	leave, err := r.changes.Enter(context.Background(), "somebody")
	if err != nil {
		t.Fatal(err)
	}
	create := func(key string) error {
		_, err := operatorpb.NewAgentsServiceClient(r.conn).CreateJoinToken(r.with(t, "Bearer "+key), &operatorpb.CreateJoinTokenRequest{})
		return err
	}
	const calls = 5
	answers := make(chan error, calls)
	for range calls {
		go func() { answers <- create(r.keys[authz.Admin]) }()
	}
	for range calls - 2 {
		if err := <-answers; status.Code(err) != codes.ResourceExhausted {
			t.Errorf("beyond its share a key's call got %v", err)
		}
	}
	other := make(chan error, 1)
	go func() { other <- create(second) }()
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		if _, n := r.changes.Load(); n == 3 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d wait", n)
		}
	}
	leave()
	for _, c := range []chan error{other, answers, answers} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
}
