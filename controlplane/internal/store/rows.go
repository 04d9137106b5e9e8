package store

import (
	"database/sql"
	"fmt"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// The rows that several aggregates read: their columns in the order in which they are scanned, and the way into domain.
// The columns carry their table's name, so that they can be joined.

type scanner func(dest ...any) error

const jobColumns = `job.id, job.kind, job.state, job.certificate_id, job.agent_id, job.target_id, job.generation, job.attempt,
 job.tries, job.max_tries, job.run_at, job.accepted_at, job.error_class, job.error, job.reason, job.request_id, job.created_at,
 job.updated_at, job.finished_at`

type jobRow struct {
	domain.Job
	runAt, acceptedAt, createdAt, updatedAt int64
	finishedAt                              sql.NullInt64
}

func (r *jobRow) dest() []any {
	return []any{&r.ID, &r.Kind, &r.State, &r.CertificateID, &r.AgentID, &r.TargetID, &r.Generation, &r.Attempt,
		&r.Tries, &r.MaxTries, &r.runAt, &r.acceptedAt, &r.ErrorClass, &r.Error, &r.Reason, &r.RequestID, &r.createdAt,
		&r.updatedAt, &r.finishedAt}
}

func (r *jobRow) toDomain() domain.Job {
	j := r.Job
	j.RunAt, j.AcceptedAt = fromMicro(r.runAt), fromMicro(r.acceptedAt)
	j.CreatedAt, j.UpdatedAt, j.FinishedAt = fromMicro(r.createdAt), fromMicro(r.updatedAt), fromNull(r.finishedAt)
	return j
}

func scanJob(scan scanner) (domain.Job, error) {
	var r jobRow
	if err := scan(r.dest()...); err != nil {
		return domain.Job{}, err
	}
	return r.toDomain(), nil
}

const leafColumns = `leaf.certificate_id, leaf.agent_id, leaf.generation, leaf.current_generation, leaf.serial, leaf.not_before,
 leaf.not_after, leaf.due_at, leaf.failures, leaf.backoff_until, leaf.last_error, leaf.revoked`

type leafRow struct {
	domain.Leaf
	notBefore, notAfter, backoff int64
	due                          sql.NullInt64
}

func (r *leafRow) dest() []any {
	return []any{&r.CertificateID, &r.AgentID, &r.Generation, &r.Current, &r.Serial, &r.notBefore,
		&r.notAfter, &r.due, &r.Failures, &r.backoff, &r.LastError, &r.Revoked}
}

func (r *leafRow) toDomain() domain.Leaf {
	l := r.Leaf
	l.NotBefore, l.NotAfter = fromMicro(r.notBefore), fromMicro(r.notAfter)
	l.DueAt, l.BackoffUntil = fromNull(r.due), fromMicro(r.backoff)
	return l
}

func scanLeaf(scan scanner) (domain.Leaf, error) {
	var r leafRow
	if err := scan(r.dest()...); err != nil {
		return domain.Leaf{}, err
	}
	return r.toDomain(), nil
}

const placementColumns = `placement.certificate_id, placement.target_id, placement.agent_id, placement.state,
 placement.installed_generation, placement.served_generation, placement.installed_fingerprint, placement.served_fingerprint,
 placement.served_at, placement.failures, placement.backoff_until, placement.last_error, placement.drifted_at, placement.updated_at`

type placementRow struct {
	domain.Placement
	servedAt, backoff, driftedAt, updatedAt int64
}

func (r *placementRow) dest() []any {
	return []any{&r.CertificateID, &r.TargetID, &r.AgentID, &r.State,
		&r.InstalledGeneration, &r.ServedGeneration, &r.InstalledFingerprint, &r.ServedFingerprint,
		&r.servedAt, &r.Failures, &r.backoff, &r.LastError, &r.driftedAt, &r.updatedAt}
}

func (r *placementRow) toDomain() domain.Placement {
	p := r.Placement
	p.ServedAt, p.BackoffUntil, p.UpdatedAt = fromMicro(r.servedAt), fromMicro(r.backoff), fromMicro(r.updatedAt)
	p.DriftedAt = fromMicro(r.driftedAt)
	return p
}

const versionColumns = `version.issuer_id, version.serial, version.certificate_id, version.agent_id, version.generation,
 version.der, version.chain, version.fingerprint, version.spki, version.key_algorithm, version.not_before, version.not_after,
 version.revoked_at, version.revocation_reason, version.created_at`

type versionRow struct {
	domain.Version
	chain                          []byte
	notBefore, notAfter, createdAt int64
	revokedAt                      sql.NullInt64
}

func (r *versionRow) dest() []any {
	return []any{&r.IssuerID, &r.Serial, &r.CertificateID, &r.AgentID, &r.Generation,
		&r.DER, &r.chain, &r.Fingerprint, &r.SPKI, &r.KeyAlgorithm, &r.notBefore, &r.notAfter,
		&r.revokedAt, &r.RevocationReason, &r.createdAt}
}

func (r *versionRow) toDomain() (domain.Version, error) {
	v := r.Version
	v.NotBefore, v.NotAfter = fromMicro(r.notBefore), fromMicro(r.notAfter)
	v.RevokedAt, v.CreatedAt = fromNull(r.revokedAt), fromMicro(r.createdAt)
	var err error
	v.Chain, err = splitDER(r.chain)
	return v, err
}

func scanVersion(scan scanner) (domain.Version, error) {
	var r versionRow
	if err := scan(r.dest()...); err != nil {
		return domain.Version{}, err
	}
	return r.toDomain()
}

const targetColumns = `target.id, target.name, target.agent_id, target.kind, target.settings, target.verify_address,
 target.server_name, target.enabled, target.created_at, target.revision`

type targetRow struct {
	domain.Target
	createdAt int64
}

func (r *targetRow) dest() []any {
	return []any{&r.ID, &r.Name, &r.AgentID, &r.Kind, &r.Settings, &r.VerifyAddress,
		&r.ServerName, &r.Enabled, &r.createdAt, &r.Revision}
}

func (r *targetRow) toDomain() domain.Target {
	t := r.Target
	t.CreatedAt = fromMicro(r.createdAt)
	return t
}

func scanTarget(scan scanner) (domain.Target, error) {
	var r targetRow
	if err := scan(r.dest()...); err != nil {
		return domain.Target{}, err
	}
	return r.toDomain(), nil
}

const agentColumns = `agent.id, agent.name, agent.state, agent.labels, agent.facts, agent.capabilities, agent.protocol,
 agent.reason, agent.created_at, agent.last_seen, agent.offline_since`

type agentRow struct {
	domain.Agent
	labels, facts, capabilities       string
	createdAt, lastSeen, offlineSince int64
}

func (r *agentRow) dest() []any {
	return []any{&r.ID, &r.Name, &r.State, &r.labels, &r.facts, &r.capabilities, &r.Protocol,
		&r.Reason, &r.createdAt, &r.lastSeen, &r.offlineSince}
}

func (r *agentRow) toDomain() (domain.Agent, error) {
	a := r.Agent
	a.CreatedAt, a.LastSeen, a.OfflineSince = fromMicro(r.createdAt), fromMicro(r.lastSeen), fromMicro(r.offlineSince)
	if err := fromJSON(r.labels, &a.Labels); err != nil {
		return a, err
	}
	if err := fromJSON(r.facts, &a.Facts); err != nil {
		return a, err
	}
	return a, fromJSON(r.capabilities, &a.Capabilities)
}

func scanAgent(scan scanner) (domain.Agent, error) {
	var r agentRow
	if err := scan(r.dest()...); err != nil {
		return domain.Agent{}, err
	}
	return r.toDomain()
}

// addName puts a row of certificate_san (kind, value) into n.
func addName(n *domain.Names, kind, value string) error {
	switch kind {
	case "dns":
		n.DNS = append(n.DNS, value)
	case "ip":
		n.IP = append(n.IP, value)
	case "email":
		n.Email = append(n.Email, value)
	case "uri":
		n.URI = append(n.URI, value)
	default:
		return fmt.Errorf("store: a subject alternative name of the unknown kind %q", kind)
	}
	return nil
}

// joinDER is how a chain lies in one column: the certificates' DER, one after the other.
func joinDER(chain [][]byte) []byte {
	out := []byte{}
	for _, der := range chain {
		out = append(out, der...)
	}
	return out
}

// splitDER is the reverse of joinDER. Each element's own length says where it ends (X.690 section 8.1.3); only definite
// lengths occur in DER.
func splitDER(b []byte) ([][]byte, error) {
	var out [][]byte
	for len(b) > 0 {
		n, err := derLength(b)
		if err != nil {
			return nil, err
		}
		out = append(out, b[:n:n])
		b = b[n:]
	}
	return out, nil
}

func derLength(b []byte) (int, error) {
	bad := fmt.Errorf("store: a chain column does not hold whole DER elements")
	if len(b) < 2 {
		return 0, bad
	}
	head, size := 2, int(b[1])
	if b[1] >= 0x80 {
		octets := int(b[1] & 0x7f)
		if octets == 0 || octets > 4 || len(b) < 2+octets {
			return 0, bad
		}
		head, size = 2+octets, 0
		for _, o := range b[2 : 2+octets] {
			size = size<<8 | int(o)
		}
	}
	if size < 0 || head+size > len(b) {
		return 0, bad
	}
	return head + size, nil
}
