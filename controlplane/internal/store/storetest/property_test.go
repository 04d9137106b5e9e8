package storetest

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Random orders of the store's methods, by callers that are sometimes stale, keep the invariants: they are checked after
// every step.
func TestAnyOrderKeepsTheInvariants(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		tries, failed := 0, false
		rapid.Check(t, func(rt *rapid.T) {
			// A server gets a tenth of the tries; a failure is then still shrunk.
			if tries++; e.Name != "sqlite" && tries%10 != 0 && !failed {
				return
			}
			failed = true
			m := newMachine(t, rt, e)
			steps := rapid.IntRange(8, 40).Draw(rt, "steps")
			for range steps {
				m.step(rt)
				broken, err := m.w.Broken(t.Context(), m.w.DB(t))
				if err != nil {
					rt.Fatal(err)
				}
				if len(broken) > 0 {
					rt.Fatalf("after %v: %v", m.log, broken)
				}
			}
			m.close()
			failed = false
		})
	})
}

type result struct {
	job     string
	attempt int64
}

type machine struct {
	t       *testing.T
	w       *World
	agents  []domain.Agent
	targets []domain.Target
	certs   []string
	epochs  map[string]domain.Epoch
	fences  []domain.Fence
	signed  []domain.Issued
	applied map[result]string
	log     []string
}

func newMachine(t *testing.T, rt *rapid.T, e Engine) *machine {
	m := &machine{t: t, w: NewWorld(t, e), epochs: map[string]domain.Epoch{}, applied: map[result]string{}}
	for i := range 2 {
		a := m.w.Agent(t, fmt.Sprintf("a%d", i))
		m.agents = append(m.agents, a)
		for j := range 2 {
			m.targets = append(m.targets, m.w.Target(t, a.ID, fmt.Sprintf("g%d%d", i, j)))
		}
	}
	m.fences = append(m.fences, m.w.Duty(t, "all"))
	m.order(rt)
	return m
}

// close gives the files of this try back before the test ends.
func (m *machine) close() { _ = m.w.S.Close() }

// allowed fails on errors that no order of calls may bring about.
func (m *machine) allowed(rt *rapid.T, what string, err error) bool {
	m.log = append(m.log, fmt.Sprintf("%s: %v", what, err))
	switch fault.ClassOf(err) {
	case "":
		return true
	case fault.Conflict, fault.NotFound, fault.Invalid, fault.Forbidden, fault.Unauthorized:
		return false
	default:
		rt.Fatalf("%s: %v\nafter %v", what, err, m.log)
		return false
	}
}

// apply counts results: an attempt of a job has one.
func (m *machine) apply(rt *rapid.T, job string, attempt int64, what string) {
	r := result{job, attempt}
	if before, ok := m.applied[r]; ok && before != what {
		rt.Fatalf("attempt %d of %s has two results: %s and %s", attempt, job, before, what)
	}
	m.applied[r] = what
}

func (m *machine) order(rt *rapid.T) {
	var targets []string
	for _, g := range m.targets {
		if rapid.Bool().Draw(rt, "target") {
			targets = append(targets, g.ID)
		}
	}
	if len(targets) == 0 {
		targets = []string{m.targets[0].ID}
	}
	n := m.w.order(fmt.Sprintf("c%d.test", len(m.certs)), targets...)
	n.Certificate.Policy.Disabled = seldom(rt, "renewal off")
	_, _, err := m.w.S.CreateCertificate(m.t.Context(), n)
	if m.allowed(rt, "order", err) {
		m.certs = append(m.certs, n.Certificate.ID)
	}
}

func (m *machine) job(rt *rapid.T) (domain.Work, bool) {
	a := rapid.SampledFrom(m.agents).Draw(rt, "agent")
	work, err := openWork(m.t.Context(), m.w.S, a.ID)
	if err != nil {
		rt.Fatal(err)
	}
	if len(work) == 0 {
		return domain.Work{}, false
	}
	return rapid.SampledFrom(work).Draw(rt, "job"), true
}

// attempt is mostly the one that is awaited.
func attempt(rt *rapid.T, j domain.Job) int64 {
	if seldom(rt, "late") {
		return j.Attempt - 1
	}
	return j.Attempt
}

