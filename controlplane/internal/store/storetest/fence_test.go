package storetest

import (
	"context"
	"database/sql"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// pauser is a store.Faults that stops the first transaction of a name before its n-th statement.
type pauser struct {
	name            string
	n               int
	once            sync.Once
	reached, resume chan struct{}
}

func newPauser(name string, n int) *pauser {
	return &pauser{name: name, n: n, reached: make(chan struct{}), resume: make(chan struct{})}
}

func (p *pauser) Before(name string, n int) error {
	if name == p.name && n == p.n {
		p.once.Do(func() { close(p.reached); <-p.resume })
	}
	return nil
}

func (*pauser) Commit(string) error { return nil }

// within waits for c, no longer than a generous deadline.
func within[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

// A writer that is stopped inside its transaction, after it has looked at the fence, writes nothing once another node has
// the duty.
func TestPausedHolderCommitsNothing(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		pause := newPauser("leaf.jobs", 2)
		dsn := e.New(t)
		if e.Name != "sqlite" {
			dsn += "&idle_in_transaction_session_timeout=400ms" // 5 s in the product
		}
		w := &World{Engine: e, DSN: dsn, now: Start}
		w.S = e.OpenAt(t, dsn, func(c *store.Config) { c.Faults = pause })
		w.seed(t)
		a := w.Agent(t, "web1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		session := w.Open(t, a.ID, "n1")
		w.Issue(t, jobs[0], session.Epoch, "key")
		old := w.Duty(t, "renew")
		other := e.OpenAt(t, dsn)

		written := make(chan error, 1)
		go func() {
			_, err := w.S.CreateLeafJobs(context.Background(), old, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
			written <- err
		}()
		within(t, pause.reached, "statement after the fence")
		taken := make(chan error, 1)
		go func() {
			_, err := other.TakeDuty(context.Background(), "renew", "n2", w.Now())
			taken <- err
		}()
		if e.Name == "sqlite" {
			// There is one writer: the taker waits until the paused one has committed, which it may.
			select {
			case err := <-taken:
				t.Fatalf("the duty was taken from inside another's transaction: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			close(pause.resume)
			must(t, within(t, written, "answer of the writer"))
			must(t, within(t, taken, "answer of the taker"))
		} else {
			must(t, within(t, taken, "answer of the taker"))
			close(pause.resume)
			if err := within(t, written, "answer of the writer"); !fault.Is(err, fault.Conflict) {
				t.Fatalf("the paused writer: %v", err)
			}
			if n := w.count(t, "SELECT COUNT(*) FROM job WHERE kind = 'Renewal'"); n != 0 {
				t.Fatal("the paused writer's job is there")
			}
		}
		_, err := w.S.CreateLeafJobs(t.Context(), old, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
		if !fault.Is(err, fault.Conflict) {
			t.Fatalf("the former holder: %v", err)
		}
		w.Check(t)
	})
}

// The same for dispatch, which runs at READ COMMITTED: a node that is stopped after it has looked at the session's epoch
// does not raise the attempt once another node holds the session.
func TestPausedDispatchCommitsNothing(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		pause := newPauser("job.dispatch", 2)
		dsn := e.New(t)
		if e.Name != "sqlite" {
			dsn += "&idle_in_transaction_session_timeout=400ms"
		}
		w := &World{Engine: e, DSN: dsn, now: Start}
		w.S = e.OpenAt(t, dsn, func(c *store.Config) { c.Faults = pause })
		w.seed(t)
		a := w.Agent(t, "web1")
		_, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		session := w.Open(t, a.ID, "n1")
		other := e.OpenAt(t, dsn)
		written := make(chan error, 1)
		go func() {
			written <- w.S.Dispatch(context.Background(), []domain.Dispatch{{JobID: jobs[0].ID, AgentID: a.ID, Epoch: session.Epoch, At: w.Now()}})[0]
		}()
		within(t, pause.reached, "statement after the epoch")
		opened := make(chan domain.SessionOpened, 1)
		go func() {
			opened <- other.OpenSessions(context.Background(), []domain.SessionOpen{w.Hello(a.ID, "n2")})[0]
		}()
		if e.Name == "sqlite" {
			close(pause.resume)
			must(t, within(t, written, "answer of the dispatcher"))
			must(t, within(t, opened, "session").Err)
		} else {
			must(t, within(t, opened, "session").Err)
			close(pause.resume)
			if err := within(t, written, "answer of the dispatcher"); !fault.Is(err, fault.Conflict) {
				t.Fatalf("the paused dispatcher: %v", err)
			}
			if j := w.Job(t, jobs[0].ID); j.Attempt != 0 {
				t.Fatalf("attempt %d", j.Attempt)
			}
		}
	})
}

// Why the fence is a write: under SERIALIZABLE a plain read lets the paused writer commit. This test shows that the two
// above can fail.
func TestPlainReadOfTheFenceIsNotEnough(t *testing.T) {
	t.Parallel()
	for _, e := range Engines(t) {
		if e.Name != "postgres" {
			continue
		}
		w := NewWorld(t, e)
		w.Duty(t, "renew")
		ctx := t.Context()
		x, err := w.DB(t).BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelSerializable})
		must(t, err)
		defer func() { _ = x.Rollback() }()
		var epoch int64
		must(t, x.QueryRowContext(ctx, "SELECT epoch FROM duty_fence WHERE duty = 'renew'").Scan(&epoch))
		_, err = w.S.TakeDuty(ctx, "renew", "n2", w.Now())
		must(t, err)
		_, err = x.ExecContext(ctx, "INSERT INTO meta (key, value) VALUES ('written by', 'the former holder')")
		must(t, err)
		must(t, x.Commit())
	}
}

// What the product sets for its sessions.
func TestSessionSettings(t *testing.T) {
	t.Parallel()
	for _, e := range Engines(t) {
		if e.Name == "sqlite" {
			continue
		}
		w := NewWorld(t, e)
		got, err := w.S.Settings(t.Context(), "idle_in_transaction_session_timeout", "lock_timeout", "default_transaction_isolation")
		must(t, err)
		if got[0] != "5s" || got[1] != "3s" || got[2] != "serializable" {
			t.Fatalf("%v", got)
		}
	}
}
