package domain

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

const day = 24 * time.Hour

var start = time.Date(2026, 10, 1, 0, 0, 0, 0, time.UTC)

func issued(life time.Duration) Leaf {
	return Leaf{Current: 1, Generation: 1, NotBefore: start, NotAfter: start.Add(life)}
}

func TestExpiringAt(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		life       time.Duration
		thresholds []int
		before     time.Duration // before the end
	}{
		{90 * day, nil, 30 * day},
		{60 * day, nil, 30 * day},
		{47 * day, nil, 14 * day}, // 30 days are more than half of it
		{28 * day, nil, 14 * day},
		{10 * day, nil, day}, // 7 are more than half: the last tenth
		{6 * day, nil, 6 * day / 10},
		{time.Hour, nil, 6 * time.Minute},
		{90 * day, []int{10, 20, 5}, 20 * day},
		{90 * day, []int{0}, 9 * day},
		{398 * day, []int{365}, 398 * day / 10},
	} {
		if got, want := ExpiringAt(start, start.Add(c.life), c.thresholds), start.Add(c.life-c.before); !got.Equal(want) {
			t.Errorf("%s with %v: expiring at %s, want %s", c.life, c.thresholds, got, want)
		}
	}
}

func TestExpiringNeverFromBirth(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(int64(time.Minute), int64(3650*day)).Draw(t, "life"))
		at := ExpiringAt(start, start.Add(life), rapid.SliceOfN(rapid.IntRange(0, 3650), 0, 5).Draw(t, "thresholds"))
		if at.Before(start.Add(life/2)) || !at.Before(start.Add(life)) {
			t.Fatalf("lives %s, expiring after %s", life, at.Sub(start))
		}
	})
}