// seldom is true one time in eight. (Ranges of numbers are drawn towards their ends, which are the stale ones.)
func seldom(rt *rapid.T, what string) bool {
	return rapid.SampledFrom([]bool{false, false, false, false, false, false, false, true}).Draw(rt, what)
}

// flow takes a job all the way, without being stale.
func (m *machine) flow(rt *rapid.T) {
	x, ok := m.job(rt)
	if !ok {
		return
	}
	h := m.w.Hello(x.Job.AgentID, "n1")
	out := m.w.S.OpenSessions(m.t.Context(), []domain.SessionOpen{h})[0]
	if !m.allowed(rt, "open", out.Err) {
		return
	}
	m.epochs[h.AgentID] = out.Epoch
	j := x.Job
	if err := step(m.w, m.w.S, m.t, x, out.Epoch); m.allowed(rt, "flow", err) {
		m.apply(rt, j.ID, j.Attempt+1, fmt.Sprintf("flow %d", len(m.log)))
	}
}

func (m *machine) step(rt *rapid.T) {
	ctx, s, now := m.t.Context(), m.w.S, m.w.Now()
	what := rapid.SampledFrom([]string{"open", "flow", "flow", "flow", "flow", "flow", "flow", "dispatch", "dispatch", "dispatch", "accept", "accept", "accept", "intent", "intent", "intent", "issued", "issued",
		"issued", "complete", "complete", "complete", "fail", "close", "order", "duty", "duty", "pass", "take", "cancel", "renew", "revoke", "retire", "sweep"}).Draw(rt, "step")
	switch what {
	case "open":
		h := m.w.Hello(rapid.SampledFrom(m.agents).Draw(rt, "agent").ID, rapid.SampledFrom([]string{"n1", "n2"}).Draw(rt, "node"))
		out := s.OpenSessions(ctx, []domain.SessionOpen{h})[0]
		if m.allowed(rt, what, out.Err) {
			if out.Epoch != m.epochs[h.AgentID]+1 {
				rt.Fatalf("epoch %d after %d", out.Epoch, m.epochs[h.AgentID])
			}
			m.epochs[h.AgentID] = out.Epoch
		}
	case "close":
		a := rapid.SampledFrom(m.agents).Draw(rt, "agent")
		m.allowed(rt, what, s.CloseSession(ctx, a.ID, m.epochs[a.ID], now))
	case "flow":
		m.flow(rt)
	case "order":
		m.order(rt)
	case "pass":
		m.w.Pass(time.Duration(rapid.SampledFrom([]int{1, 60, 60 * 24, 60 * 24 * 21}).Draw(rt, "minutes")) * time.Minute)
	case "take":
		f, err := s.TakeDuty(ctx, "all", rapid.SampledFrom([]string{"n1", "n2"}).Draw(rt, "node"), now)
		if m.allowed(rt, what, err) {
			m.fences = append(m.fences, f)
		}
	case "duty", "sweep":
		m.duty(rt, what)
	case "cancel", "renew", "revoke", "retire":
		m.operator(rt, what)
	default:
		m.agent(rt, what)
	}
}

func (m *machine) operator(rt *rapid.T, what string) {
	ctx, s := m.t.Context(), m.w.S
	c := rapid.SampledFrom(m.certs).Draw(rt, "certificate")
	rare := seldom(rt, "rare")
	switch {
	case what == "cancel":
		if x, ok := m.job(rt); ok {
			_, err := s.CancelJob(ctx, x.Job.ID, m.w.Op())
			m.allowed(rt, what, err)
		}
	case what == "renew":
		_, err := s.RenewCertificate(ctx, c, "asked", m.w.Op())
		m.allowed(rt, what, err)
	case what == "revoke" && rare:
		_, _, err := s.RevokeCertificate(ctx, c, 1, m.w.Op())
		m.allowed(rt, what, err)
	case what == "retire" && rare:
		_, err := s.RetireAgent(ctx, m.agents[1].ID, "gone", m.w.Op())
		m.allowed(rt, what, err)
	}
}

