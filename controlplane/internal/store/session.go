package store

import (
	"context"
	"database/sql"
	"maps"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// OpenSessions records Hellos: the epoch rises, the node holds the agent's stream, the agent is Online with the facts it
// sent. Labels are laid over the stored ones. Load the agents' work (OpenWork) only after it has returned: then a creator
// of a job either saw the new holder or its job is among that work.
//
// Forbidden: the agent is unknown, quarantined or retired. Unauthorized: the identity is unknown, another agent's, or
// revoked; whether it has expired was checked by the handshake.
func (s *Store) OpenSessions(ctx context.Context, items []domain.SessionOpen) []domain.SessionOpened {
	return s.batches.open.do(ctx, items)
}

type identityState struct {
	agentID              string
	revokedAt, firstUsed int64
}

type helloState struct {
	agent    domain.Agent
	previous domain.Session
	openedAt int64
}

func (s *Store) openAll(ctx context.Context, items []domain.SessionOpen) ([]domain.SessionOpened, error) {
	var outs []domain.SessionOpened
	err := s.settled(ctx, "session.open", func(t *tx) error {
		agents, identities, err := t.hellos(items)
		if err != nil {
			return err
		}
		if t.again && keptSessions(items, outs, agents) {
			return nil
		}
		outs = make([]domain.SessionOpened, len(items))
		sessions := t.values("a text, node text, boot text, at int")
		absent := t.values("a text, since int, at int")
		facts := t.values("k text, labels text, facts text, capabilities text, protocol int, at int")
		used := t.values("k text, at int")
		at := map[string]int{}
		for i, h := range items {
			have, known := agents[h.AgentID]
			if outs[i].Err = admit(h, have.agent, known, identities); outs[i].Err != nil {
				continue
			}
			at[h.AgentID] = i
			if since := awaySince(have.agent); since.Before(h.At) {
				absent.add(h.AgentID, micro(since), micro(h.At))
			}
			sessions.add(h.AgentID, h.Node, h.BootID, micro(h.At))
			a := have.agent
			if a.Labels == nil {
				a.Labels = map[string]string{}
			}
			overlay(a.Labels, h.Labels)
			a.Facts, a.Capabilities, a.Protocol = h.Facts, h.Capabilities, h.Protocol
			a.State, a.LastSeen, a.OfflineSince = domain.AgentOnline, domain.Micro(h.At), time.Time{}
			outs[i].Agent, outs[i].Previous = a, have.previous
			var texts [3]string
			for n, part := range []any{a.Labels, a.Facts, a.Capabilities} {
				if texts[n], err = jsonText(part); err != nil {
					return err
				}
			}
			facts.add(h.AgentID, texts[0], texts[1], texts[2], h.Protocol, micro(h.At))
			if identities[h.IdentitySerial].firstUsed == 0 {
				used.add(h.IdentitySerial, micro(h.At))
			}
		}
		if sessions.rows == 0 {
			return nil
		}
		err = t.each(sessions.with()+`
INSERT INTO agent_session (agent_id, epoch, holder, boot_id, opened_at)
SELECT v.a, 1, v.node, v.boot, v.at FROM v WHERE v.a IS NOT NULL
ON CONFLICT (agent_id) DO UPDATE SET epoch = agent_session.epoch + 1, holder = excluded.holder, boot_id = excluded.boot_id, opened_at = excluded.opened_at
RETURNING agent_id, epoch`, sessions.args, func(scan func(...any) error) error {
			var agent string
			var epoch domain.Epoch
			err := scan(&agent, &epoch)
			if i, ok := at[agent]; ok {
				outs[i].Epoch = epoch
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := t.absence(absent); err != nil {
			return err
		}
		text := facts.with()
		if _, err := t.exec(text+`
UPDATE agent SET state = `+facts.arg(string(domain.AgentOnline))+`, labels = v.labels, facts = v.facts, capabilities = v.capabilities,
 protocol = v.protocol, last_seen = v.at, offline_since = 0
FROM v WHERE agent.id = v.k`, facts.args...); err != nil {
			return err
		}
		if used.rows == 0 {
			return nil
		}
		_, err = t.exec(used.with()+`
UPDATE agent_identity SET first_used_at = v.at FROM v WHERE agent_identity.serial = v.k AND agent_identity.first_used_at = 0`, used.args...)
		return err
	})
	return outs, err
}

// beatGrace is how long ago an agent may have been heard for the last time, as the rows say, while it is connected: beats
// are written in batches.
const beatGrace = 2 * time.Minute

// awaySince is when an agent that says Hello went away, as far as the rows know, rather too late than too early: time in
// which it was connected must not count as absence, or the jobs of one that reconnects often would never be given up.
// When its stream ended is exact; of a node that died only the last beats are known.
func awaySince(a domain.Agent) time.Time {
	if a.LastSeen.IsZero() {
		return a.OfflineSince // it has joined and was never connected
	}
	since := a.LastSeen.Add(beatGrace)
	if !a.OfflineSince.IsZero() && a.OfflineSince.Before(since) {
		since = a.OfflineSince
	}
	return since
}

// absence adds the time for which the agents were away to their open jobs, whose clock stood still meanwhile (see still).
// A job that was made or moved in that time was not waiting before.
func (t *tx) absence(v *valueList) error {
	if v.rows == 0 {
		return nil
	}
	_, err := t.exec(v.with()+`
UPDATE job SET away = job.away + v.at - CASE WHEN job.updated_at > v.since THEN job.updated_at ELSE v.since END
FROM v WHERE job.agent_id = v.a AND job.finished_at IS NULL AND job.updated_at < v.at`, v.args...)
	return err
}

// maxAgentLabels bounds the labels of an agent, far above what tokens and Hellos carry at once.
const maxAgentLabels = 128

// overlay lays an agent's labels over the stored ones. Beyond the bound no key is added: an agent that sends other keys
// each time must not make its row grow for ever.
func overlay(stored, sent map[string]string) {
	for _, k := range slices.Sorted(maps.Keys(sent)) {
		if _, have := stored[k]; have || len(stored) < maxAgentLabels {
			stored[k] = sent[k]
		}
	}
}

// admit judges a Hello.
func admit(h domain.SessionOpen, a domain.Agent, known bool, identities map[string]identityState) error {
	if !known {
		return fault.New(fault.Forbidden, "there is no agent %s; enrol this host again", h.AgentID)
	}
	if err := domain.CheckAgentTransition(a.State, domain.AgentOnline); err != nil {
		return fault.Wrap(fault.Forbidden, err, "agent %s may not connect", h.AgentID)
	}
	id, ok := identities[h.IdentitySerial]
	switch {
	case !ok || id.agentID != h.AgentID:
		return fault.New(fault.Unauthorized, "identity %s was not issued to agent %s", h.IdentitySerial, h.AgentID)
	case id.revokedAt != 0:
		return fault.New(fault.Unauthorized, "identity %s is revoked", h.IdentitySerial)
	}
	return nil
}

// keptSessions reports whether the former run of an ambiguous commit was kept.
func keptSessions(items []domain.SessionOpen, outs []domain.SessionOpened, now map[string]helloState) bool {
	for i := range outs {
		if outs[i].Err == nil {
			h, have := items[i], now[items[i].AgentID]
			return have.previous.Epoch == outs[i].Epoch && have.previous.Holder == h.Node && have.previous.BootID == h.BootID && have.openedAt == micro(h.At)
		}
	}
	return false
}

// hellos reads what the Hellos are judged by: agents with their sessions, and the identities that were shown.
func (t *tx) hellos(items []domain.SessionOpen) (map[string]helloState, map[string]identityState, error) {
	ids, serials := make([]string, len(items)), make([]string, len(items))
	for i, h := range items {
		ids[i], serials[i] = h.AgentID, h.IdentitySerial
	}
	in, args := inList(1, ids)
	agents := make(map[string]helloState, len(items))
	err := t.each("SELECT "+agentColumns+`, COALESCE(agent_session.epoch, 0), COALESCE(agent_session.holder, ''),
 COALESCE(agent_session.boot_id, ''), COALESCE(agent_session.opened_at, 0)
FROM agent LEFT JOIN agent_session ON agent_session.agent_id = agent.id WHERE agent.id IN `+in, args, func(scan func(...any) error) error {
		var a agentRow
		var h helloState
		p := &h.previous
		err := scan(append(a.dest(), &p.Epoch, &p.Holder, &p.BootID, &h.openedAt)...)
		if err != nil {
			return err
		}
		if h.agent, err = a.toDomain(); err != nil {
			return err
		}
		if p.Epoch > 0 {
			p.AgentID = h.agent.ID
		}
		agents[h.agent.ID] = h
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	in, args = inList(1, serials)
	identities := make(map[string]identityState, len(items))
	err = t.each("SELECT serial, agent_id, revoked_at, first_used_at FROM agent_identity WHERE serial IN "+in, args, func(scan func(...any) error) error {
		var serial string
		var i identityState
		err := scan(&serial, &i.agentID, &i.revokedAt, &i.firstUsed)
		identities[serial] = i
		return err
	})
	return agents, identities, err
}

type sessionClose struct {
	agentID string
	epoch   domain.Epoch
	at      time.Time
}

// CloseSession records that a stream has ended: nobody holds it, the agent is Offline since at. Closing again is no
// error. Conflict: the session is another's by now, and stays as it is.
func (s *Store) CloseSession(ctx context.Context, agentID string, epoch domain.Epoch, at time.Time) error {
	return s.batches.closing.do(ctx, []sessionClose{{agentID, epoch, at}})[0]
}

func (s *Store) closeAll(ctx context.Context, items []sessionClose) ([]error, error) {
	var outs []error
	err := s.settled(ctx, "session.close", func(t *tx) error {
		outs = make([]error, len(items))
		v := t.values("a text, e int")
		for _, c := range items {
			v.add(c.agentID, int64(c.epoch))
		}
		ours := map[string]bool{}
		// A session that was closed before under this epoch is written again and changes nothing.
		err := t.each(v.with()+`
UPDATE agent_session SET holder = '' FROM v WHERE agent_session.agent_id = v.a AND agent_session.epoch = v.e RETURNING agent_id`, v.args,
			func(scan func(...any) error) error {
				var id string
				err := scan(&id)
				ours[id] = true
				return err
			})
		if err != nil {
			return err
		}
		v = t.values("k text, at int")
		for i, c := range items {
			if !ours[c.agentID] {
				outs[i] = fault.New(fault.Conflict, "the session of agent %s is no longer at epoch %d", c.agentID, c.epoch)
				continue
			}
			v.add(c.agentID, micro(c.at))
		}
		if v.rows == 0 {
			return nil
		}
		text := v.with()
		_, err = t.exec(text+`
UPDATE agent SET state = `+v.arg(string(domain.AgentOffline))+`, offline_since = v.at
FROM v WHERE agent.id = v.k AND agent.state IN (`+v.arg(string(domain.AgentOnline))+`, `+v.arg(string(domain.AgentStale))+`)`, v.args...)
		return err
	})
	return outs, err
}

// SessionHolders returns the sessions of those of the agents that ever had one. Read it after the commit of a job to learn
// whom to wake.
func (s *Store) SessionHolders(ctx context.Context, agentIDs []string) (map[string]domain.Session, error) {
	var found map[string]domain.Session
	err := s.read(ctx, "session.holders", func(t *tx) error {
		found = make(map[string]domain.Session, len(agentIDs))
		return chunks(agentIDs, func(ids []string) error {
			in, args := inList(1, ids)
			return t.each("SELECT agent_id, epoch, holder, boot_id FROM agent_session WHERE agent_id IN "+in, args, func(scan func(...any) error) error {
				var x domain.Session
				err := scan(&x.AgentID, &x.Epoch, &x.Holder, &x.BootID)
				found[x.AgentID] = x
				return err
			})
		})
	})
	return found, err
}

// FlushSeen writes beats: last_seen never goes back, and a Stale agent is Online again; so is an Offline one whose session
// is open and that was heard since: a sweep after an outage calls agents Offline whose streams live. Beats carry nothing
// that cannot be lost, so each hundred is its own transaction, at READ COMMITTED.
func (s *Store) FlushSeen(ctx context.Context, seen []domain.Seen) error {
	return chunks(seen, func(seen []domain.Seen) error {
		return s.settledAt(ctx, "agent.seen", sql.LevelReadCommitted, func(t *tx) error {
			v := t.values("k text, at int")
			for _, b := range seen {
				v.add(b.AgentID, micro(b.At))
			}
			text := v.with()
			online, offline := v.arg(string(domain.AgentOnline)), v.arg(string(domain.AgentOffline))
			// A stream that ends beside this sets offline_since, which then is later than its last beat.
			back := `agent.state = ` + v.arg(string(domain.AgentStale)) + ` OR agent.state = ` + offline + ` AND v.at > agent.offline_since
 AND EXISTS (SELECT 1 FROM agent_session WHERE agent_session.agent_id = agent.id AND agent_session.holder <> '')`
			_, err := t.exec(text+`
UPDATE agent SET last_seen = v.at, state = CASE WHEN `+back+` THEN `+online+` ELSE agent.state END,
 offline_since = CASE WHEN `+back+` THEN 0 ELSE agent.offline_since END
FROM v WHERE agent.id = v.k AND agent.last_seen < v.at`, v.args...)
			return err
		})
	})
}

// RecordRejection keeps an agent's refusal of a state version; an older version's never replaces a newer one's.
func (s *Store) RecordRejection(ctx context.Context, r domain.StateRejection) error {
	return s.settled(ctx, "rejection.record", func(t *tx) error {
		_, err := t.exec(`INSERT INTO agent_rejection (agent_id, kind, name, version, reason, at) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (agent_id, kind, name) DO UPDATE SET version = excluded.version, reason = excluded.reason, at = excluded.at
WHERE agent_rejection.version <= excluded.version`, r.AgentID, r.Kind, r.Name, r.Version, r.Reason, micro(r.At))
		return err
	})
}

// ClearRejection forgets a refusal, because the state or a later version of it was applied. There being none is no error.
// Placements that rest after failures at a target that was refused until now are due at once: why they failed is most
// likely gone.
func (s *Store) ClearRejection(ctx context.Context, agentID, kind, name string) error {
	return s.settled(ctx, "rejection.clear", func(t *tx) error {
		n, err := t.exec("DELETE FROM agent_rejection WHERE agent_id = $1 AND kind = $2 AND name = $3", agentID, kind, name)
		if err != nil || n == 0 || kind != "target" {
			return err
		}
		// Due since the failure. One that holds what is wanted, is revoked or has an open job has no due_at and gets none.
		_, err = t.exec(`UPDATE placement SET due_at = updated_at, backoff_until = 0
WHERE target_id = $1 AND agent_id = $2 AND due_at IS NOT NULL AND failures > 0 AND backoff_until > 0`, name, agentID)
		return err
	})
}

// Rejections lists the states that an agent refuses.
func (s *Store) Rejections(ctx context.Context, agentID string) ([]domain.StateRejection, error) {
	var list []domain.StateRejection
	err := s.read(ctx, "rejection.list", func(t *tx) error {
		list = nil
		return t.each("SELECT agent_id, kind, name, version, reason, at FROM agent_rejection WHERE agent_id = $1 ORDER BY kind, name",
			[]any{agentID}, func(scan func(...any) error) error {
				var r domain.StateRejection
				var at int64
				err := scan(&r.AgentID, &r.Kind, &r.Name, &r.Version, &r.Reason, &at)
				r.At = fromMicro(at)
				list = append(list, r)
				return err
			})
	})
	return list, err
}
