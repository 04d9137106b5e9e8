package domain_test

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

func TestObserved(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	served := domain.Placement{State: domain.PlacementServed, InstalledGeneration: 2, ServedGeneration: 2, InstalledFingerprint: "aa",
		ServedFingerprint: "aa", ServedAt: now.Add(-time.Hour)}
	foreign := domain.Observation{Generation: 2, InstalledFingerprint: "bb", ServedFingerprint: "aa", Problem: "it holds another", At: now}
	well := domain.Observation{Generation: 2, InstalledFingerprint: "aa", ServedFingerprint: "aa", At: now.Add(time.Minute)}

	p := served.Observed(foreign, "aa", true)
	if p.State != domain.PlacementPending || !p.DriftedAt.Equal(now) || p.InstalledGeneration != 0 || p.InstalledFingerprint != "bb" ||
		p.ServedGeneration != 2 || p.LastError != "it holds another" || p.Failures != 0 || !p.Lags(2) || !p.DueAt(now).Equal(now) {
		t.Fatalf("%+v", p)
	}
	later := foreign
	later.At = now.Add(time.Minute)
	if again := p.Observed(later, "aa", true); again != p {
		t.Fatalf("the same again: %+v", again)
	}
	later.InstalledFingerprint = ""
	other := p.Observed(later, "aa", true)
	if other.InstalledFingerprint != "" || !other.DriftedAt.Equal(now) || !other.UpdatedAt.Equal(later.At) {
		t.Fatalf("differently: %+v", other)
	}
	back := other.Observed(well, "aa", true)
	if back.State != domain.PlacementServed || !back.DriftedAt.IsZero() || back.InstalledGeneration != 2 || back.LastError != "" || back.Lags(2) {
		t.Fatalf("%+v", back)
	}
	// Again within the hour: not at once any more.
	soon := foreign
	soon.At = now.Add(30 * time.Minute)
	second := back.Observed(soon, "aa", true)
	if second.Failures != 1 || !second.DueAt(soon.At).Equal(soon.At.Add(time.Hour)) {
		t.Fatalf("%+v", second)
	}
	soon.At = now.Add(2 * time.Hour)
	if third := back.Observed(soon, "aa", true); third.Failures != 0 || !third.DueAt(soon.At).Equal(soon.At) {
		t.Fatalf("%+v", third)
	}

	failed := served
	failed.State, failed.Failures, failed.BackoffUntil = domain.PlacementFailed, 2, now.Add(time.Hour)
	if p := failed.Observed(foreign, "aa", true); p.State != domain.PlacementFailed || p.Failures != 2 || !p.DueAt(now).Equal(now.Add(time.Hour)) || p.DriftedAt.IsZero() {
		t.Fatalf("%+v", p)
	}

	for name, o := range map[string]domain.Observation{
		"older generation": {Generation: 1, InstalledFingerprint: "bb", Problem: "x", At: now},
		"well already":     well,
	} {
		if p := served.Observed(o, "aa", true); p != served {
			t.Errorf("%s: %+v", name, p)
		}
	}
	for name, o := range map[string]domain.Observation{
		"not probed":   {Generation: 2, InstalledFingerprint: "aa", At: now},
		"not the leaf": {Generation: 2, InstalledFingerprint: "bb", ServedFingerprint: "aa", At: now},
	} {
		if got := p.Observed(o, "aa", true); got != p {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := p.Observed(domain.Observation{Generation: 2, InstalledFingerprint: "aa", At: now}, "aa", false); got.State != domain.PlacementInstalled {
		t.Errorf("%+v", got)
	}
}
