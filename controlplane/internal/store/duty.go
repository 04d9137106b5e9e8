package store

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TakeDuty gives the duty to node: the epoch rises, and what a former holder still tries to write is refused. It waits, a
// bounded time, for a former holder that stands inside a transaction; Retryable then.
func (s *Store) TakeDuty(ctx context.Context, duty, node string, at time.Time) (domain.Fence, error) {
	f := domain.Fence{Duty: duty, Holder: node}
	if duty == "" || node == "" {
		return f, fault.New(fault.Internal, "a duty is taken by its name for a node")
	}
	// Taking it once more after a commit without an answer is right: the epoch we then know is the one in force.
	err := s.settled(ctx, "duty.take", func(t *tx) error {
		err := t.queryRow(`INSERT INTO duty_fence (duty, epoch, holder, taken_at) VALUES ($1, 1, $2, $3)
ON CONFLICT (duty) DO UPDATE SET epoch = duty_fence.epoch + 1, holder = excluded.holder, taken_at = excluded.taken_at
RETURNING epoch`, duty, node, micro(at)).Scan(&f.Epoch)
		if err != nil {
			return err
		}
		return t.audit(domain.AuditEvent{At: at, Actor: "node:" + node, Action: "duty.taken", Resource: "duty/" + duty,
			Detail: map[string]string{"epoch": strconv.FormatInt(int64(f.Epoch), 10)}})
	})
	if err != nil {
		return domain.Fence{}, err
	}
	return f, nil
}

// fence locks the duty's row until the end of the transaction and compares its epoch. A plain read is not enough, even
// under SERIALIZABLE: a writer that was paused after it would still commit.
func (t *tx) fence(f domain.Fence) error {
	var epoch int64
	err := t.queryRow("UPDATE duty_fence SET epoch = epoch WHERE duty = $1 AND epoch = $2 AND holder = $3 RETURNING epoch",
		f.Duty, int64(f.Epoch), f.Holder).Scan(&epoch)
	if isNoRows(err) {
		return fault.New(fault.Conflict, "duty %s is no longer held by %s at epoch %d", f.Duty, f.Holder, f.Epoch)
	}
	return err
}

