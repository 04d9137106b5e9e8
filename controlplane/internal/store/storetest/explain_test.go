package storetest

import (
	"context"
	"database/sql"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// seen keeps each statement with its last arguments.
type seen struct {
	mu   sync.Mutex
	args map[string][]any
}

func (s *seen) observe(statement string, args []any) {
	observe(statement, args)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.args[statement] = args
}

// No statement of the hot flow and of the duties reads a large table from end to end. The tables hold thousands of rows,
// so that an index is worth its while, and the plans are those of the very statements that the methods ran.
func TestPlansUseIndexes(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		all := &seen{args: map[string][]any{}}
		w := NewWorld(t, e, func(c *store.Config) { c.Observe = all.observe })
		fill(t, w)
		clear(all.args)
		hotFlow(t, w)
		plan := planPostgres
		switch e.Name {
		case "sqlite":
			plan = planSQLite
		case "cockroach":
			plan = planCockroach
		}
		large := regexp.MustCompile(`\b(job|leaf|placement|intent|version|certificate|certificate_san|agent|agent_session|agent_identity|audit)\b`)
		n := 0
		for statement, args := range all.args {
			if !large.MatchString(statement) || mayScan(statement) {
				continue
			}
			n++
			for _, bad := range plan(t, w.DB(t), statement, args) {
				t.Errorf("%s\n%s", bad, statement)
			}
		}
		if n < 30 {
			t.Fatalf("only %d statements were looked at", n)
		}
	})
}

// mayScan names the statements that are right to read much: the net under lost wake-ups looks at all open jobs or at all
// sessions, whichever are fewer, and 64 names at once of a table of 3,000 cost as much by its index.
func mayScan(statement string) bool {
	return strings.HasPrefix(statement, "SELECT DISTINCT job.agent_id FROM job JOIN agent_session") || strings.HasPrefix(statement, "SELECT name FROM agent WHERE name IN")
}

