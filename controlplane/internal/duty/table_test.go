package duty

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// memory is a store in which everything of one shard is due.
type memory struct {
	log        []string // what was done, in order
	fence      domain.Fence
	leaves     []domain.DueLeaf
	placements []domain.DuePlacement
	next       domain.NextDue
	verdicts   map[string]error // by certificate: of its job
	postpone   map[string]error
	postponed  map[string]time.Time
	batches    []int
	created    []domain.NewJob
	reapable   int
	statuses   int
	retained   int
	stale      []time.Time
	fail       error
}

func newMemory() *memory {
	return &memory{fence: domain.Fence{Duty: "d", Holder: "n1", Epoch: 1}, verdicts: map[string]error{}, postpone: map[string]error{}, postponed: map[string]time.Time{}}
}

func (m *memory) held(f domain.Fence) error {
	if f != m.fence {
		return fault.New(fault.Conflict, "the duty was lost")
	}
	return m.fail
}

func (m *memory) DueLeaves(_ context.Context, shard int, _ time.Time, limit int) ([]domain.DueLeaf, error) {
	if shard != 0 {
		return nil, nil
	}
	return m.leaves[:min(limit, len(m.leaves))], m.fail
}

func (m *memory) PostponeLeaf(_ context.Context, f domain.Fence, certificateID, _ string, at time.Time) error {
	if err := m.held(f); err != nil {
		return err
	}
	if err := m.postpone[certificateID]; err != nil {
		return err
	}
	m.postponed[certificateID] = at
	return nil
}

func (m *memory) CreateLeafJobs(_ context.Context, f domain.Fence, jobs []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error) {
	return m.create(f, jobs, op)
}

func (m *memory) CreateDeployments(_ context.Context, f domain.Fence, jobs []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error) {
	return m.create(f, jobs, op)
}

func (m *memory) create(f domain.Fence, jobs []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error) {
	if err := m.held(f); err != nil {
		return nil, err
	}
	if op.Actor != "node:n1" || op.RequestID == "" || op.At.IsZero() {
		return nil, fmt.Errorf("on whose behalf? %+v", op)
	}
	outs := make([]domain.NewJobOutcome, len(jobs))
	for i, j := range jobs {
		outs[i].Err = m.verdicts[j.CertificateID]
		outs[i].Job.AgentID = j.AgentID
		outs[i].Created = outs[i].Err == nil && j.Reason != "" && !strings.HasPrefix(j.CertificateID, "open")
	}
	m.created = append(m.created, jobs...)
	m.batches = append(m.batches, len(jobs))
	m.log = append(m.log, "commit")
	return outs, nil
}

func (m *memory) DuePlacements(_ context.Context, shard int, _ time.Time, limit int) ([]domain.DuePlacement, error) {
	if shard != 0 {
		return nil, nil
	}
	return m.placements[:min(limit, len(m.placements))], m.fail
}

func (m *memory) ReapJobs(_ context.Context, f domain.Fence, l domain.ReapLimits, _ time.Time, limit int) ([]domain.Job, error) {
	n := min(limit, m.reapable)
	m.reapable -= n
	jobs := make([]domain.Job, n)
	for i := range jobs {
		jobs[i] = domain.Job{ID: "job", AgentID: "agt_reaped"}
	}
	if l.Running != time.Hour {
		return nil, fmt.Errorf("limits %+v", l)
	}
	return jobs, m.held(f)
}

func (m *memory) NextDue(context.Context) (domain.NextDue, error) { return m.next, m.fail }

func (m *memory) SweepStatuses(_ context.Context, f domain.Fence, shard int, _ time.Time, limit int) (int, error) {
	if shard != 0 {
		return 0, m.held(f)
	}
	n := min(limit, m.statuses)
	m.statuses -= n
	return n, m.held(f)
}

func (m *memory) AgentsWithOpenJobs(_ context.Context, node string, _ int) ([]string, error) {
	return []string{"agt_1 on " + node, "agt_2 on " + node}, m.fail
}

func (m *memory) SweepAgents(_ context.Context, f domain.Fence, stale, offline, _ time.Time) (int, error) {
	m.stale = []time.Time{stale, offline}
	return 0, m.held(f)
}

func (m *memory) Retain(_ context.Context, f domain.Fence, before, _ time.Time, limit int) (int, error) {
	m.stale = []time.Time{before}
	n := min(limit, m.retained)
	m.retained -= n
	return n, m.held(f)
}

func (m *memory) Build(_ context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	return now.Add(time.Hour), m.held(f)
}