func TestStatusOf(t *testing.T) {
	t.Parallel()
	failed := issued(90 * day)
	failed.Failures = 1
	unborn := Leaf{Failures: 2}
	for _, c := range []struct {
		name     string
		former   CertificateStatus
		leaves   []Leaf
		renewing bool
		at       time.Duration
		want     CertificateStatus
	}{
		{name: "ordered", leaves: []Leaf{{}}, renewing: true, want: CertificatePending},
		{name: "no leaf", want: CertificatePending},
		{name: "issued", leaves: []Leaf{issued(90 * day)}, want: CertificateActive},
		{name: "one of two issued", leaves: []Leaf{issued(90 * day), {}}, renewing: true, want: CertificatePending},
		{name: "within the threshold", leaves: []Leaf{issued(90 * day)}, at: 60 * day, want: CertificateExpiring},
		{name: "renewing", leaves: []Leaf{issued(90 * day)}, at: 61 * day, renewing: true, want: CertificateRenewalInProgress},
		{name: "past its end", leaves: []Leaf{issued(90 * day), issued(200 * day)}, at: 90 * day, want: CertificateExpired},
		{name: "past its end and renewing", leaves: []Leaf{issued(90 * day)}, at: 91 * day, renewing: true, want: CertificateExpired},
		{name: "past its end and failed", leaves: []Leaf{{Current: 1, Failures: 3, NotAfter: start}}, at: day, want: CertificateExpired},
		{name: "failed", leaves: []Leaf{failed}, want: CertificateFailed},
		{name: "failed, tried again", leaves: []Leaf{failed}, renewing: true, want: CertificateRenewalInProgress},
		{name: "never issued, failed", leaves: []Leaf{unborn}, want: CertificateFailed},
		{name: "never issued, tried again", leaves: []Leaf{unborn}, renewing: true, want: CertificatePending},
		{name: "one failed of two", leaves: []Leaf{issued(90 * day), failed}, want: CertificateFailed},
		{name: "revoked stays", former: CertificateRevoked, leaves: []Leaf{issued(90 * day)}, renewing: true, want: CertificateRevoked},
		{name: "archived stays", former: CertificateArchived, leaves: []Leaf{issued(90 * day)}, at: 91 * day, want: CertificateArchived},
		{name: "failed does not stick", former: CertificateFailed, leaves: []Leaf{issued(90 * day)}, want: CertificateActive},
		{name: "expired does not stick", former: CertificateExpired, leaves: []Leaf{issued(90 * day)}, want: CertificateActive},
	} {
		if got := StatusOf(c.former, Policy{}, c.leaves, c.renewing, start.Add(c.at)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestRetryDelay(t *testing.T) {
	t.Parallel()
	for tries, want := range map[int]time.Duration{0: 2 * time.Second, 1: 2 * time.Second, 2: 4 * time.Second, 3: 8 * time.Second, 7: 128 * time.Second, 8: 256 * time.Second, 9: 5 * time.Minute, 1 << 30: 5 * time.Minute} {
		if got := RetryDelay(tries, 0); got != want/2 {
			t.Errorf("try %d: %s, want %s", tries, got, want/2)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		tries, jitter := rapid.IntRange(1, 100).Draw(t, "tries"), rapid.Float64Range(0, 0.999).Draw(t, "jitter")
		d, low := RetryDelay(tries, jitter), RetryDelay(tries, 0)
		if d < low || d >= 2*low || d > 5*time.Minute {
			t.Fatalf("%s outside [%s, %s)", d, low, 2*low)
		}
	})
}

func TestFailureBackoff(t *testing.T) {
	t.Parallel()
	for failures, want := range map[int]time.Duration{0: time.Hour, 1: time.Hour, 2: 2 * time.Hour, 5: 16 * time.Hour, 6: 24 * time.Hour, 1 << 30: 24 * time.Hour} {
		if got := FailureBackoff(failures); got != want {
			t.Errorf("failure %d: %s, want %s", failures, got, want)
		}
	}
}

// Lesson 4: attempts are counted, the maximum binds, and what is over is over with its reason.
func TestLesson4AttemptsCountToTheirMaximum(t *testing.T) {
	t.Parallel()
	f := Failure{Class: "retryable", Message: "connection refused", At: start}
	for _, accepted := range []bool{true, false} {
		j := Job{Kind: JobRenewal, State: JobRunning, MaxTries: DefaultMaxTries}
		failures := 0
		for j.State.Open() {
			if failures++; failures > 2*DefaultMaxTries {
				t.Fatal("tried without end")
			}
			j.State = JobRunning
			if accepted {
				j.Tries++
				j.AcceptedAt = start
			}
			j = AfterFailure(j, f, true)
			if err := CheckTransition(JobRunning, j.State); err != nil {
				t.Fatal(err)
			}
			if !j.AcceptedAt.IsZero() || j.Error != "connection refused" || j.ErrorClass != "retryable" {
				t.Fatalf("%+v", j)
			}
			if j.State.Open() && (j.State != JobAwaitingCSR || !j.RunAt.After(start)) {
				t.Fatalf("%s at %s", j.State, j.RunAt)
			}
		}
		if failures != DefaultMaxTries || j.State != JobFailed || !j.FinishedAt.Equal(start) {
			t.Fatalf("accepted %v: over after %d failures, %s", accepted, failures, j.State)
		}
	}
	if j := AfterFailure(Job{Kind: JobDeployment, State: JobRunning, MaxTries: 5, Tries: 1, AcceptedAt: start}, f, false); j.State != JobFailed || j.Tries != 1 {
		t.Errorf("what cannot succeed is tried again: %+v", j)
	}
	if j := AfterFailure(Job{Kind: JobDeployment, State: JobRunning, MaxTries: 5, Tries: 1, AcceptedAt: start}, f, true); j.State != JobPending {
		t.Errorf("%+v", j)
	}
}

func TestMicroKeepsTheZeroTime(t *testing.T) {
	t.Parallel()
	if !Micro(time.Time{}).IsZero() {
		t.Error("zero is no longer zero")
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 6789, time.FixedZone("x", 3600))
	if got := Micro(at); got.Nanosecond() != 6000 || got.Location() != time.UTC || !got.Equal(at.Truncate(time.Microsecond)) {
		t.Error(got)
	}
}

func TestShardsAreStableAndAllUsed(t *testing.T) {
	t.Parallel()
	seen := map[int]int{}
	for i := range 4000 {
		s := ShardOf("cert_" + HashHex([]byte{byte(i), byte(i >> 8)}))
		if s < 0 || s >= Shards {
			t.Fatal(s)
		}
		seen[s]++
	}
	for s := range Shards {
		if seen[s] < 300 {
			t.Errorf("shard %d has %d of 4000", s, seen[s])
		}
	}
	// Rows carry the shard: another hash would orphan them.
	if ShardOf("cert_1") != 7 || ShardOf("agt_1") != 3 || HashHex(nil) != "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Error("hashes moved")
	}
}
