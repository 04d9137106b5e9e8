package store

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// RecordIssued records signed versions: the intent is consumed, the job Completed, the leaf moved, and each of the agent's
// placements gets a Deployment of the new generation; an open one of an older generation is moved to it, with the next
// attempt, so that its late result is refused. Only after it has returned may the certificate leave the process.
//
// StatusAt is not used: the certificate's next change by time follows from all its leaves. The same version again is no
// error and answers with the open deployments. Conflict: another attempt is awaited, the intent is not open (abandoned,
// or from before a restore), its key is not the version's, or the leaf was revoked: the signed certificate must be dropped.
func (s *Store) RecordIssued(ctx context.Context, items []domain.Issued) []domain.IssuedOutcome {
	return s.batches.issued.do(ctx, items)
}

func checkIssued(x signing, found bool, it domain.Issued, recovery int64) error {
	v := it.Version
	if err := judge(x.job, found, v.AgentID, it.Attempt); err != nil {
		return err
	}
	switch {
	case !forLeaf(x.job.Kind) || x.job.CertificateID != v.CertificateID || x.job.Generation != v.Generation:
		return fault.New(fault.Conflict, "job %s does not await generation %d of certificate %s", x.job.ID, v.Generation, v.CertificateID)
	case !x.has || x.intent.ID != it.IntentID || x.intent.State != domain.IntentOpen || x.intent.Recovery != recovery:
		return fault.New(fault.Conflict, "intent %s is not the open one of job %s", it.IntentID, x.job.ID)
	case x.intent.SPKI != v.SPKI || x.intent.IssuerID != v.IssuerID || x.intent.Serial != "" && x.intent.Serial != v.Serial:
		return fault.New(fault.Conflict, "the certificate is not what intent %s says", it.IntentID)
	}
	return nil
}

// sameVersion reports whether it was recorded before: the job has completed with this very version.
func sameVersion(x signing, it domain.Issued) bool {
	return x.has && x.job.State == domain.JobCompleted && x.intent.ID == it.IntentID && x.intent.State == domain.IntentConsumed &&
		x.job.AgentID == it.Version.AgentID && x.intent.Generation == it.Version.Generation && x.intent.SPKI == it.Version.SPKI
}

func (s *Store) issueAll(ctx context.Context, items []domain.Issued) ([]domain.IssuedOutcome, error) {
	var outs []domain.IssuedOutcome
	ids := make([]string, len(items))
	for i, it := range items {
		ids[i] = it.JobID
	}
	// Ids of deployments are drawn before the transaction, and again the same in each run of it.
	var drawn []string
	// READ COMMITTED under the locks of the certificates, which everybody takes who changes a leaf or a status: what is read
	// after the lock stays true until the commit, and whoever had read before must read again, because the row is written.
	// Jobs, intents and serials are compared and set, or unique keys.
	err := s.settledAt(ctx, "version.record", sql.LevelReadCommitted, func(t *tx) error {
		outs = make([]domain.IssuedOutcome, len(items))
		certs := make([]string, len(items))
		for i, it := range items {
			certs[i] = it.Version.CertificateID
		}
		if err := t.lockCertificates(certs); err != nil {
			return err
		}
		found, err := t.signings(ids)
		if err != nil {
			return err
		}
		recovery, err := t.recovery()
		if err != nil {
			return err
		}
		leaves, err := t.leavesOf(items)
		if err != nil {
			return err
		}
		var good, before []int
		for i, it := range items {
			x, ok := found[it.JobID]
			x.job.ID = it.JobID
			if sameVersion(x, it) {
				before = append(before, i)
				continue
			}
			if outs[i].Err = checkIssued(x, ok, it, recovery); outs[i].Err != nil {
				continue
			}
			l, ok := leaves[leafID{it.Version.CertificateID, it.Version.AgentID}]
			if !ok {
				outs[i].Err = notFound("leaf", it.Version.CertificateID+" at "+it.Version.AgentID)
				continue
			}
			if outs[i].Err = l.ended(); outs[i].Err == nil {
				good = append(good, i)
			}
		}
		good, err = t.insertVersions(items, good, outs)
		if err != nil {
			return err
		}
		if len(good) > 0 {
			if err := t.consume(items, good, found, leaves); err != nil {
				return err
			}
		}
		if err := t.deployIssued(items, good, before, outs, &drawn); err != nil {
			return err
		}
		for i := range outs {
			owner := leaves[leafID{items[i].Version.CertificateID, items[i].Version.AgentID}].owner
			for n := range outs[i].Deployments {
				outs[i].Deployments[n].Owner = owner
			}
		}
		return nil
	})
	return outs, err
}

