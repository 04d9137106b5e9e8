package hub

import (
	"fmt"
	"slices"
	"sync"
	"testing"
)

func TestNoticesAreMergedAndFiltered(t *testing.T) {
	t.Parallel()
	h := New()
	all, jobs, one := h.Subscribe(nil, ""), h.Subscribe([]string{Jobs}, ""), h.Subscribe(nil, "cert_1")
	for range 3 {
		h.Publish(Notice{Certificates, "cert_1"}, Notice{Jobs, "job_1"})
	}
	for name, tt := range map[string]struct {
		s    *Subscription
		want []Notice
	}{
		"all":  {all, []Notice{{Certificates, "cert_1"}, {Jobs, "job_1"}}},
		"jobs": {jobs, []Notice{{Jobs, "job_1"}}},
		"one":  {one, []Notice{{Certificates, "cert_1"}}},
	} {
		<-tt.s.Changed()
		got, lagged := tt.s.Take()
		if lagged || !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v lagged=%v, want %v", name, got, lagged, tt.want)
		}
		if again, _ := tt.s.Take(); len(again) != 0 {
			t.Errorf("%s: taken twice: %v", name, again)
		}
	}
	h.Publish(Notice{Jobs, "job_1"})
	<-jobs.Changed()
	if got, _ := jobs.Take(); len(got) != 1 {
		t.Errorf("a resource that was taken is not told again: %v", got)
	}
	all.Close()
	all.Close()
	if n := h.Subscribers(); n != 2 {
		t.Errorf("%d subscribers after one of three left", n)
	}
	h.Publish(Notice{Jobs, "job_2"})
	select {
	case <-all.Changed():
		if got, _ := all.Take(); slices.Contains(got, Notice{Jobs, "job_2"}) {
			t.Error("a closed subscription is still told")
		}
	default:
	}
}

func TestSlowSubscriberIsBoundedAndTold(t *testing.T) {
	t.Parallel()
	h := New()
	s := h.Subscribe(nil, "")
	defer s.Close()
	for i := range 10 * pendingLimit {
		h.Publish(Notice{Jobs, fmt.Sprint(i)})
	}
	got, lagged := s.Take()
	if len(got) != pendingLimit || !lagged {
		t.Fatalf("%d notices, lagged=%v", len(got), lagged)
	}
	if got, lagged := s.Take(); len(got) != 0 || lagged {
		t.Fatalf("lagged is told once: %v %v", got, lagged)
	}
}

func TestThousandWatchersOneSource(t *testing.T) {
	t.Parallel()
	h := New()
	const watchers, last = 1000, "job_last"
	var ready, done sync.WaitGroup
	ready.Add(watchers)
	for range watchers {
		done.Go(func() {
			s := h.Subscribe([]string{Jobs}, "")
			defer s.Close()
			ready.Done()
			for range s.Changed() {
				if got, lagged := s.Take(); lagged || slices.Contains(got, Notice{Jobs, last}) {
					return
				}
			}
		})
	}
	ready.Wait()
	for i := range 100 {
		h.Publish(Notice{Jobs, fmt.Sprint(i)})
	}
	h.Publish(Notice{Jobs, last})
	done.Wait()
	if n := h.Subscribers(); n != 0 {
		t.Errorf("%d subscriptions are left", n)
	}
}

func TestWhatOtherNodesSayGoesRoundOnce(t *testing.T) {
	t.Parallel()
	h := New()
	watcher, link := h.Subscribe([]string{Jobs}, ""), h.SubscribeOwn()
	defer watcher.Close()
	defer link.Close()
	h.Relay([]Notice{{Jobs, "job_far"}, {Agents, "agt_far"}}, false)
	h.Publish(Notice{Agents, "agt_near"})
	<-watcher.Changed()
	if got, lagged := watcher.Take(); lagged || !slices.Equal(got, []Notice{{Jobs, "job_far"}}) {
		t.Errorf("a watcher is told %v, lagged=%v", got, lagged)
	}
	<-link.Changed()
	if got, lagged := link.Take(); lagged || !slices.Equal(got, []Notice{{Agents, "agt_near"}}) {
		t.Errorf("other nodes are told %v, lagged=%v", got, lagged)
	}
	h.Relay(nil, true)
	<-watcher.Changed()
	if got, lagged := watcher.Take(); len(got) != 0 || !lagged {
		t.Errorf("after a gap: %v, lagged=%v", got, lagged)
	}
	select {
	case <-link.Changed():
		t.Error("a gap of another node is told to the others")
	default:
	}
}
