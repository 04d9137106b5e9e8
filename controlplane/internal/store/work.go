package store

import (
	"context"
	"slices"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// A session reads the work of its agent as often as jobs change. An agent with a hundred thousand open jobs must not have
// them all read each time, so that of more than domain.MaxOpenWork a window is read, along the index job_lane: it has a lane
// for each agent, owner and kind, in which the job that is due first comes first. A lane's owner is the certificate's of when
// the job was made; '' in jobs of before there was the column, which are a lane of their own until they have ended.

// dispatchable is the predicate of job_lane, written as there: an engine uses a partial index only when it can prove it.
const dispatchable = "job.finished_at IS NULL AND job.state <> 'AwaitingApproval'"

var jobKinds = []domain.JobKind{domain.JobIssuance, domain.JobRenewal, domain.JobDeployment, domain.JobValidation}

// OpenWork reads the open jobs of agents with what their assignments need, one answer for each query in their order. A
// deployment whose version or target is gone is left out. A new holder of a session calls it after OpenSessions has
// returned, so that it either sees a job or the job's creator sees the new holder.
func (s *Store) OpenWork(ctx context.Context, queries []domain.WorkQuery) ([]domain.OpenWork, error) {
	var answers []domain.OpenWork
	err := s.read(ctx, "work.open", func(t *tx) error {
		answers = make([]domain.OpenWork, len(queries))
		ids := make([]string, len(queries))
		for i, q := range queries {
			ids[i] = q.AgentID
		}
		slices.Sort(ids)
		ids = slices.Compact(ids)
		busy, err := t.busyAgents(ids)
		if err != nil {
			return err
		}
		all, err := t.allWork(slices.DeleteFunc(ids, func(id string) bool { return busy[id] }))
		if err != nil {
			return err
		}
		for i, q := range queries {
			if busy[q.AgentID] {
				if answers[i], err = t.windowOf(q); err != nil {
					return err
				}
				continue
			}
			answers[i].Work = all[q.AgentID]
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return answers, nil
}

// busyAgents are those with more than MaxOpenWork jobs. No more than that are counted of any.
func (t *tx) busyAgents(ids []string) (map[string]bool, error) {
	busy := map[string]bool{}
	err := chunks(ids, func(ids []string) error {
		v := t.values("a text")
		for _, id := range ids {
			v.add(id)
		}
		return t.each(v.with()+` SELECT v.a FROM v WHERE EXISTS (SELECT 1 FROM job WHERE job.agent_id = v.a AND `+dispatchable+`
 LIMIT 1 OFFSET `+v.arg(domain.MaxOpenWork)+`)`, v.args, func(scan func(...any) error) error {
			var id string
			err := scan(&id)
			busy[id] = true
			return err
		})
	})
	return busy, err
}

// allWork reads all of agents that have not much.
func (t *tx) allWork(agentIDs []string) (map[string][]domain.Work, error) {
	var jobs []domain.Job
	err := chunks(agentIDs, func(ids []string) error {
		in, args := inList(1, ids)
		return t.each("SELECT "+jobColumns+" FROM job WHERE "+dispatchable+" AND job.agent_id IN "+in+" ORDER BY job.agent_id, job.id", args,
			func(scan func(...any) error) error {
				j, err := scanJob(scan)
				jobs = append(jobs, j)
				return err
			})
	})
	if err != nil {
		return nil, err
	}
	work, err := t.work(jobs)
	if err != nil {
		return nil, err
	}
	byAgent := map[string][]domain.Work{}
	for _, w := range work {
		byAgent[w.Job.AgentID] = append(byAgent[w.Job.AgentID], w)
	}
	return byAgent, nil
}

// windowOf reads what is out and a window of the rest.
func (t *tx) windowOf(q domain.WorkQuery) (domain.OpenWork, error) {
	var answer domain.OpenWork
	out := make(map[string]int64, len(q.Out))
	ids := make([]string, 0, len(q.Out))
	for _, r := range q.Out {
		out[r.JobID] = r.Attempt
		ids = append(ids, r.JobID)
	}
	lanes, more, next, err := t.lanesBehind(q, out)
	if err != nil {
		return answer, err
	}
	answer.MoreOwners, answer.Next = more, next
	for _, k := range jobKinds {
		window, more, err := t.share(q.AgentID, lanes, k, out)
		if err != nil {
			return answer, err
		}
		ids = append(ids, window...)
		if more {
			answer.More = append(answer.More, k)
		}
	}
	found, err := t.jobsByID(ids)
	if err != nil {
		return answer, err
	}
	jobs := make([]domain.Job, 0, len(found))
	for id, j := range found {
		attempt, isOut := out[id]
		switch {
		case j.AgentID != q.AgentID, !j.State.Open(), j.State == domain.JobAwaitingApproval:
		case isOut && attempt == j.Attempt:
			answer.Kept = append(answer.Kept, id)
		default:
			jobs = append(jobs, j)
		}
	}
	slices.SortFunc(jobs, func(a, b domain.Job) int { return strings.Compare(a.ID, b.ID) })
	answer.Work, err = t.work(jobs)
	return answer, err
}

// lanes are an owner's jobs of each kind, without those that are out: what is due first of them, laneAtOnce and one more.
type lanes struct {
	owner string
	jobs  map[domain.JobKind][]string
}

const (
	laneAtOnce = 4 * domain.WorkWindow / domain.WindowOwners
	// ownersLooked bounds the owners that are looked at for one window. Those all of whose jobs are out are not in it.
	ownersLooked = 1024
)

// lanesBehind reads lanes of owners, first of those behind q.After and then from the beginning. more: there are more owners
// than a window takes, behind next.
func (t *tx) lanesBehind(q domain.WorkQuery, out map[string]int64) (found []lanes, more bool, next string, err error) {
	at, op, turned := q.After, " > ", false
	for range ownersLooked {
		owner, ok, err := t.nextOwner(q.AgentID, op, at)
		switch {
		case err != nil:
			return nil, false, "", err
		case !turned && !ok:
			at, op, turned = "", " >= ", true
			continue
		case !ok, turned && owner > q.After:
			return found, false, "", nil
		case len(found) == domain.WindowOwners:
			return found, true, next, nil
		}
		at, op, next = owner, " > ", owner
		l := lanes{owner, map[domain.JobKind][]string{}}
		n := 0
		for _, k := range jobKinds {
			if l.jobs[k], err = t.lane(q.AgentID, owner, k, laneAtOnce, out); err != nil {
				return nil, false, "", err
			}
			n += len(l.jobs[k])
		}
		if n > 0 {
			found = append(found, l)
		}
	}
	return found, true, next, nil
}

func (t *tx) nextOwner(agentID, op, at string) (owner string, ok bool, err error) {
	err = t.each("SELECT job.owner FROM job WHERE job.agent_id = $1 AND job.owner"+op+"$2 AND "+dispatchable+" ORDER BY job.owner LIMIT 1",
		[]any{agentID, at}, func(scan func(...any) error) error {
			ok = true
			return scan(&owner)
		})
	return owner, ok, err
}

// lane reads most jobs of a lane, and one more if there is, that are not out.
func (t *tx) lane(agentID, owner string, kind domain.JobKind, most int, out map[string]int64) ([]string, error) {
	var ids []string
	err := t.each("SELECT job.id FROM job WHERE job.agent_id = $1 AND job.owner = $2 AND job.kind = $3 AND "+dispatchable+`
 ORDER BY job.run_at, job.id LIMIT $4`, []any{agentID, owner, string(kind), most + len(out) + 1}, func(scan func(...any) error) error {
		var id string
		err := scan(&id)
		if _, isOut := out[id]; !isOut && len(ids) <= most {
			ids = append(ids, id)
		}
		return err
	})
	return ids, err
}

// share takes a window's jobs of a kind from the owners in turns. more: some were left.
func (t *tx) share(agentID string, all []lanes, kind domain.JobKind, out map[string]int64) (window []string, more bool, err error) {
	most := laneAtOnce
	if wider := domain.WorkWindow / max(len(all), 1); wider > most {
		// Few owners have more each.
		most = wider
		for i := range all {
			if len(all[i].jobs[kind]) <= laneAtOnce {
				continue
			}
			if all[i].jobs[kind], err = t.lane(agentID, all[i].owner, kind, most, out); err != nil {
				return nil, false, err
			}
		}
	}
	n := 0
	for rank := range most {
		for _, l := range all {
			if jobs := l.jobs[kind]; rank < len(jobs) && len(window) < domain.WorkWindow {
				window = append(window, jobs[rank])
			}
		}
	}
	for _, l := range all {
		n += len(l.jobs[kind])
	}
	return window, n > len(window), nil
}
