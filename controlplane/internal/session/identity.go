package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// caller is who is at the other end, by its client certificate alone.
type caller struct {
	agentID, serial   string
	notAfter          time.Time
	certificate       *x509.Certificate // verified; nil for who has shown none
	remote, requestID string
}

func (c caller) actor() string {
	if c.agentID == "" {
		return "anonymous"
	}
	return "agent:" + c.agentID
}

// caller reads the verified client certificate. Whether it was revoked is judged when the session is opened.
func (s *Server) caller(ctx context.Context) (caller, error) {
	c := caller{remote: remoteOf(ctx), requestID: requestOf(ctx)}
	tlsInfo, ok := tlsOf(ctx)
	if !ok || len(tlsInfo.State.VerifiedChains) == 0 || len(tlsInfo.State.VerifiedChains[0]) == 0 {
		return c, fault.New(fault.Unauthorized, "an agent's client certificate is needed; join with a token first")
	}
	cert := tlsInfo.State.VerifiedChains[0][0]
	domainName, kind, agentID, err := ca.ParseSPIFFE(cert)
	switch {
	case err != nil:
		return c, err
	case domainName != s.cfg.TrustDomain:
		return c, fault.New(fault.Unauthorized, "the client certificate is of trust domain %q, this is %q", domainName, s.cfg.TrustDomain)
	case kind != ca.KindAgent:
		return c, fault.New(fault.Unauthorized, "the client certificate is not an agent's")
	}
	c.agentID, c.serial, c.notAfter, c.certificate = agentID, ca.SerialText(cert.SerialNumber), cert.NotAfter, cert
	return c, nil
}

func tlsOf(ctx context.Context) (credentials.TLSInfo, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return credentials.TLSInfo{}, false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	return info, ok
}

// remoteOf is the peer's address without its port, which says nothing about who it is.
func remoteOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return clean(p.Addr.String(), 64)
	}
	return host
}

// revoked recognises the reason of a Disconnect that is about the identity, not the agent.
func revoked(reason string) bool { return strings.Contains(reason, "revoked") }

func (s *Server) audit(ctx context.Context, who caller, action, resource, outcome string, detail map[string]string) error {
	return s.cfg.Store.Audit(ctx, []domain.AuditEvent{{ID: s.cfg.NewID(id.Audit), At: s.now(), Actor: who.actor(), Action: action,
		Resource: resource, Outcome: outcome, RequestID: who.requestID, RemoteAddr: who.remote, Detail: detail}})
}

// refused follows a failed Enroll or Reidentify: it counts against the peer and goes into the trail, without anything
// secret. It returns err.
func (s *Server) refused(ctx context.Context, who caller, action, resource string, err error) error {
	class := fault.ClassOf(err)
	s.metrics.refused.WithLabelValues(string(class)).Inc()
	if class == fault.Internal || class == fault.Retryable {
		s.cfg.Log.Error(action, "remote_addr", who.remote, "request_id", who.requestID, "err", err)
		return err
	}
	s.guard.failed(who.remote)
	if s.guard.mayAudit() {
		actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer cancel()
		if aerr := s.audit(actx, who, action, resource, string(class), map[string]string{"message": dispatch.FailureOf(err).Message}); aerr != nil {
			s.cfg.Log.Error("refusal not audited", "request_id", who.requestID, "err", aerr)
		}
	}
	return err
}

// enter bounds what callers without an identity can cost: per peer by failures, for all by the gate.
func (s *Server) enter(who caller) (leave func(), err error) {
	if until, ok := s.guard.mayTry(who.remote); !ok {
		s.metrics.refused.WithLabelValues(string(fault.RateLimited)).Inc()
		return nil, fault.Limited(until, "too many refused attempts from this address; try again later")
	}
	if !s.gate.TryAcquire(1) {
		s.metrics.refused.WithLabelValues("overloaded").Inc()
		return nil, fault.New(fault.Retryable, "this node admits agents at a bounded rate; come back a little later")
	}
	return func() { s.gate.Release(1) }, nil
}

// Enroll implements the agent service.
func (s *Server) Enroll(ctx context.Context, r *agentpb.EnrollRequest) (*agentpb.EnrollResponse, error) {
	who := caller{remote: remoteOf(ctx), requestID: requestOf(ctx)}
	leave, err := s.enter(who)
	if err != nil {
		return nil, err
	}
	defer leave()
	resp, resource, err := s.enroll(ctx, who, r)
	if err != nil {
		return nil, s.refused(ctx, who, "agent.enroll_refused", resource, err)
	}
	return resp, nil
}

