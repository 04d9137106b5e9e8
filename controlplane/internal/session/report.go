package session

import (
	"context"
	"errors"
	"io"
	"strconv"

	"google.golang.org/grpc"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxLeaves bounds one report; a host has a handful of leaves, a proxy agent some thousands.
const maxLeaves = 20_000

// Report implements the agent service: it compares the leaves that an agent holds with what was issued to it. A leaf that
// is not on record is counted, logged and put into the trail.
func (s *Server) Report(wire grpc.ClientStreamingServer[agentpb.ReportRequest, agentpb.ReportResponse]) error {
	ctx := wire.Context()
	who, err := s.caller(ctx)
	if err != nil {
		return err
	}
	if !s.Holds(who.agentID) {
		return fault.New(fault.Rejected, "a report belongs to a stream; connect first")
	}
	var prints []string
	unknown := 0
	for last := false; !last; {
		r, err := wire.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return receiveError(err)
		}
		leaves := r.GetLeaves()
		if leaves == nil {
			return fault.New(fault.Invalid, "the report is of a kind that protocol version %d does not have", protocolMax)
		}
		if len(prints)+len(leaves.GetLeaves()) > maxLeaves {
			return fault.New(fault.Exhausted, "a report has at most %d leaves", maxLeaves)
		}
		for _, l := range leaves.GetLeaves() {
			print := domain.HashHex(l.GetCertificate())
			prints = append(prints, print)
			known, err := s.onRecord(ctx, who.agentID, l, print)
			if err != nil {
				return err
			}
			if known {
				continue
			}
			unknown++
			if err := s.unknownLeaf(ctx, who, l, print); err != nil {
				return err
			}
		}
		last = leaves.GetLast()
	}
	s.held.taken(who.agentID, prints)
	return wire.SendAndClose(&agentpb.ReportResponse{Unknown: int32(unknown)})
}

// onRecord reports whether the leaf is the version that was issued to this agent.
func (s *Server) onRecord(ctx context.Context, agentID string, l *agentpb.HeldLeaf, print string) (bool, error) {
	if id := l.GetCertificateId(); id == "" || len(id) > maxID || l.GetGeneration() < 1 {
		return false, nil
	}
	// The list goes down from the cursor: the first after the next generation is this one.
	page := domain.PageRequest{Size: 1, After: agentID + "/" + strconv.FormatInt(l.GetGeneration()+1, 10)}
	all, _, err := s.cfg.Store.Versions(ctx, l.GetCertificateId(), page)
	switch {
	case fault.Is(err, fault.NotFound), fault.Is(err, fault.Invalid):
		return false, nil
	case err != nil:
		return false, err
	}
	return len(all) == 1 && all[0].AgentID == agentID && all[0].Generation == l.GetGeneration() && all[0].Fingerprint == print, nil
}

func (s *Server) unknownLeaf(ctx context.Context, who caller, l *agentpb.HeldLeaf, print string) error {
	s.metrics.unknownLeaves.Inc()
	certificate := clean(l.GetCertificateId(), maxID)
	s.cfg.Log.Warn("agent holds a leaf that is not on record", "agent_id", who.agentID, "certificate_id", certificate,
		"generation", l.GetGeneration(), "fingerprint", print)
	if !s.guard.mayAudit() {
		return nil
	}
	return s.audit(ctx, who, "agent.unknown_leaf", "certificate/"+certificate, string(fault.NotFound),
		map[string]string{"fingerprint": print, "generation": strconv.FormatInt(l.GetGeneration(), 10)})
}
