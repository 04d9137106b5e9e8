package session

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Recovery takes in again what a restore from backup has lost and agents still have.
type Recovery interface {
	// ReadmitIdentity records an identity that was signed before the last recovery and that the restore has lost. Conflict:
	// there was no recovery since it was made, or it is known.
	ReadmitIdentity(ctx context.Context, i domain.Identity, op domain.Op) error
	// CAs returns the material of all CAs, the mesh CA included.
	CAs(ctx context.Context) ([]domain.CA, error)
	// AdoptLeaves takes in leaves whose signatures were verified and says what became of each.
	AdoptLeaves(ctx context.Context, leaves []domain.FoundLeaf, op domain.Op) ([]domain.Adopted, error)
}

// maxForeign is how many leaves that no CA of ours signed a report may have before the rest is not looked at: each may
// cost the verification of a signature.
const maxForeign = 100

// adoption takes in the unknown leaves of one report.
type adoption struct {
	s       *Server
	who     caller
	cas     []domain.CA
	foreign int
}

// take takes in the unknown leaves of one message.
func (a *adoption) take(ctx context.Context, leaves []*agentpb.HeldLeaf) error {
	s := a.s
	var found []domain.FoundLeaf
	for _, l := range leaves {
		f, err := a.verify(ctx, l)
		switch {
		case fault.Is(err, fault.Internal), fault.Is(err, fault.Retryable):
			return err
		case err != nil:
			a.foreign++
			if err := s.unknownLeaf(ctx, a.who, l, domain.HashHex(l.GetCertificate())); err != nil {
				return err
			}
			continue
		}
		found = append(found, f)
	}
	if len(found) == 0 {
		return nil
	}
	outs, err := s.cfg.Store.AdoptLeaves(ctx, found, domain.Op{Actor: a.who.actor(), RequestID: a.who.requestID, RemoteAddr: a.who.remote, At: s.now()})
	if err != nil {
		return err
	}
	for i, o := range outs {
		l := found[i]
		s.metrics.adopted.WithLabelValues(string(o.Adoption)).Inc()
		switch o.Adoption {
		case domain.AdoptionVersion:
			s.cfg.Log.Info("leaf of before the restore adopted", "agent_id", l.AgentID, "certificate", l.CertificateID,
				"generation", l.Generation, "serial", l.Serial)
			s.cfg.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: l.CertificateID})
		case domain.AdoptionFound:
			s.metrics.unknownLeaves.Inc()
			s.cfg.Log.Warn("leaf found that is no version of a certificate", "agent_id", l.AgentID, "certificate", l.CertificateID,
				"generation", l.Generation, "serial", l.Serial, "reason", o.Reason)
		}
	}
	if s.cfg.Changed != nil {
		s.cfg.Changed()
	}
	return nil
}

// verify reads a leaf and makes sure that a CA of ours signed it.
func (a *adoption) verify(ctx context.Context, l *agentpb.HeldLeaf) (domain.FoundLeaf, error) {
	if a.foreign >= maxForeign {
		return domain.FoundLeaf{}, fault.New(fault.Exhausted, "the report has more than %d leaves that no CA of this store signed", maxForeign)
	}
	if a.cas == nil {
		var err error
		if a.cas, err = a.s.cfg.Store.CAs(ctx); err != nil {
			return domain.FoundLeaf{}, err
		}
	}
	f, err := ca.Found(l.GetCertificate(), a.cas)
	if err != nil {
		return f, err
	}
	f.AgentID, f.CertificateID, f.Generation = a.who.agentID, clean(l.GetCertificateId(), maxID), l.GetGeneration()
	return f, nil
}

// readmit records the identity that the agent has shown, if it is one of before the last recovery that the restore has
// lost, and reports whether it did. The handshake has verified that a mesh CA signed it.
func (s *Server) readmit(ctx context.Context, who caller) bool {
	cert := who.certificate
	if cert == nil {
		return false
	}
	if _, err := s.cfg.Store.Identity(ctx, who.serial); !fault.Is(err, fault.NotFound) {
		return false
	}
	mesh := s.cfg.Mesh()
	generation := mesh.Generation()
	if cert.CheckSignatureFrom(mesh.Certificate()) != nil {
		generation-- // the former mesh CA, which is trusted during a rollover
	}
	err := s.cfg.Store.ReadmitIdentity(ctx, domain.Identity{Serial: who.serial, AgentID: who.agentID, SPKI: domain.HashHex(cert.RawSubjectPublicKeyInfo),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), Generation: generation},
		domain.Op{Actor: who.actor(), RequestID: who.requestID, RemoteAddr: who.remote, At: s.now()})
	switch {
	case err == nil:
		s.cfg.Log.Info("identity of before the restore readmitted", "agent_id", who.agentID, "serial", who.serial)
	case !fault.Is(err, fault.Conflict):
		s.cfg.Log.Warn("identity not readmitted", "agent_id", who.agentID, "serial", who.serial, "err", err)
	}
	return err == nil
}