func (s *Server) enroll(ctx context.Context, who caller, r *agentpb.EnrollRequest) (resp *agentpb.EnrollResponse, resource string, err error) {
	tokenID, secret, _, err := authz.ParseJoinToken(r.GetToken())
	if err != nil {
		return nil, "token/", err
	}
	resource = "token/" + clean(tokenID, 64)
	csr, err := ca.CheckIdentityCSR(r.GetCsr())
	if err != nil {
		return nil, resource, err
	}
	facts := factsFrom(r.GetFacts())
	name := clean(r.GetName(), 128)
	if name == "" {
		name = facts.Hostname
	}
	op := domain.Op{Actor: "anonymous", RequestID: who.requestID, RemoteAddr: who.remote, At: s.now()}
	a, err := s.cfg.Store.Enroll(ctx, domain.Enrollment{TokenID: tokenID, TokenHash: authz.HashSecret(secret), SPKI: csr.SPKI,
		AgentID: s.cfg.NewID(id.Agent), Name: name, Facts: facts, Op: op})
	if err != nil {
		return nil, resource, err
	}
	op.Actor = "agent:" + a.ID
	chain, err := s.identity(ctx, a.ID, csr, op)
	if err != nil {
		return nil, resource, err
	}
	trust, _, _, err := s.trust(ctx, false)
	if err != nil {
		return nil, resource, err
	}
	s.cfg.Log.Info("agent enrolled", "agent_id", a.ID, "name", a.Name, "remote_addr", who.remote, "request_id", who.requestID)
	s.cfg.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: a.ID})
	return &agentpb.EnrollResponse{AgentId: a.ID, Chain: chain, TrustBundle: trust, TrustDomain: s.cfg.TrustDomain}, resource, nil
}

// identity makes an identity for a key, or returns the one that was made for it a moment ago: an agent that lost the answer
// asks again.
func (s *Server) identity(ctx context.Context, agentID string, csr *ca.CSR, op domain.Op) ([][]byte, error) {
	if m, ok := s.issued.get(agentID, csr.SPKI, op.At); ok {
		// Revoked meanwhile, it is of no use to anyone.
		if known, err := s.cfg.Store.Identity(ctx, m.serial); err == nil && known.RevokedAt.IsZero() {
			return m.chain, nil
		}
	}
	if until, ok := s.issued.mayMake(agentID, op.At, s.identityGap()); !ok {
		return nil, fault.Limited(until, "this agent was given several identities a moment ago; ask again later")
	}
	chain, serial, err := s.makeIdentity(ctx, agentID, csr, op)
	if fault.Is(err, fault.Conflict) && s.cfg.Reload != nil {
		// Another CA signs since a moment ago, and this node has not noticed yet.
		if err = s.cfg.Reload(ctx); err == nil {
			chain, serial, err = s.makeIdentity(ctx, agentID, csr, op)
		}
	}
	if err != nil {
		return nil, err
	}
	s.issued.put(agentID, csr.SPKI, madeIdentity{chain, serial, op.At.Add(min(identityMemory, s.cfg.IdentityTTL/4))})
	return chain, nil
}

// makeIdentity signs with the CA that signs as far as this node knows. Conflict: another one does.
func (s *Server) makeIdentity(ctx context.Context, agentID string, csr *ca.CSR, op domain.Op) (chain [][]byte, serial string, err error) {
	mesh := s.cfg.Mesh()
	p, err := mesh.PrepareIdentity(ca.IdentityRequest{PublicKey: csr.PublicKey, Kind: ca.KindAgent, ID: agentID, TTL: s.cfg.IdentityTTL, Now: op.At})
	if err != nil {
		return nil, "", err
	}
	// Recorded before it is signed: an identity that the store does not know could not be revoked.
	err = s.cfg.Store.RecordIdentity(ctx, domain.Identity{Serial: p.Serial(), AgentID: agentID, SPKI: p.SPKI(), NotBefore: p.NotBefore(),
		NotAfter: p.NotAfter(), CreatedAt: op.At, Generation: mesh.Generation()}, op)
	if err != nil {
		return nil, "", err
	}
	der, err := mesh.Sign(p.TBS())
	if err != nil {
		return nil, "", err
	}
	return append([][]byte{der}, mesh.Chain()...), p.Serial(), nil
}

