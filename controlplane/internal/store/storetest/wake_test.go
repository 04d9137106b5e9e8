package storetest

import (
	"database/sql"
	"fmt"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Wake-up without a race: a job's creator commits, then reads the holder; a Hello commits, then loads the work. Whatever
// the order, either the job was loaded or its creator saw the new holder.
func TestWakeUpMissesNothing(t *testing.T) {
	t.Parallel()
	const races = 400
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a := w.Agent(t, "web1")
		w.Open(t, a.ID, "n0")
		doubles := 0
		for i := range races {
			node := fmt.Sprintf("n%d", i+1)
			g := w.Target(t, a.ID, fmt.Sprintf("t%d", i))
			var job string
			var woken domain.Session
			var loaded []domain.Work
			var errs [2]error
			gate := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() {
				<-gate
				_, jobs, err := w.S.CreateCertificate(ctx, w.order(fmt.Sprintf("c%d.test", i), g.ID))
				if err != nil {
					errs[0] = err
					return
				}
				job = jobs[0].ID
				holders, err := w.S.SessionHolders(ctx, []string{a.ID})
				woken, errs[0] = holders[a.ID], err
			})
			wg.Go(func() {
				<-gate
				if errs[1] = w.S.OpenSessions(ctx, []domain.SessionOpen{w.Hello(a.ID, node)})[0].Err; errs[1] == nil {
					loaded, errs[1] = openWork(ctx, w.S, a.ID)
				}
			})
			close(gate)
			wg.Wait()
			must(t, errs[0])
			must(t, errs[1])
			saw := woken.Holder == node
			for _, x := range loaded {
				if x.Job.ID == job {
					if saw {
						doubles++
					}
					saw = true
				}
			}
			if !saw {
				t.Fatalf("race %d: the job was not loaded and its creator woke %q", i, woken.Holder)
			}
			_, err := w.S.CancelJob(ctx, job, w.Op())
			must(t, err)
		}
		t.Logf("%d races, %d woken twice, none missed", races, doubles)
	})
}

// The same in one transaction each, at READ COMMITTED, misses: the test above can fail.
func TestWakeUpInOneStepMisses(t *testing.T) {
	t.Parallel()
	for _, e := range Engines(t) {
		if e.Name != "postgres" {
			continue
		}
		w := NewWorld(t, e)
		ctx := t.Context()
		a := w.Agent(t, "web1")
		w.Open(t, a.ID, "n1")
		begin := func() *sql.Tx {
			x, err := w.DB(t).BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
			must(t, err)
			return x
		}
		creator, hello := begin(), begin()
		_, err := creator.ExecContext(ctx, `INSERT INTO job (id, kind, state, certificate_id, agent_id, target_id, generation, attempt, tries, max_tries, run_at,
 accepted_at, error_class, error, reason, request_id, open_key, shard, created_at, updated_at)
VALUES ('job_1', 'Issuance', 'AwaitingCSR', 'c', $1, '', 1, 0, 0, 5, 0, 0, '', '', '', '', 'leaf:c:a', 0, 0, 0)`, a.ID)
		must(t, err)
		_, err = hello.ExecContext(ctx, "UPDATE agent_session SET epoch = epoch + 1, holder = 'n2' WHERE agent_id = $1", a.ID)
		must(t, err)
		var holder string
		must(t, creator.QueryRowContext(ctx, "SELECT holder FROM agent_session WHERE agent_id = $1", a.ID).Scan(&holder))
		var jobs int
		must(t, hello.QueryRowContext(ctx, "SELECT COUNT(*) FROM job WHERE agent_id = $1 AND finished_at IS NULL", a.ID).Scan(&jobs))
		must(t, creator.Commit())
		must(t, hello.Commit())
		if holder != "n1" || jobs != 0 {
			t.Fatalf("it did not miss: holder %s, %d jobs", holder, jobs)
		}
	}
}
