package domain

import (
	"slices"
	"testing"

	"github.com/certmesh/certmesh/protocol/fault"
)

var jobStates = []JobState{JobPending, JobAwaitingCSR, JobAwaitingApproval, JobRunning, JobCompleted, JobFailed, JobCancelled}

func TestJobTransitions(t *testing.T) {
	t.Parallel()
	legal := map[JobState][]JobState{
		JobPending:          {JobPending, JobRunning, JobFailed, JobCancelled, JobCompleted},
		JobAwaitingCSR:      {JobAwaitingCSR, JobRunning, JobCompleted, JobFailed, JobCancelled},
		JobAwaitingApproval: {JobAwaitingCSR, JobPending, JobFailed, JobCancelled},
		JobRunning:          {JobRunning, JobPending, JobAwaitingCSR, JobCompleted, JobFailed, JobCancelled},
	}
	for _, from := range jobStates {
		for _, to := range jobStates {
			err := CheckTransition(from, to)
			if want := slices.Contains(legal[from], to); (err == nil) != want || err != nil && !fault.Is(err, fault.Conflict) {
				t.Errorf("%s to %s: %v", from, to, err)
			}
		}
		if from.Open() != (len(legal[from]) > 0) {
			t.Errorf("%s: open is %v", from, from.Open())
		}
		// Whatever is open can be cancelled and failed: nothing hangs for ever (lesson 4).
		if from.Open() && (CheckTransition(from, JobCancelled) != nil || CheckTransition(from, JobFailed) != nil) {
			t.Errorf("%s cannot be ended", from)
		}
	}
	if err := CheckTransition("", JobPending); err == nil {
		t.Error("a job without a state may move")
	}
}

func TestInitialStates(t *testing.T) {
	t.Parallel()
	for kind, want := range map[JobKind]JobState{JobIssuance: JobAwaitingCSR, JobRenewal: JobAwaitingCSR, JobDeployment: JobPending, JobValidation: JobPending} {
		if got := kind.InitialState(); got != want || !got.Open() {
			t.Errorf("%s begins %s", kind, got)
		}
		// A running job that fails goes back to where it began.
		if err := CheckTransition(JobRunning, kind.InitialState()); err != nil {
			t.Errorf("%s cannot be tried again: %v", kind, err)
		}
	}
}

func TestAgentTransitions(t *testing.T) {
	t.Parallel()
	states := []AgentState{AgentOnline, AgentStale, AgentOffline, AgentQuarantined, AgentRetired}
	for _, s := range states {
		if CheckAgentTransition(AgentRetired, s) == nil {
			t.Errorf("a retired agent becomes %s", s)
		}
		if s != AgentRetired && CheckAgentTransition(s, AgentRetired) != nil {
			t.Errorf("an agent that is %s cannot be retired", s)
		}
	}
	for _, s := range []AgentState{AgentOnline, AgentStale} {
		if err := CheckAgentTransition(AgentQuarantined, s); !fault.Is(err, fault.Conflict) {
			t.Errorf("a quarantined agent becomes %s without an operator", s)
		}
	}
}

func TestRevocationReasons(t *testing.T) {
	t.Parallel()
	for name, code := range map[string]RevocationReason{"": 0, "unspecified": 0, "keyCompromise": 1, "caCompromise": 2, "affiliationChanged": 3, "superseded": 4,
		"cessationOfOperation": 5, "certificateHold": 6, "privilegeWithdrawn": 9} {
		got, err := ParseRevocationReason(name)
		if err != nil || got != code || name != "" && got.String() != name {
			t.Errorf("%q: %d (%s), %v", name, got, got, err)
		}
	}
	for _, name := range []string{"removeFromCRL", "keycompromise", "1", "unspecified "} {
		if _, err := ParseRevocationReason(name); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if RevocationReason(77).String() != "reason(77)" {
		t.Error("an unknown reason has no text")
	}
}
