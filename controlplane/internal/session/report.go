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
// is not on record is taken in if a CA of ours signed it (adopt.go), else counted, logged and put into the trail.
func (s *Server) Report(wire grpc.ClientStreamingServer[agentpb.ReportRequest, agentpb.ReportResponse]) error {
	ctx := wire.Context()
	who, err := s.caller(ctx)
	if err != nil {
		return err
	}
	if !s.Holds(who.agentID) {
		return fault.New(fault.Rejected, "a report belongs to a stream; connect first")
	}
	announced, ok := s.held.begin(who.agentID)
	if !ok {
		return fault.New(fault.Rejected, "a report was not asked for, or is under way; Welcome says when one is wanted")
	}
	defer s.held.end(who.agentID, announced)
	var prints []string
	unknown := 0
	adopt := adoption{s: s, who: who}
	issued := record{s: s, agentID: who.agentID, read: map[string]map[int64]string{}}
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
		var missing []*agentpb.HeldLeaf
		for _, l := range leaves.GetLeaves() {
			print := domain.HashHex(l.GetCertificate())
			prints = append(prints, print)
			known, err := issued.has(ctx, l, print)
			if err != nil {
				return err
			}
			if known {
				continue
			}
			missing = append(missing, l)
		}
		unknown += len(missing)
		if err := adopt.take(ctx, missing); err != nil {
			return err
		}
		last = leaves.GetLast()
	}
	s.held.taken(who.agentID, prints)
	return wire.SendAndClose(&agentpb.ReportResponse{Unknown: int32(unknown)})
}

const (
	versionsPage = 200
	// versionsMost bounds the search for one certificate's versions of one agent among those of all its agents.
	versionsMost = 50 * versionsPage
)

// record is what was issued to one agent, read once per certificate of a report.
type record struct {
	s       *Server
	agentID string
	read    map[string]map[int64]string // certificate → generation → fingerprint
}

// has reports whether the leaf is the version that was issued to the agent.
func (r *record) has(ctx context.Context, l *agentpb.HeldLeaf, print string) (bool, error) {
	id := l.GetCertificateId()
	if id == "" || len(id) > maxID {
		return false, nil
	}
	known, ok := r.read[id]
	if !ok {
		var err error
		if known, err = r.versions(ctx, id); err != nil {
			return false, err
		}
		r.read[id] = known
	}
	return known[l.GetGeneration()] == print, nil
}

// versions reads a certificate's versions; the list goes down by agent, so that it ends after the agent's own.
func (r *record) versions(ctx context.Context, certificateID string) (map[int64]string, error) {
	found := map[int64]string{}
	page := domain.PageRequest{Size: versionsPage}
	for range versionsMost / versionsPage {
		all, next, err := r.s.cfg.Store.Versions(ctx, certificateID, page)
		switch {
		case fault.Is(err, fault.NotFound), fault.Is(err, fault.Invalid):
			return found, nil
		case err != nil:
			return nil, err
		}
		for _, v := range all {
			if v.AgentID == r.agentID {
				found[v.Generation] = v.Fingerprint
			}
		}
		if next == "" || len(all) > 0 && all[len(all)-1].AgentID < r.agentID {
			break
		}
		page.After = next
	}
	return found, nil
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