const (
	// identityMemory is how long a repeated request gets the same identity.
	identityMemory = time.Hour
	maxIdentities  = 4096
	// identityBurst is how many identities an agent gets in a row, whichever way it asks; then one a gap. Each is a row for
	// good.
	identityBurst = 5
)

// identities remembers what was made lately.
type identities struct {
	mu   sync.Mutex
	made map[identityKey]madeIdentity
	// rates are by agent.
	rates map[string]*rate.Limiter
}

type identityKey struct{ agentID, spki string }

type madeIdentity struct {
	chain  [][]byte
	serial string
	until  time.Time
}

func (i *identities) get(agentID, spki string, now time.Time) (madeIdentity, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	m, ok := i.made[identityKey{agentID, spki}]
	return m, ok && now.Before(m.until)
}

// mayMake takes one of the identities that an agent may be given, or says from when on it may.
func (i *identities) mayMake(agentID string, now time.Time, gap time.Duration) (time.Time, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	l := i.rates[agentID]
	if l == nil {
		if i.rates == nil || len(i.rates) >= maxIdentities {
			i.rates = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(rate.Every(gap), identityBurst)
		i.rates[agentID] = l
	}
	return now.Add(gap), l.AllowN(now, 1)
}

func (i *identities) put(agentID, spki string, m madeIdentity) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.made == nil || len(i.made) >= maxIdentities {
		i.made = map[identityKey]madeIdentity{}
	}
	i.made[identityKey{agentID, spki}] = m
}

func (i *identities) forget(now time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for k, m := range i.made {
		if !now.Before(m.until) {
			delete(i.made, k)
		}
	}
	for id, l := range i.rates {
		if l.TokensAt(now) >= identityBurst {
			delete(i.rates, id)
		}
	}
}

// identityGap is the least time between two identities of one stream; short lives, as in tests, allow shorter ones.
func (s *Server) identityGap() time.Duration { return min(30*time.Second, s.cfg.IdentityTTL/20) }

// renew makes an identity for a stream's agent; st.mu is held.
func (st *stream) renew(der []byte) {
	s := st.s
	s.store.do(ownWork, func() {
		ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
		defer cancel()
		var chain [][]byte
		err := contain(s.cfg.Log, "renew an identity", func() error {
			csr, err := ca.CheckIdentityCSR(der)
			if err != nil {
				return err
			}
			op := domain.Op{Actor: st.who.actor(), RequestID: st.who.requestID, RemoteAddr: st.who.remote, At: s.now()}
			chain, err = s.identity(ctx, st.who.agentID, csr, op)
			return err
		})
		if err != nil {
			s.cfg.Log.Warn("identity not renewed", "agent_id", st.who.agentID, "err", err)
		}
		st.proto(IdentityMade{Chain: chain, Err: err})
	})
}

const (
	// identityGrace is how long after its end an identity may still be renewed by Reidentify.
	identityGrace  = domain.IdentityGrace
	exporterLabel  = "EXPORTER-certmesh-reidentify"
	exporterLength = 32
	proofPrefix    = "certmesh reidentify v1\x00"
)

// Reidentify implements the agent service.
func (s *Server) Reidentify(ctx context.Context, r *agentpb.ReidentifyRequest) (*agentpb.ReidentifyResponse, error) {
	who := caller{remote: remoteOf(ctx), requestID: requestOf(ctx)}
	leave, err := s.enter(who)
	if err != nil {
		return nil, err
	}
	defer leave()
	// Only what was proven is written down: until then the agent is a claim.
	resp, agentID, err := s.reidentify(ctx, who, r)
	if err != nil {
		resource := "agent/"
		if agentID != "" {
			resource += agentID
		}
		return nil, s.refused(ctx, who, "agent.reidentify_refused", resource, err)
	}
	return resp, nil
}