func (m *memory) deps() Deps {
	return Deps{Node: "n1", Store: m, CRLs: m, Log: slog.New(slog.DiscardHandler),
		Wake: func(agentID string) { m.log = append(m.log, "wake "+agentID) },
		WakeHeld: func(agentIDs []string) {
			for _, a := range agentIDs {
				m.log = append(m.log, "wake held "+a)
			}
		},
		Settings: Settings{RenewalCheck: time.Hour, JobProcessor: 30 * time.Second, JobRetry: 5 * time.Minute, JobTimeout: 10 * time.Minute, AgentHealth: 2 * time.Minute,
			ShortLivedExpiry: 30 * time.Second, CRLGeneration: time.Hour, Retention: time.Hour, Limits: domain.ReapLimits{Running: time.Hour},
			AgentStale: time.Minute, AgentOffline: 5 * time.Minute, KeepJobs: 24 * time.Hour}}
}

// run runs one line of the table, whose wiring it checks on the way.
func (m *memory) run(t *testing.T, name string) (time.Time, error) {
	t.Helper()
	for _, d := range Table(m.deps()) {
		if d.Name == name {
			return d.Run(t.Context(), m.fence, now)
		}
	}
	t.Fatalf("no duty %s", name)
	return time.Time{}, nil
}

func due(id string) domain.DueLeaf {
	return domain.DueLeaf{Leaf: domain.Leaf{CertificateID: id, AgentID: "agt_" + id, Current: 1, NotBefore: now.Add(-80 * 24 * time.Hour), NotAfter: now.Add(10 * 24 * time.Hour)}}
}

func early(id string) domain.DueLeaf {
	l := due(id)
	l.Leaf.NotBefore, l.Leaf.NotAfter = now, now.Add(90*24*time.Hour)
	return l
}

func TestTableIsARunnersTable(t *testing.T) {
	t.Parallel()
	m := newMemory()
	r, err := NewRunner(Config{Duties: Table(m.deps())})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.Status()); n != 8 {
		t.Fatalf("%d duties", n)
	}
	for _, d := range Table(m.deps()) {
		if d.Fenced != (d.Name != JobProcessor) {
			t.Errorf("%s: fenced %v", d.Name, d.Fenced)
		}
	}
}

func TestDueLeavesGetJobsAndTheOthersAreLookedAtLater(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.leaves = []domain.DueLeaf{due("a"), early("b"), due("open-c"), due("d")}
	revoked := due("e")
	revoked.Status = domain.CertificateRevoked
	m.leaves = append(m.leaves, revoked)
	m.next.Leaf = now.Add(3 * time.Hour)
	next, err := m.run(t, RenewalCheck)
	if err != nil || !next.Equal(m.next.Leaf) {
		t.Fatalf("next %s, %v", next, err)
	}
	if len(m.created) != 3 || m.created[0].Kind != domain.JobRenewal || !strings.Contains(m.created[0].Reason, "2/3 of its lifetime") {
		t.Fatalf("jobs: %+v", m.created)
	}
	if at, ok := m.postponed["b"]; !ok || !at.After(now) {
		t.Errorf("b is looked at again at %s", at)
	}
	if at, ok := m.postponed["e"]; !ok || !at.IsZero() {
		t.Errorf("a revoked leaf is looked at again at %s", at)
	}
	// Agents are woken after the commit, and not for a job that was there already.
	if want := []string{"commit", "wake agt_a", "wake agt_d"}; !slices.Equal(m.log, want) {
		t.Errorf("did %v, want %v", m.log, want)
	}
}

func TestJobsAreMadeInBatches(t *testing.T) {
	t.Parallel()
	m := newMemory()
	for i := range 2*batch + 7 {
		m.leaves = append(m.leaves, due(fmt.Sprint(i)))
	}
	if _, err := m.run(t, RenewalCheck); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.batches, []int{batch, batch, 7}) {
		t.Fatalf("batches %v", m.batches)
	}
	if first := slices.Index(m.log, "wake agt_0"); first != 1 {
		t.Errorf("the first batch's agents wait for the others: %v", m.log[:3])
	}
}

func TestFailuresOfJobsAreCountedAndStopNobody(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.leaves = []domain.DueLeaf{due("a"), due("b"), due("c"), due("d")}
	m.verdicts["a"] = fault.New(fault.Internal, "odd")
	m.verdicts["b"] = fault.New(fault.NotFound, "gone")
	m.verdicts["c"] = fault.New(fault.Conflict, "revoked meanwhile")
	_, err := m.run(t, RenewalCheck)
	if err == nil || !strings.Contains(err.Error(), "2 jobs could not be created") {
		t.Fatal(err)
	}
	if fault.Is(err, fault.Conflict) {
		t.Error("a failed job passes for the loss of the duty")
	}
	if !slices.Contains(m.log, "wake agt_d") {
		t.Error("a failure stopped another's job")
	}
	m.leaves = m.leaves[2:3]
	if _, err := m.run(t, RenewalCheck); err != nil {
		t.Errorf("a verdict about one leaf fails the duty: %v", err)
	}
}

