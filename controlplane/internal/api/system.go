package api

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

const (
	// maxWatchers bounds the memory that slow watchers can hold: each at most a hub's pending set, about 20 KiB.
	maxWatchers = 1000
	// watchPause is what a person does not notice, and a screen full of reads a second at most.
	watchPause = 250 * time.Millisecond
	// keyRecheck is how long a revoked key can still watch; a thousand watchers cost the store 17 reads a second.
	keyRecheck = time.Minute
)

func (a system) GetStatus(ctx context.Context, _ *operatorpb.GetStatusRequest) (*operatorpb.GetStatusResponse, error) {
	counts, err := a.Store.Counts(ctx)
	if err != nil {
		return nil, err
	}
	schema, _, err := a.Store.SchemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	return &operatorpb.GetStatusResponse{
		NodeId: a.Node.ID, Version: a.Node.Version, Store: a.Node.Store, SchemaVersion: int32Of(schema), StartedAt: stamp(a.Node.StartedAt),
		CertificatesByStatus: byName(counts.Certificates), AgentsByState: byName(counts.Agents), OpenJobsByState: byName(counts.OpenJobs),
		Sessions: a.Sessions.Count(), Duties: each(a.Duties(), dutyPB), TrustDomain: a.Node.TrustDomain,
		PlacementsLagging: counts.PlacementsLagging,
	}, nil
}

func byName[K ~string](in map[K]int64) map[string]int64 {
	out := make(map[string]int64, len(in))
	for k, n := range in {
		out[string(k)] = n
	}
	return out
}

func dutyPB(d DutyStatus) *operatorpb.DutyStatus {
	return &operatorpb.DutyStatus{
		Name: d.Name, Interval: durationpb.New(d.Interval), LastRun: stamp(d.LastRun), LastError: d.LastError, Epoch: int64(d.Epoch),
	}
}

func (a system) ListAuditEvents(ctx context.Context, r *operatorpb.ListAuditEventsRequest) (*operatorpb.ListAuditEventsResponse, error) {
	all, next, err := a.Store.AuditEvents(ctx, r.GetResource(), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListAuditEventsResponse{Events: each(all, auditPB), NextCursor: next}, nil
}

// Watch sends an empty message at once, so that the client reads what it shows after the subscription exists, and then
// what has changed, at most one message a pause. It ends when the client leaves, its key is no longer good, or the node
// drains.
func (a system) Watch(r *operatorpb.WatchRequest, stream grpc.ServerStreamingServer[operatorpb.WatchResponse]) error {
	ctx := stream.Context()
	if n := a.watchers.Add(1); n > maxWatchers {
		a.watchers.Add(-1)
		return fault.New(fault.Exhausted, "this node serves %d watchers already; close some, or read the list again from time to time", maxWatchers)
	}
	defer a.watchers.Add(-1)
	sub := a.Hub.Subscribe(r.GetKinds(), r.GetId())
	defer sub.Close()
	if err := stream.Send(&operatorpb.WatchResponse{}); err != nil {
		return err
	}
	recheck := a.Clock.NewTicker(keyRecheck)
	defer recheck.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.drain:
			return draining()
		case <-recheck.Chan():
			// The call was admitted once; a key that was revoked since must not listen on for days.
			if err := a.admit(ctx, callOf(ctx)); err != nil && !fault.Is(err, fault.Retryable) {
				return err
			}
		case <-sub.Changed():
			changes, lagged := sub.Take()
			if len(changes) == 0 && !lagged {
				continue
			}
			if err := stream.Send(&operatorpb.WatchResponse{Changes: each(changes, changePB), Lagged: lagged}); err != nil {
				return err
			}
			if err := a.pause(ctx); err != nil {
				return err
			}
		}
	}
}

// pause lets a burst of changes gather into one message.
func (a system) pause(ctx context.Context) error {
	t := a.Clock.NewTimer(watchPause)
	defer t.Stop()
	select {
	case <-t.Chan():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-a.drain:
		return draining()
	}
}

func draining() error {
	return fault.New(fault.Retryable, "this node is shutting down; connect again")
}

func changePB(n hub.Notice) *operatorpb.Change { return &operatorpb.Change{Kind: n.Kind, Id: n.ID} }
