package agentd

import (
	"crypto/x509"
	"path/filepath"
	"time"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/identity"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/agent/internal/state"
)

// Report says what is on a host's disk; it asks no server and changes nothing.
type Report struct {
	// Running: a process holds the data directory.
	Running  bool            `json:"running"`
	Identity *IdentityReport `json:"identity"`
	// States are the versions in force.
	States []StateReport `json:"states"`
	Open   []OpenReport  `json:"open"`
	Keys   []KeyReport   `json:"keys"`
}

// IdentityReport describes the identity; nil in a Report: not enrolled.
type IdentityReport struct {
	AgentID     string    `json:"agent_id"`
	TrustDomain string    `json:"trust_domain"`
	Serial      string    `json:"serial"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	RenewAt     time.Time `json:"renew_at"`
	// Standing is "good", "lapsed" (renewed at the next connection) or "lost" (enrol again).
	Standing string `json:"standing"`
	// TrustBundle is the version of the trust bundle held.
	TrustBundle int64 `json:"trust_bundle"`
}

// StateReport is one state in force.
type StateReport struct {
	Kind    string `json:"kind"`
	Name    string `json:"name,omitempty"`
	Version int64  `json:"version"`
}

// OpenReport is one assignment that is not settled.
type OpenReport struct {
	ID      string `json:"id"`
	Attempt int64  `json:"attempt"`
	// Class is "key", "deploy" or "verify".
	Class string `json:"class"`
	// Phase is "accepted", "csr" or "result".
	Phase string `json:"phase"`
}

// KeyReport is one private key, without its secret.
type KeyReport struct {
	CertificateID string `json:"certificate_id"`
	Generation    int64  `json:"generation"`
	Algorithm     string `json:"algorithm"`
	// NotAfter of the deployed leaf; nil: none is deployed for this key.
	NotAfter *time.Time `json:"not_after,omitempty"`
}

// Status reads a data directory, also beside a running agent. Only DataDir, KeyDir and Clock of cfg are used.
func Status(cfg Config) (Report, error) {
	if len(cfg.Servers) == 0 {
		cfg.Servers = []string{"localhost"} // not used
	}
	cfg.InMemory, cfg.Memory = false, nil
	cfg, err := cfg.withDefaults()
	if err != nil {
		return Report{}, err
	}
	var r Report
	if r.Running, err = durable.Held(filepath.Join(cfg.DataDir, lockFile)); err != nil {
		return r, err
	}
	ids, err := identity.Open(durable.ReadOnlyDir(filepath.Join(cfg.DataDir, "identity")), cfg.Clock.Now, cfg.Log)
	if err != nil {
		return r, err
	}
	if id := ids.Current(); id != nil {
		r.Identity = &IdentityReport{AgentID: id.AgentID, TrustDomain: id.TrustDomain, Serial: id.Serial,
			NotBefore: id.NotBefore, NotAfter: id.NotAfter, RenewAt: ids.RenewAt(id), TrustBundle: ids.Bundle(),
			Standing: map[identity.Standing]string{identity.Good: "good", identity.Lapsed: "lapsed", identity.Lost: "lost"}[id.StandingAt(cfg.Clock.Now())]}
	}
	k, err := state.Open(state.Config{Files: durable.ReadOnlyDir(filepath.Join(cfg.DataDir, "state")), Log: cfg.Log})
	if err != nil {
		return r, err
	}
	for _, v := range k.Versions() {
		r.States = append(r.States, StateReport{v.GetKind(), v.GetName(), v.GetVersion()})
	}
	entries, err := journal.View(filepath.Join(cfg.DataDir, "journal"))
	if err != nil {
		return r, err
	}
	for _, e := range entries {
		o := OpenReport{ID: e.Assignment.GetId(), Attempt: e.Assignment.GetAttempt(), Class: "key", Phase: "accepted"}
		if e.Assignment.GetDeploy() != nil {
			o.Class = "deploy"
		} else if e.Assignment.GetVerify() != nil {
			o.Class = "verify"
		}
		switch {
		case e.Result != nil:
			o.Phase = "result"
		case len(e.CSR) > 0:
			o.Phase = "csr"
		}
		r.Open = append(r.Open, o)
	}
	infos, err := keystore.View(cfg.KeyDir).List()
	if err != nil {
		return r, err
	}
	for _, i := range infos {
		kr := KeyReport{CertificateID: i.CertificateID, Generation: i.Generation, Algorithm: i.Algorithm}
		if c, err := x509.ParseCertificate(i.Leaf); err == nil {
			kr.NotAfter = &c.NotAfter
		}
		r.Keys = append(r.Keys, kr)
	}
	return r, nil
}