// An operator's renewal between reading and postponing is no loss of the duty.
func TestAQuickOperatorIsNoLossOfTheDuty(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.leaves = []domain.DueLeaf{early("a"), early("b"), due("c")}
	m.postpone["a"] = fault.New(fault.Conflict, "the leaf is not due")
	if _, err := m.run(t, RenewalCheck); err != nil {
		t.Fatal(err)
	}
	if m.postponed["b"].IsZero() || !slices.Contains(m.log, "wake agt_c") {
		t.Error("the run ended early")
	}
	m.fence.Epoch = 1
	lost := m.deps()
	if _, err := lost.renewalCheck(t.Context(), domain.Fence{Duty: "d", Holder: "n1", Epoch: 9}, now); !fault.Is(err, fault.Conflict) {
		t.Errorf("a lost duty went unnoticed: %v", err)
	}
}

func TestEveryFencedDutyNoticesItsLoss(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.leaves, m.placements = []domain.DueLeaf{due("a")}, []domain.DuePlacement{{Wanted: 2, Enabled: true}}
	for _, d := range Table(m.deps()) {
		stale := m.fence
		stale.Epoch++
		if _, err := d.Run(t.Context(), stale, now); d.Fenced && !fault.Is(err, fault.Conflict) {
			t.Errorf("%s: %v", d.Name, err)
		}
	}
	if len(m.created) != 0 {
		t.Error("jobs were made without the duty")
	}
}

func TestLaggingPlacementsAllGoToTheStore(t *testing.T) {
	t.Parallel()
	m := newMemory()
	at := func(id string) domain.Placement {
		return domain.Placement{CertificateID: id, TargetID: "tgt", AgentID: "agt_" + id, InstalledGeneration: 1}
	}
	// If the duty kept back those that get no job, they would stay due, and the duty would run without a pause.
	m.placements = []domain.DuePlacement{{Placement: at("a"), Wanted: 2, Enabled: true}, {Placement: at("b"), Wanted: 2}, {Placement: at("open-c"), Wanted: 2, Enabled: true, OpenJob: true}}
	m.verdicts["b"] = fault.New(fault.Conflict, "target is disabled")
	m.next.Placement = now.Add(time.Minute)
	next, err := m.run(t, JobRetry)
	if err != nil || !next.Equal(m.next.Placement) || len(m.created) != 3 {
		t.Fatalf("%d to the store, next %s, %v", len(m.created), next, err)
	}
	if m.created[0].Kind != domain.JobDeployment || m.created[0].Reason != "generation 2 is wanted, 1 is held" {
		t.Errorf("%+v", m.created[0])
	}
	if want := []string{"commit", "wake agt_a"}; !slices.Equal(m.log, want) {
		t.Errorf("did %v, want %v", m.log, want)
	}
}

func TestReaperEmptiesTheTable(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.reapable = 2*batch + 1
	if _, err := m.run(t, JobTimeout); err != nil || m.reapable != 0 || len(m.log) != 2*batch+1 {
		t.Fatalf("%d left, %d woken, %v", m.reapable, len(m.log), err)
	}
}

func TestSweepsRunToTheEnd(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.statuses, m.retained, m.next.Status = 3*batch, 2*batch+5, now.Add(time.Second)
	if next, err := m.run(t, ShortLivedExpiry); err != nil || m.statuses != 0 || !next.Equal(m.next.Status) {
		t.Errorf("%d statuses left, next %s, %v", m.statuses, next, err)
	}
	if _, err := m.run(t, Retention); err != nil || m.retained != 0 || !m.stale[0].Equal(now.Add(-24*time.Hour)) {
		t.Errorf("%d rows left from before %v, %v", m.retained, m.stale, err)
	}
	if _, err := m.run(t, AgentHealth); err != nil || !m.stale[0].Equal(now.Add(-time.Minute)) || !m.stale[1].Equal(now.Add(-5*time.Minute)) {
		t.Errorf("agents silent since %v, %v", m.stale, err)
	}
	if _, err := m.run(t, JobProcessor); err != nil || !slices.Equal(m.log, []string{"wake held agt_1 on n1", "wake held agt_2 on n1"}) {
		t.Errorf("woke %v, %v", m.log, err)
	}
	if next, err := m.run(t, CRLGeneration); err != nil || !next.Equal(now.Add(time.Hour)) {
		t.Errorf("CRLs next at %s, %v", next, err)
	}
}

func TestAStoreThatIsDownIsAnError(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.fail = fault.New(fault.Retryable, "the database is away")
	for _, d := range Table(m.deps()) {
		if _, err := d.Run(t.Context(), m.fence, now); !fault.Is(err, fault.Retryable) {
			t.Errorf("%s: %v", d.Name, err)
		}
	}
}

// A node that has just started gives agents as long to come back as any silence is given.
func TestAgentsGetAGraceAfterAStart(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)
	// No store: a sweep would panic.
	d := Deps{Since: start, Settings: Settings{AgentOffline: 5 * time.Minute}}
	next, err := d.agentHealth(t.Context(), domain.Fence{}, start.Add(4*time.Minute))
	if err != nil || !next.Equal(start.Add(5*time.Minute)) {
		t.Errorf("swept, or not at the end of the grace: %v %v", next, err)
	}
}