// hotFlow runs what the test is about, among the rows of fill.
func hotFlow(t *testing.T, w *World) {
	t.Helper()
	ctx := t.Context()
	a := w.Agent(t, "hot")
	g := w.Target(t, a.ID, "hot")
	c, jobs := w.Order(t, "hot.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	d := w.Issue(t, jobs[0], session.Epoch, "key")[0]
	_, err := openWork(ctx, w.S, a.ID)
	must(t, err)
	w.Deploy(t, d, session.Epoch)
	_, err = w.S.Settlements(ctx, a.ID, []domain.JobRef{{JobID: d.Job.ID, Attempt: 1}})
	must(t, err)
	w.Pass(30 * 24 * time.Hour)
	f := w.Duty(t, "all")
	shard := domain.ShardOf(c.ID)
	_, err = w.S.DueLeaves(ctx, shard, w.Now(), 50)
	must(t, err)
	_, err = w.S.DuePlacements(ctx, shard, w.Now(), 50)
	must(t, err)
	must(t, w.S.PostponeLeaf(ctx, f, c.ID, a.ID, w.Now()))
	outs, err := w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
	must(t, err)
	j := outs[0].Job
	for range domain.DefaultMaxTries {
		attempt := w.Dispatch(t, j, session.Epoch)
		must(t, w.S.RecordIntents(ctx, []domain.Intent{w.Intent(j, attempt, "key")})[0].Err)
		j = w.failed(t, j, attempt)
	}
	_, err = w.S.NextDue(ctx)
	must(t, err)
	_, err = w.S.SweepStatuses(ctx, f, shard, w.Now(), 50)
	must(t, err)
	_, err = w.S.ReapJobs(ctx, f, domain.ReapLimits{AwaitingCSR: time.Hour, AwaitingApproval: time.Hour, Running: time.Hour}, w.Now(), 50)
	must(t, err)
	_, err = w.S.AgentsWithOpenJobs(ctx, "n1", 50)
	must(t, err)
	must(t, w.S.FlushSeen(ctx, []domain.Seen{{AgentID: a.ID, At: w.Now()}}))
	_, err = w.S.Retain(ctx, f, w.Now().Add(-time.Hour), w.Now(), 5)
	must(t, err)
	_, err = w.S.SessionHolders(ctx, []string{a.ID})
	must(t, err)
	must(t, w.S.CloseSession(ctx, a.ID, session.Epoch, w.Now()))
}

func (w *World) failed(t *testing.T, j domain.Job, attempt int64) domain.Job {
	t.Helper()
	out := w.S.FailJobs(t.Context(), []domain.Failure{{JobID: j.ID, AgentID: j.AgentID, Attempt: attempt, Class: "retryable", At: w.Now()}})[0]
	must(t, out.Err)
	return out.Job
}

// fill makes an estate of 3,000 hosts with a certificate each, past the store because it is thirty times as fast.
func fill(t *testing.T, w *World) {
	t.Helper()
	const hosts, done = 3000, 3
	ctx := t.Context()
	x, err := w.DB(t).BeginTx(ctx, nil)
	must(t, err)
	defer func() { _ = x.Rollback() }()
	exec := func(statement string, rows int, row func(i int) string) {
		t.Helper()
		for i := 0; i < rows; i += 500 {
			var values []string
			for k := i; k < min(i+500, rows); k++ {
				values = append(values, row(k))
			}
			if _, err := x.ExecContext(ctx, statement+" VALUES "+strings.Join(values, ", ")); err != nil {
				t.Fatalf("%s: %v", statement, err)
			}
		}
	}
	far := Start.Add(1000 * 24 * time.Hour).UnixMicro()
	exec("INSERT INTO agent (id, name, state, labels, facts, capabilities, protocol, reason, created_at, last_seen, offline_since)", hosts, func(i int) string {
		return fmt.Sprintf("('a%d', 'host%d', 'Online', '{}', '{}', '[]', 1, '', 0, 0, 0)", i, i)
	})
	exec("INSERT INTO agent_session (agent_id, epoch, holder, boot_id, opened_at)", hosts, func(i int) string {
		return fmt.Sprintf("('a%d', 1, 'n%d', 'b', 0)", i, i%3)
	})
	exec("INSERT INTO agent_identity (serial, agent_id, spki, not_before, not_after, revoked_at, first_used_at, created_at)", hosts, func(i int) string {
		return fmt.Sprintf("('s%d', 'a%d', 'k%d', 0, 0, 0, 1, 0)", i, i, i)
	})
	exec("INSERT INTO target (id, name, agent_id, kind, settings, verify_address, server_name, enabled, created_at, revision)", hosts, func(i int) string {
		return fmt.Sprintf("('t%d', 'target%d', 'a%d', 'file', '{}', '', '', TRUE, 0, 1)", i, i, i)
	})
	exec(`INSERT INTO certificate (id, name, common_name, issuer_id, profile_id, owner, policy, status, not_after, status_at, shard, request_id, created_by,
 created_at, updated_at, revision)`, hosts, func(i int) string {
		return fmt.Sprintf("('c%d', 'c%d', 'c%d', '%s', '%s', '', '{}', 'Active', %d, %d, %d, NULL, '', 0, 0, 1)", i, i, i, w.Issuer, w.Profile, far, far-int64(i), i%domain.Shards)
	})
	exec("INSERT INTO certificate_san (certificate_id, kind, value)", hosts, func(i int) string { return fmt.Sprintf("('c%d', 'dns', 'c%d.test')", i, i) })
	exec(`INSERT INTO leaf (certificate_id, agent_id, generation, current_generation, serial, not_before, not_after, due_at, failures, backoff_until,
 last_error, revoked, shard)`, hosts, func(i int) string {
		return fmt.Sprintf("('c%d', 'a%d', 1, 1, 'x%d', 0, %d, %d, 0, 0, '', FALSE, %d)", i, i, i, far, far-int64(i), i%domain.Shards)
	})
	exec(`INSERT INTO placement (certificate_id, target_id, agent_id, state, installed_generation, served_generation, installed_fingerprint, served_fingerprint,
 served_at, due_at, failures, backoff_until, last_error, shard, updated_at)`, hosts, func(i int) string {
		return fmt.Sprintf("('c%d', 't%d', 'a%d', 'Served', 1, 1, '', '', 0, %d, 0, 0, '', %d, 0)", i, i, i, far+int64(i), i%domain.Shards)
	})
	exec(`INSERT INTO intent (id, certificate_id, agent_id, generation, job_id, attempt, issuer_id, serial, tbs, order_key, ref, spki, state, recovery, created_at)`,
		hosts, func(i int) string {
			return fmt.Sprintf("('i%d', 'c%d', 'a%d', 1, 'j%d', 1, '%s', 'x%d', NULL, '', '', 'k', 'Consumed', 0, 0)", i, i, i, i, w.Issuer, i)
		})
	exec(`INSERT INTO version (issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm, not_before, not_after,
 revoked_at, revocation_reason, created_at)`, hosts, func(i int) string {
		return fmt.Sprintf("('%s', 'x%d', 'c%d', 'a%d', 1, '', '', 'f%d', 'k', '', 0, %d, NULL, 0, 0)", w.Issuer, i, i, i, i, far)
	})
	exec(`INSERT INTO job (id, kind, state, certificate_id, agent_id, target_id, generation, attempt, tries, max_tries, run_at, accepted_at, error_class, error,
 reason, request_id, open_key, shard, created_at, updated_at, finished_at)`, done*hosts, func(i int) string {
		h := i % hosts
		if i < hosts/10 {
			return fmt.Sprintf("('j%d', 'Deployment', 'Pending', 'c%d', 'a%d', 't%d', 1, 0, 0, 5, 0, 0, '', '', '', '', 'placement:c%d:t%d', %d, 0, %d, NULL)",
				i, h, h, h, h, h, h%domain.Shards, far)
		}
		return fmt.Sprintf("('j%d', 'Renewal', 'Completed', 'c%d', 'a%d', '', 1, 1, 1, 5, 0, 0, '', '', '', '', NULL, %d, 0, 0, %d)", i, h, h, h%domain.Shards, far)
	})
	must(t, x.Commit())
	_, err = w.DB(t).ExecContext(ctx, "ANALYZE")
	must(t, err)
}

func planPostgres(t *testing.T, db *sql.DB, statement string, args []any) []string {
	t.Helper()
	return planLines(t, db, "EXPLAIN "+statement, args, func(line string) bool {
		return strings.Contains(line, "Seq Scan on ") && !strings.Contains(line, "target") && !small(line)
	})
}

func planCockroach(t *testing.T, db *sql.DB, statement string, args []any) []string {
	t.Helper()
	return planLines(t, db, "EXPLAIN "+statement, args, func(line string) bool { return strings.Contains(line, "FULL SCAN") })
}

// small names tables of a handful of rows.
func small(line string) bool {
	for _, table := range []string{"meta", "duty_fence", "profile", "issuer", "join_token", "enrollment", "ca"} {
		if strings.Contains(line, "Seq Scan on "+table+" ") || strings.HasSuffix(line, "SCAN "+table) {
			return true
		}
	}
	return false
}

func planSQLite(t *testing.T, db *sql.DB, statement string, args []any) []string {
	t.Helper()
	scan := regexp.MustCompile(`^SCAN (v|heads|\d* ?CONSTANT ROWS?|\(.*\)|\d+-ROW VALUES CLAUSE|v USING.*)$`)
	return planLines(t, db, "EXPLAIN QUERY PLAN "+statement, args, func(line string) bool {
		return strings.HasPrefix(line, "SCAN ") && !scan.MatchString(line) && !small(line)
	})
}

func planLines(t *testing.T, db *sql.DB, statement string, args []any, bad func(string) bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	rows, err := db.QueryContext(ctx, statement, args...)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	defer func() { _ = rows.Close() }()
	columns, err := rows.Columns()
	must(t, err)
	var found []string
	for rows.Next() {
		cells := make([]any, len(columns))
		for i := range cells {
			cells[i] = new(any)
		}
		must(t, rows.Scan(cells...))
		line := fmt.Sprint(*(cells[len(cells)-1].(*any)))
		if bad(line) {
			found = append(found, line)
		}
	}
	must(t, rows.Err())
	return found
}
