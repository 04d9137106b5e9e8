package storetest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// Of an agent with very many open jobs a window is read, behind what is out, and by windows all of it in the end: the oldest
// first within an owner, owners in turns, and nothing by a scan of all its jobs.
func TestOpenWorkByWindows(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		all := &seen{args: map[string][]any{}}
		w := NewWorld(t, e, func(c *store.Config) { c.Observe = all.observe })
		fill(t, w)
		a := w.Agent(t, "busy")
		const big, owners = 3000, domain.WindowOwners + 8
		owner := func(i int) string {
			if i < big {
				return "big"
			}
			return fmt.Sprintf("small%02d", i-big)
		}
		n := big + owners
		flood(t, w, a.ID, n, owner)
		clear(all.args)

		query := domain.WorkQuery{AgentID: a.ID}
		seen := map[string]bool{}
		var bigs []string
		for round := 0; ; round++ {
			answers, err := w.S.OpenWork(t.Context(), []domain.WorkQuery{query, {AgentID: "nobody"}})
			must(t, err)
			got := answers[0]
			if len(answers[1].Work) != 0 || len(got.Kept) > len(query.Out) {
				t.Fatalf("round %d: %d of nobody, %d of %d kept", round, len(answers[1].Work), len(got.Kept), len(query.Out))
			}
			if len(got.Work) > 4*domain.WorkWindow {
				t.Fatalf("round %d brings %d jobs", round, len(got.Work))
			}
			const first = 4*domain.WorkWindow/domain.WindowOwners + domain.WindowOwners - 1 // the big one's share, and one of each other
			if round == 0 && (len(got.Work) != first || !got.MoreOwners || !slices.Equal(got.More, []domain.JobKind{domain.JobDeployment})) {
				t.Fatalf("the first window: %d jobs, more of %v, more owners %v", len(got.Work), got.More, got.MoreOwners)
			}
			for _, x := range got.Work {
				if seen[x.Job.ID] {
					t.Fatalf("round %d: job %s comes twice", round, x.Job.ID)
				}
				seen[x.Job.ID] = true
				if strings.HasPrefix(x.Job.ID, "big") {
					bigs = append(bigs, x.Job.ID)
				}
				query.Out = append(query.Out, domain.JobRef{JobID: x.Job.ID, Attempt: x.Job.Attempt})
			}
			if round == 1 && len(seen)-len(bigs) != owners {
				t.Errorf("after two windows %d owners of %d had a job", len(seen)-len(bigs), owners)
			}
			query.After = got.Next
			if len(got.Work) == 0 {
				break
			}
		}
		if len(seen) != n || !slices.IsSorted(bigs) {
			t.Errorf("%d of %d jobs came; by age: %v", len(seen), n, slices.IsSorted(bigs))
		}
		// A job that is at another attempt than the caller knows is brought in full.
		query.Out[0].Attempt = 7
		answers, err := w.S.OpenWork(t.Context(), []domain.WorkQuery{query})
		must(t, err)
		if got := answers[0].Work; len(got) != 1 || got[0].Job.ID != query.Out[0].JobID || len(answers[0].Kept) != n-1 {
			t.Errorf("%d jobs brought, %d kept", len(got), len(answers[0].Kept))
		}
		plan := planPostgres
		switch e.Name {
		case "sqlite":
			plan = planSQLite
		case "cockroach":
			plan = planCockroach
		}
		lanes := 0
		for statement, args := range all.args {
			for _, bad := range plan(t, w.DB(t), statement, args) {
				t.Errorf("%s\n%s", bad, statement)
			}
			if e.Name == "sqlite" && strings.Contains(statement, "ORDER BY job.run_at") {
				lanes++
				for _, line := range explained(t, w, statement, args) {
					if !strings.Contains(line, "job_lane") {
						t.Errorf("a lane is read by: %s", line)
					}
				}
			}
		}
		if e.Name == "sqlite" && lanes == 0 {
			t.Error("no lane was read")
		}
	})
}

// explained is SQLite's plan.
func explained(t *testing.T, w *World, statement string, args []any) []string {
	t.Helper()
	rows, err := w.DB(t).QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+statement, args...)
	must(t, err)
	defer func() { _ = rows.Close() }()
	var lines []string
	for rows.Next() {
		var id, parent, unused int
		var line string
		must(t, rows.Scan(&id, &parent, &unused, &line))
		lines = append(lines, line)
	}
	must(t, rows.Err())
	return lines
}

// flood gives an agent n deployments of its one target, of a certificate that fill made, past the store.
func flood(t *testing.T, w *World, agentID string, n int, owner func(i int) string) {
	t.Helper()
	g := w.Target(t, agentID, "flooded")
	x, err := w.DB(t).BeginTx(t.Context(), nil)
	must(t, err)
	defer func() { _ = x.Rollback() }()
	_, err = x.ExecContext(t.Context(), `INSERT INTO version (issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm,
 not_before, not_after, revoked_at, revocation_reason, created_at) VALUES ($1, 'flood', 'c1', $2, 1, '', '', 'flood', 'k', '', 0, 0, NULL, 0, 0)`, w.Issuer, agentID)
	must(t, err)
	for i := 0; i < n; i += 500 {
		var values []string
		for k := i; k < min(i+500, n); k++ {
			values = append(values, fmt.Sprintf("('%s%05d', 'Deployment', 'Pending', 'c1', '%s', '%s', 1, 0, 0, 5, %d, 0, '', '', '', '', 'flood%d', 1, '%s', 0, 0, NULL)",
				owner(k)[:3], k, agentID, g.ID, k, k, owner(k)))
		}
		_, err := x.ExecContext(t.Context(), `INSERT INTO job (id, kind, state, certificate_id, agent_id, target_id, generation, attempt, tries, max_tries, run_at, accepted_at,
 error_class, error, reason, request_id, open_key, shard, owner, created_at, updated_at, finished_at) VALUES `+strings.Join(values, ", "))
		must(t, err)
	}
	must(t, x.Commit())
	_, err = w.DB(t).ExecContext(t.Context(), "ANALYZE")
	must(t, err)
}