func (t *tx) leavesOf(items []domain.Issued) (map[leafID]leafState, error) {
	keys := make([]leafID, len(items))
	for i, it := range items {
		keys[i] = leafID{it.Version.CertificateID, it.Version.AgentID}
	}
	return t.leafStates(keys)
}

// insertVersions writes items[good] and returns those that were written. One whose serial or generation is taken by
// another version is refused.
func (t *tx) insertVersions(items []domain.Issued, good []int, outs []domain.IssuedOutcome) ([]int, error) {
	if len(good) == 0 {
		return nil, nil
	}
	v := t.values(`issuer text, serial text, c text, a text, g int, der bytes, chain bytes, finger text, spki text, alg text, nb int, na int, at int`)
	for _, i := range good {
		x := items[i].Version
		v.add(x.IssuerID, x.Serial, x.CertificateID, x.AgentID, x.Generation, x.DER, joinDER(x.Chain), strings.ToLower(x.Fingerprint), x.SPKI,
			string(x.KeyAlgorithm), micro(x.NotBefore), micro(x.NotAfter), micro(items[i].At))
	}
	done := map[leafID]bool{}
	err := t.each(v.with()+`
INSERT INTO version (issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm, not_before,
 not_after, revoked_at, revocation_reason, created_at)
SELECT v.issuer, v.serial, v.c, v.a, v.g, v.der, v.chain, v.finger, v.spki, v.alg, v.nb, v.na, NULL, 0, v.at
FROM v WHERE v.issuer IS NOT NULL
ON CONFLICT DO NOTHING RETURNING certificate_id, agent_id`, v.args, func(scan func(...any) error) error {
		var k leafID
		err := scan(&k.certificateID, &k.agentID)
		done[k] = true
		return err
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(good, func(i int) bool {
		x := items[i].Version
		if done[leafID{x.CertificateID, x.AgentID}] {
			return false
		}
		outs[i].Err = fault.New(fault.Conflict, "serial %s of issuer %s, or generation %d of certificate %s at agent %s, is recorded already",
			x.Serial, x.IssuerID, x.Generation, x.CertificateID, x.AgentID)
		return true
	}), nil
}

// consume does what follows from a new version: intent, job, leaf, status, audit.
func (t *tx) consume(items []domain.Issued, good []int, found map[string]signing, leaves map[leafID]leafState) error {
	intents := t.values("k text")
	moved := t.values("c text, a text, g int, serial text, nb int, na int, due int")
	var changes []change
	var certs []string
	for _, i := range good {
		it, v := items[i], items[i].Version
		intents.add(it.IntentID)
		l := leaves[leafID{v.CertificateID, v.AgentID}]
		due := it.DueAt
		if l.never() || l.policy.Disabled {
			due = time.Time{}
		}
		moved.add(v.CertificateID, v.AgentID, v.Generation, v.Serial, micro(v.NotBefore), micro(v.NotAfter), nullMicro(due))
		certs = append(certs, v.CertificateID)
		before := found[it.JobID].job
		after := before
		after.State, after.FinishedAt, after.UpdatedAt = domain.JobCompleted, domain.Micro(it.At), domain.Micro(it.At)
		after.ErrorClass, after.Error = "", ""
		changes = append(changes, change{before, after})
		requestID := it.RequestID
		if requestID == "" {
			requestID = before.RequestID
		}
		err := t.audit(domain.AuditEvent{At: it.At, Actor: "node:" + t.s.cfg.NodeID, Action: "certificate.issued",
			Resource: "certificate/" + v.CertificateID, RequestID: requestID, Detail: map[string]string{
				"job": it.JobID, "agent": v.AgentID, "issuer": v.IssuerID, "serial": v.Serial, "fingerprint": strings.ToLower(v.Fingerprint),
				"generation": strconv.FormatInt(v.Generation, 10), "not_after": v.NotAfter.UTC().Format(time.RFC3339)}})
		if err != nil {
			return err
		}
	}
	text := intents.with()
	n, err := t.exec(text+`
UPDATE intent SET state = `+intents.arg(string(domain.IntentConsumed))+` FROM v WHERE intent.id = v.k AND intent.state = `+
		intents.arg(string(domain.IntentOpen)), intents.args...)
	if err != nil {
		return err
	}
	kept, err := t.saveJobs(changes)
	if err != nil {
		return err
	}
	if int(n) != len(good) || len(kept) != len(good) {
		return errMoved
	}
	if _, err := t.exec(moved.with()+`
UPDATE leaf SET current_generation = v.g, serial = v.serial, not_before = v.nb, not_after = v.na, due_at = v.due, failures = 0,
 backoff_until = 0, last_error = ''
FROM v WHERE leaf.certificate_id = v.c AND leaf.agent_id = v.a`, moved.args...); err != nil {
		return err
	}
	return t.restatusLocked(certs, items[good[0]].At, true)
}

type placed struct {
	placement domain.Placement
	target    domain.Target
	open      domain.Job
	hasOpen   bool
	isDue     bool
}

// placementsOf reads the placements of the leaves with their targets and open jobs.
func (t *tx) placementsOf(keys []leafID) (map[leafID][]placed, error) {
	found := map[leafID][]placed{}
	err := chunks(keys, func(keys []leafID) error {
		v := t.values("c text, a text")
		for _, k := range keys {
			v.add(k.certificateID, k.agentID)
		}
		return t.each(v.with()+" SELECT "+placementColumns+", "+targetColumns+`, COALESCE(job.id, ''), CASE WHEN placement.due_at IS NULL THEN 0 ELSE 1 END
FROM v JOIN placement ON placement.agent_id = v.a AND placement.certificate_id = v.c
JOIN target ON target.id = placement.target_id
LEFT JOIN job ON job.open_key = 'placement:' || placement.certificate_id || ':' || placement.target_id
ORDER BY placement.certificate_id, placement.target_id`, v.args, func(scan func(...any) error) error {
			var p placementRow
			var x targetRow
			var at placed
			var isDue int
			if err := scan(append(append(p.dest(), x.dest()...), &at.open.ID, &isDue)...); err != nil {
				return err
			}
			at.placement, at.target, at.hasOpen, at.isDue = p.toDomain(), x.toDomain(), at.open.ID != "", isDue == 1
			k := leafID{at.placement.CertificateID, at.placement.AgentID}
			found[k] = append(found[k], at)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	// Open deployments at the moment of an issue are rare: their rows are read only then.
	var ids []string
	for _, list := range found {
		for _, at := range list {
			if at.hasOpen {
				ids = append(ids, at.open.ID)
			}
		}
	}
	slices.Sort(ids)
	jobs, err := t.jobsByID(ids)
	if err != nil {
		return nil, err
	}
	for _, list := range found {
		for i := range list {
			if list[i].hasOpen {
				list[i].open = jobs[list[i].open.ID]
			}
		}
	}
	return found, nil
}

// deployIssued makes or moves the deployments of items[good], and finds those of items[before], which were recorded by an
// earlier call.
func (t *tx) deployIssued(items []domain.Issued, good, before []int, outs []domain.IssuedOutcome, drawn *[]string) error {
	keys := make([]leafID, 0, len(good)+len(before))
	for _, i := range slices.Concat(good, before) {
		keys = append(keys, leafID{items[i].Version.CertificateID, items[i].Version.AgentID})
	}
	if len(keys) == 0 {
		return nil
	}
	placements, err := t.placementsOf(keys)
	if err != nil {
		return err
	}
	var jobs []domain.Job
	var changes []change
	due := map[placementID]time.Time{}
	for _, i := range good {
		it, v := items[i], items[i].Version
		outs[i].Version = v
		for _, at := range placements[leafID{v.CertificateID, v.AgentID}] {
			key := placementID{v.CertificateID, at.target.ID}
			if at.isDue {
				due[key] = time.Time{}
			}
			if at.hasOpen && at.open.Kind == domain.JobValidation {
				// What it would look for is not wanted any more.
				op := domain.Op{Actor: "node:" + t.s.cfg.NodeID, RequestID: it.RequestID, At: it.At}
				gone := cancelled(at.open, "a newer generation was issued", op)
				changes = append(changes, change{at.open, gone})
				if err := t.auditOp(op, "job.cancelled", "job/"+gone.ID, map[string]string{"certificate": v.CertificateID, "reason": gone.Error}); err != nil {
					return err
				}
				at.hasOpen = false
			}
			switch {
			case at.hasOpen:
				moved := at.open
				if moved.Generation < v.Generation {
					moved.Generation, moved.State, moved.Attempt, moved.Tries = v.Generation, moved.Kind.InitialState(), moved.Attempt+1, 0
					moved.AcceptedAt, moved.RunAt, moved.UpdatedAt = time.Time{}, domain.Micro(it.At), domain.Micro(it.At)
					moved.ErrorClass, moved.Error = "", ""
					changes = append(changes, change{at.open, moved})
				}
				outs[i].Deployments = append(outs[i].Deployments, domain.Work{Job: moved, Version: v, Target: at.target})
			case !at.target.Enabled:
				due[key] = it.At.Add(disabledRest)
			default:
				if len(jobs) == len(*drawn) {
					*drawn = append(*drawn, t.s.newID(id.Job))
				}
				reason := "generation " + strconv.FormatInt(v.Generation, 10) + " was issued"
				j := newJob((*drawn)[len(jobs)], domain.JobDeployment, v.CertificateID, v.AgentID, at.target.ID, v.Generation, reason, it.RequestID, it.At)
				jobs = append(jobs, j)
				err := t.auditOp(domain.Op{Actor: "node:" + t.s.cfg.NodeID, RequestID: it.RequestID, At: it.At}, "job.created", "job/"+j.ID, createdDetail(j))
				if err != nil {
					return err
				}
				outs[i].Deployments = append(outs[i].Deployments, domain.Work{Job: j, Version: v, Target: at.target})
			}
		}
	}
	recorded, err := t.recordedBefore(items, before)
	if err != nil {
		return err
	}
	for _, i := range before {
		v := recorded[generationKey{items[i].Version.CertificateID, items[i].Version.AgentID, items[i].Version.Generation}]
		outs[i].Version = v
		for _, at := range placements[leafID{v.CertificateID, v.AgentID}] {
			if at.hasOpen && at.open.Generation == v.Generation {
				outs[i].Deployments = append(outs[i].Deployments, domain.Work{Job: at.open, Version: v, Target: at.target})
			}
		}
	}
	kept, err := t.saveJobs(changes)
	if err != nil {
		return err
	}
	created, err := t.insertJobs(jobs)
	if err != nil {
		return err
	}
	if len(kept) != len(changes) || len(created) != len(jobs) {
		return errMoved
	}
	return t.placementsDue(due)
}

// recordedBefore reads the versions of items[before]: the same bytes may have been signed twice, and only the signature
// that was recorded counts.
func (t *tx) recordedBefore(items []domain.Issued, before []int) (map[generationKey]domain.Version, error) {
	if len(before) == 0 {
		return nil, nil
	}
	keys := make([]generationKey, len(before))
	for n, i := range before {
		keys[n] = generationKey{items[i].Version.CertificateID, items[i].Version.AgentID, items[i].Version.Generation}
	}
	found, err := t.versionsByKey(slices.Clone(keys))
	if err == nil && len(found) == 0 {
		return nil, errors.New("store: a version was recorded and is missing")
	}
	return found, err
}