func (m *machine) duty(rt *rapid.T, what string) {
	ctx, s, now := m.t.Context(), m.w.S, m.w.Now()
	f := m.fences[len(m.fences)-1]
	if len(m.fences) > 1 && seldom(rt, "late") {
		f = m.fences[len(m.fences)-2]
	}
	current := f == m.fences[len(m.fences)-1]
	refused := func(name string, err error) {
		if m.allowed(rt, name, err) != current {
			rt.Fatalf("%s under %+v of %d fences: %v", name, f, len(m.fences), err)
		}
	}
	if what == "sweep" {
		_, err := s.ReapJobs(ctx, f, domain.ReapLimits{AwaitingCSR: time.Hour, Running: time.Hour}, now, 10)
		refused("reap", err)
		_, err = s.Retain(ctx, f, now.Add(-24*time.Hour), now, 10)
		refused("retain", err)
		_, err = s.SweepAgents(ctx, f, now.Add(-time.Hour), now.Add(-2*time.Hour), now)
		refused("sweep agents", err)
		return
	}
	for shard := range domain.Shards {
		leaves, err := s.DueLeaves(ctx, shard, now, 100)
		m.allowed(rt, "due leaves", err)
		var items []domain.NewJob
		for _, l := range leaves {
			items = append(items, domain.NewJob{CertificateID: l.Leaf.CertificateID, AgentID: l.Leaf.AgentID, Reason: "due"})
		}
		if len(items) > 0 {
			_, err = s.CreateLeafJobs(ctx, f, items, m.w.Op())
			refused("leaf jobs", err)
		}
		items = nil
		placements, err := s.DuePlacements(ctx, shard, now, 100)
		m.allowed(rt, "due placements", err)
		for _, p := range placements {
			items = append(items, domain.NewJob{CertificateID: p.Placement.CertificateID, TargetID: p.Placement.TargetID, Reason: "due"})
		}
		if len(items) > 0 {
			_, err = s.CreateDeployments(ctx, f, items, m.w.Op())
			refused("deployments", err)
		}
		_, err = s.SweepStatuses(ctx, f, shard, now, 100)
		refused("statuses", err)
	}
}

func (m *machine) agent(rt *rapid.T, what string) {
	ctx, s, now := m.t.Context(), m.w.S, m.w.Now()
	if what == "issued" {
		if len(m.signed) == 0 {
			return
		}
		it := rapid.SampledFrom(m.signed).Draw(rt, "signed")
		it.At = now
		if m.allowed(rt, what, s.RecordIssued(ctx, []domain.Issued{it})[0].Err) {
			m.apply(rt, it.JobID, it.Attempt, "issued "+it.Version.Serial)
		}
		return
	}
	x, ok := m.job(rt)
	if !ok {
		return
	}
	j := x.Job
	switch n := attempt(rt, j); what {
	case "dispatch":
		e := m.epochs[j.AgentID]
		if seldom(rt, "late session") {
			e--
		}
		m.allowed(rt, what, s.Dispatch(ctx, []domain.Dispatch{{JobID: j.ID, AgentID: j.AgentID, Attempt: n, Epoch: e, At: now}})[0])
	case "accept":
		m.allowed(rt, what, s.Accept(ctx, []domain.Acceptance{{JobID: j.ID, AgentID: j.AgentID, Attempt: n, At: now}})[0])
	case "fail":
		class := rapid.SampledFrom([]fault.Class{fault.Retryable, fault.Rejected}).Draw(rt, "class")
		if m.allowed(rt, what, s.FailJobs(ctx, []domain.Failure{{JobID: j.ID, AgentID: j.AgentID, Attempt: n, Class: string(class), Message: "no", At: now}})[0].Err) {
			m.apply(rt, j.ID, n, fmt.Sprintf("failure %d", len(m.log)))
		}
	case "intent":
		key := "key of " + j.CertificateID
		if seldom(rt, "lost key") {
			key += fmt.Sprint(len(m.log))
		}
		out := s.RecordIntents(ctx, []domain.Intent{m.w.Intent(j, n, key)})[0]
		if m.allowed(rt, what, out.Err) && out.Issued == nil {
			it := m.w.Signed(out.Intent)
			it.Attempt = n
			m.signed = append(m.signed, it)
		}
	case "complete":
		r := m.w.Deployed(x, n)
		if seldom(rt, "wrong") {
			r.InstalledFingerprint = "00"
		}
		if m.allowed(rt, what, s.CompleteDeployments(ctx, []domain.DeployResult{r})[0].Err) {
			m.apply(rt, j.ID, n, fmt.Sprintf("deployed %d", len(m.log)))
		}
	}
}