// ReapJobs fails for good jobs that stand still: a key or an approval that does not come, an accepted assignment that does
// not end. Except for approvals the time counts only while the agent is connected. A zero limit reaps nothing. At most limit jobs a call.
func (s *Store) ReapJobs(ctx context.Context, f domain.Fence, limits domain.ReapLimits, now time.Time, limit int) ([]domain.Job, error) {
	var reaped []domain.Job
	err := s.settled(ctx, "job.reap", func(t *tx) error {
		former := reaped
		reaped = nil
		if err := t.fence(f); err != nil {
			return err
		}
		if t.again && len(former) > 0 {
			now, err := t.jobsByID([]string{former[0].ID})
			if err != nil {
				return err
			}
			if keptAny(now, 1, func(int) (domain.Job, bool) { return former[0], true }) {
				reaped = former
				return nil
			}
		}
		for _, c := range []struct {
			state domain.JobState
			after time.Duration
			what  string
		}{
			{domain.JobAwaitingCSR, limits.AwaitingCSR, "the agent sent no certificate request for"},
			{domain.JobAwaitingApproval, limits.AwaitingApproval, "nobody approved it for"},
			{domain.JobRunning, limits.Running, "the agent reported no result for"},
		} {
			if c.after <= 0 || len(reaped) >= limit {
				continue
			}
			still, err := t.still(c.state, now, c.after, limit-len(reaped))
			if err != nil {
				return err
			}
			ended, err := t.endJobs(still, domain.JobFailed, fault.Exhausted, c.what+" "+c.after.String(), now, func(j domain.Job) domain.AuditEvent {
				return domain.AuditEvent{Actor: "node:" + f.Holder, Action: "job.reaped", Resource: "job/" + j.ID}
			})
			if err != nil {
				return err
			}
			reaped = append(reaped, ended...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return reaped, nil
}

// still reads jobs that have been in a state for longer than after, by the clock that stands while their agent is away:
// updated_at + away is when it would have begun had the agent been there ever since. It has run until now, or until the
// agent was last heard: one whose node died counts as connected until somebody notices.
func (t *tx) still(state domain.JobState, now time.Time, after time.Duration, limit int) ([]domain.Job, error) {
	since := micro(now.Add(-after))
	query := "SELECT " + jobColumns + ` FROM job JOIN agent_session ON agent_session.agent_id = job.agent_id JOIN agent ON agent.id = job.agent_id
WHERE job.state = $1 AND job.updated_at + job.away < $2 AND job.run_at < $2 AND job.updated_at + job.away < agent.last_seen + $3
 AND agent_session.holder <> '' AND agent.state IN ($5, $6) ORDER BY job.id LIMIT $4`
	args := []any{string(state), since, (beatGrace - after).Microseconds(), limit, string(domain.AgentOnline), string(domain.AgentStale)}
	if state == domain.JobAwaitingApproval {
		query = "SELECT " + jobColumns + " FROM job WHERE job.state = $1 AND job.updated_at < $2 ORDER BY job.id LIMIT $3"
		args = []any{string(state), since, limit}
	}
	var jobs []domain.Job
	err := t.each(query, args, func(scan func(...any) error) error {
		j, err := scanJob(scan)
		jobs = append(jobs, j)
		return err
	})
	return jobs, err
}

// NextDue returns the earliest times at which leaves, placements and statuses are due; zero where nothing is planned.
func (s *Store) NextDue(ctx context.Context) (domain.NextDue, error) {
	var next domain.NextDue
	err := s.read(ctx, "duty.next", func(t *tx) error {
		for _, q := range []struct {
			table, column string
			into          *time.Time
		}{{"leaf", "due_at", &next.Leaf}, {"placement", "due_at", &next.Placement}, {"certificate", "status_at", &next.Status}} {
			// One look at the head of each shard's index.
			heads := make([]string, domain.Shards)
			args := make([]any, domain.Shards)
			for i := range heads {
				args[i] = i
				heads[i] = "SELECT MIN(" + q.column + ") AS at FROM " + q.table + " WHERE shard = $" + strconv.Itoa(i+1) + " AND " + q.column + " IS NOT NULL"
			}
			var at *int64
			if err := t.queryRow("SELECT MIN(heads.at) FROM ("+strings.Join(heads, " UNION ALL ")+") AS heads", args...).Scan(&at); err != nil {
				return err
			}
			*q.into = time.Time{}
			if at != nil {
				*q.into = fromMicro(*at)
			}
		}
		return nil
	})
	return next, err
}

// SweepStatuses derives the statuses that time alone has changed, at most limit of a shard, and says how many it looked at.
func (s *Store) SweepStatuses(ctx context.Context, f domain.Fence, shard int, now time.Time, limit int) (int, error) {
	var n int
	err := s.settled(ctx, "status.sweep", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		var ids []string
		err := t.each("SELECT id FROM certificate WHERE shard = $1 AND status_at <= $2 ORDER BY status_at LIMIT $3",
			[]any{shard, micro(now), limit}, func(scan func(...any) error) error {
				var id string
				err := scan(&id)
				ids = append(ids, id)
				return err
			})
		if err != nil {
			return err
		}
		if !t.again || len(ids) > 0 {
			n = len(ids)
		}
		return t.restatus(ids, now)
	})
	return n, err
}

// SweepAgents calls agents Stale or Offline that were last seen before the given times, and says how many. It does not
// touch sessions: a stream that still lives makes its agent Online with the next beat.
func (s *Store) SweepAgents(ctx context.Context, f domain.Fence, staleBefore, offlineBefore, now time.Time) (int, error) {
	var n int64
	err := s.settled(ctx, "agent.sweep", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		online, stale := string(domain.AgentOnline), string(domain.AgentStale)
		offline, err := t.exec("UPDATE agent SET state = $1, offline_since = $2 WHERE state IN ($3, $4) AND last_seen < $5",
			string(domain.AgentOffline), micro(now), online, stale, micro(offlineBefore))
		if err != nil {
			return err
		}
		late, err := t.exec("UPDATE agent SET state = $1 WHERE state = $2 AND last_seen < $3", stale, online, micro(staleBefore))
		if err != nil {
			return err
		}
		if !t.again || offline+late > 0 {
			n = offline + late
		}
		return nil
	})
	return int(n), err
}

// Retain deletes what has been over since finishedBefore: jobs with the abandoned intents of their generations, and join
// tokens that have expired with their enrolments. It never touches audit rows or versions. At most limit jobs and limit
// tokens a call; it returns how many rows of both went.
func (s *Store) Retain(ctx context.Context, f domain.Fence, finishedBefore, now time.Time, limit int) (int, error) {
	var gone int
	err := s.settled(ctx, "retain", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		jobs, err := t.overdueJobs(finishedBefore, limit)
		if err != nil {
			return err
		}
		tokens, err := t.overdueTokens(finishedBefore, limit)
		if err != nil {
			return err
		}
		if !t.again || len(jobs)+len(tokens) > 0 {
			gone = len(jobs) + len(tokens)
		}
		if err := chunks(jobs, t.deleteJobs); err != nil {
			return err
		}
		return chunks(tokens, func(ids []string) error {
			in, args := inList(1, ids)
			if _, err := t.exec("DELETE FROM enrollment WHERE token_id IN "+in, args...); err != nil {
				return err
			}
			_, err := t.exec("DELETE FROM join_token WHERE id IN "+in, args...)
			return err
		})
	})
	return gone, err
}

type overJob struct {
	id, certificateID, agentID string
	generation                 int64
	leaf                       bool
}

func (t *tx) overdueJobs(before time.Time, limit int) ([]overJob, error) {
	var jobs []overJob
	for shard := 0; shard < domain.Shards && len(jobs) < limit; shard++ {
		err := t.each(`SELECT id, certificate_id, agent_id, generation, target_id FROM job
WHERE shard = $1 AND finished_at < $2 ORDER BY finished_at LIMIT $3`, []any{shard, micro(before), limit - len(jobs)}, func(scan func(...any) error) error {
			var j overJob
			var target string
			err := scan(&j.id, &j.certificateID, &j.agentID, &j.generation, &target)
			j.leaf = target == ""
			jobs = append(jobs, j)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return jobs, nil
}

func (t *tx) deleteJobs(jobs []overJob) error {
	ids := make([]string, len(jobs))
	v := t.values("c text, a text, g int")
	for i, j := range jobs {
		ids[i] = j.id
		if j.leaf {
			v.add(j.certificateID, j.agentID, j.generation)
		}
	}
	if v.rows > 0 {
		text := v.with()
		// A lost key abandons a generation below the job's last one.
		_, err := t.exec(text+` DELETE FROM intent WHERE id IN (SELECT over.id FROM v JOIN intent AS over
 ON over.certificate_id = v.c AND over.agent_id = v.a AND over.generation <= v.g AND over.state = `+v.arg(string(domain.IntentAbandoned))+`)`, v.args...)
		if err != nil {
			return err
		}
	}
	in, args := inList(1, ids)
	_, err := t.exec("DELETE FROM job WHERE id IN "+in, args...)
	return err
}

func (t *tx) overdueTokens(before time.Time, limit int) ([]string, error) {
	var ids []string
	err := t.each("SELECT id FROM join_token WHERE expires_at < $1 ORDER BY id LIMIT $2", []any{micro(before), limit}, func(scan func(...any) error) error {
		var id string
		err := scan(&id)
		ids = append(ids, id)
		return err
	})
	return ids, err
}