func (s *Server) reidentify(ctx context.Context, who caller, r *agentpb.ReidentifyRequest) (resp *agentpb.ReidentifyResponse, agentID string, err error) {
	trust, _, roots, err := s.trust(ctx, false)
	if err != nil {
		return nil, "", err
	}
	cert, agentID, err := s.expired(r.GetCertificate(), roots)
	if err != nil {
		return nil, "", err
	}
	if err := prove(ctx, cert, r.GetCsr(), r.GetProofOfPossession()); err != nil {
		return nil, agentID, err
	}
	csr, err := ca.CheckIdentityCSR(r.GetCsr())
	if err != nil {
		return nil, agentID, err
	}
	serial := ca.SerialText(cert.SerialNumber)
	known, err := s.cfg.Store.Identity(ctx, serial)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && known.AgentID != agentID:
		return nil, agentID, fault.New(fault.Unauthorized, "identity %s is not known here; join again with a new token", serial)
	case err != nil:
		return nil, agentID, err
	case !known.RevokedAt.IsZero():
		return nil, agentID, fault.New(fault.Unauthorized, "identity %s is revoked; join again with a new token", serial)
	}
	a, err := s.cfg.Store.Agent(ctx, agentID)
	if err != nil {
		return nil, agentID, err
	}
	if a.State == domain.AgentRetired {
		return nil, agentID, fault.New(fault.Forbidden, "agent %q is retired; remove its identity and join again with a new token", a.Name)
	}
	who.agentID = agentID
	op := domain.Op{Actor: who.actor(), RequestID: who.requestID, RemoteAddr: who.remote, At: s.now()}
	chain, err := s.identity(ctx, agentID, csr, op)
	if err != nil {
		return nil, agentID, err
	}
	err = s.audit(ctx, who, "agent.reidentified", "agent/"+agentID, "ok", map[string]string{"expired_serial": serial,
		"expired_at": cert.NotAfter.UTC().Format(time.RFC3339)})
	if err != nil {
		return nil, agentID, err
	}
	s.cfg.Log.Info("expired identity renewed", "agent_id", agentID, "remote_addr", who.remote, "request_id", who.requestID)
	return &agentpb.ReidentifyResponse{Chain: chain, TrustBundle: trust}, agentID, nil
}

// expired checks the certificate of a Reidentify: an identity of ours, by a root we trust, ended at most identityGrace
// ago. One that has not ended passes too: the agent's clock may be ahead of ours.
func (s *Server) expired(der []byte, bundle ca.Bundle) (*x509.Certificate, string, error) {
	if len(der) == 0 || len(der) > maxMessage {
		return nil, "", fault.InvalidField("certificate", "has %d bytes; send the expired identity in DER", len(der))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, "", fault.InvalidField("certificate", "cannot be decoded; send the expired identity in DER")
	}
	pool, err := bundle.Pool()
	if err != nil {
		return nil, "", err
	}
	above := x509.NewCertPool()
	for _, b := range s.cfg.Mesh().Chain() {
		if c, err := x509.ParseCertificate(b); err == nil {
			above.AddCert(c)
		}
	}
	// At its own end, when it was still good: what matters is who signed it.
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, Intermediates: above, CurrentTime: cert.NotAfter,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, "", fault.Wrap(fault.Unauthorized, err, "the certificate is not an identity of this mesh")
	}
	trustDomain, kind, agentID, err := ca.ParseSPIFFE(cert)
	switch {
	case err != nil:
		return nil, "", err
	case trustDomain != s.cfg.TrustDomain || kind != ca.KindAgent:
		return nil, "", fault.New(fault.Unauthorized, "the certificate is not an agent's of this mesh")
	case s.cfg.Clock.Now().After(cert.NotAfter.Add(identityGrace)):
		return nil, "", fault.New(fault.Unauthorized, "the identity expired on %s, more than %d days ago; join again with a new token",
			cert.NotAfter.UTC().Format(time.DateOnly), int(identityGrace.Hours()/24))
	}
	return cert, agentID, nil
}

// prove checks that the caller holds the identity's key, on this very TLS connection and for this very request.
func prove(ctx context.Context, cert *x509.Certificate, csr, proof []byte) error {
	info, ok := tlsOf(ctx)
	if !ok {
		return fault.New(fault.Unauthorized, "a proof needs a TLS connection")
	}
	exported, err := info.State.ExportKeyingMaterial(exporterLabel, nil, exporterLength)
	if err != nil {
		return fault.Wrap(fault.Internal, err, "export keying material")
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fault.New(fault.Unauthorized, "the identity's key is not ECDSA")
	}
	sum := sha256.Sum256(csr)
	message := append(append([]byte(proofPrefix), exported...), sum[:]...)
	digest := sha256.Sum256(message)
	if !ecdsa.VerifyASN1(pub, digest[:], proof) {
		return fault.New(fault.Unauthorized, "the proof of possession does not verify: it must be made with the identity's key, for this connection and this request")
	}
	return nil
}
