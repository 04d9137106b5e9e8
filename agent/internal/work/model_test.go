package work

import (
	"fmt"
	"maps"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/agent/internal/journal"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	keyClass    = agentpb.WorkClass_WORK_CLASS_KEY
	deployClass = agentpb.WorkClass_WORK_CLASS_DEPLOY
)

// world carries a model's effects out against a pretended disk, workers and server, and checks each of them.
type world struct {
	t       *rapid.T
	m       *model
	disk    map[string]*journal.Entry
	badDisk bool
	// waiting are the changes that were begun and are not on disk.
	waiting []change
	// behind: the newest store of an id failed.
	behind  map[string]bool
	workers map[string]int64 // attempt by id

	// Of this stream.
	streaming bool
	granted   map[agentpb.WorkClass]int
	sends     map[agentpb.WorkClass]int
	attempts  map[string]int64 // the server's newest attempt by id
	settled   map[string]int64
}

func newWorld(t *rapid.T) *world {
	return &world{t: t, m: newModel(map[agentpb.WorkClass]int{keyClass: 2, deployClass: 3}), disk: map[string]*journal.Entry{},
		workers: map[string]int64{}, granted: map[agentpb.WorkClass]int{}, sends: map[agentpb.WorkClass]int{},
		attempts: map[string]int64{}, settled: map[string]int64{}, behind: map[string]bool{}}
}

func (w *world) step(ev any) {
	for _, eff := range w.m.step(ev) {
		switch v := eff.(type) {
		case doStore:
			w.waiting = append(w.waiting, change{v.entry.Assignment.GetId(), v.entry})
		case doSend:
			w.sent(v.m)
		case doStart:
			a := v.entry.Assignment
			if w.workers[a.GetId()] != 0 {
				w.t.Fatalf("%s runs twice", a.GetId())
			}
			if e := w.disk[a.GetId()]; e == nil || e.Assignment.GetAttempt() != a.GetAttempt() {
				w.t.Fatalf("%s attempt %d runs without being on disk", a.GetId(), a.GetAttempt())
			}
			w.workers[a.GetId()] = a.GetAttempt()
		case doStop:
			if w.workers[v.id] == 0 {
				w.t.Fatalf("%s is stopped and does not run", v.id)
			}
		case doSettle:
			w.waiting = append(w.waiting, change{id: v.entry.Assignment.GetId()})
		}
	}
	w.check()
}

// change is a store, or without an entry a drop, on its way to the disk.
type change struct {
	id    string
	entry *journal.Entry
}

// commit brings the first n changes to the disk.
func (w *world) commit(n int) {
	for range min(n, len(w.waiting)) {
		c := w.waiting[0]
		w.waiting = w.waiting[1:]
		st := evStored{entry: c.entry}
		switch {
		case c.entry == nil:
			delete(w.disk, c.id)
			continue
		case w.badDisk:
			st.failure = failed(fault.Retryable, "disk full")
			w.behind[c.id] = true
		default:
			w.disk[c.id] = c.entry.Clone()
			delete(w.behind, c.id)
		}
		w.step(st)
	}
}

func (w *world) sent(m *agentpb.ConnectRequest) {
	if !w.streaming {
		return
	}
	onDisk := func(id string, attempt int64) *journal.Entry {
		e := w.disk[id]
		if e == nil || e.Assignment.GetAttempt() != attempt {
			w.t.Fatalf("%s attempt %d is spoken of without being on disk", id, attempt)
		}
		return e
	}
	switch v := m.GetMessage().(type) {
	case *agentpb.ConnectRequest_Accepted:
		onDisk(v.Accepted.GetId(), v.Accepted.GetAttempt())
	case *agentpb.ConnectRequest_Csr:
		if e := onDisk(v.Csr.GetId(), v.Csr.GetAttempt()); !w.behind[v.Csr.GetId()] && len(e.CSR) == 0 {
			w.t.Fatal("a CSR is sent before it is on disk")
		}
	case *agentpb.ConnectRequest_Result:
		if e := onDisk(v.Result.GetId(), v.Result.GetAttempt()); !w.behind[v.Result.GetId()] && e.Result == nil {
			w.t.Fatal("a result is sent before it is on disk")
		}
	case *agentpb.ConnectRequest_Credit:
		if v.Credit.GetAmount() <= 0 {
			w.t.Fatal("an empty grant")
		}
		w.granted[v.Credit.GetClass()] += int(v.Credit.GetAmount())
	}
}

// check holds the invariants after every step.
func (w *world) check() {
	for c, limit := range w.m.limit {
		free := w.granted[c] - w.sends[c]
		if !w.streaming {
			free = 0
		}
		if free < 0 {
			w.t.Fatalf("class %v: more sends than grants were taken", c)
		}
		if w.streaming && free != w.m.unspent[c] {
			w.t.Fatalf("class %v: the server holds %d credits, the agent counts %d", c, free, w.m.unspent[c])
		}
		// Resumed assignments are outside the count.
		if free > limit {
			w.t.Fatalf("class %v: %d credits are out, more than %d", c, free, limit)
		}
		// Every place that is free again is granted again, exactly once.
		if w.streaming && !w.m.sick && len(w.m.items) < MaxOpen && free+w.m.busyIn(c) < limit {
			w.t.Fatalf("class %v: %d of %d places are lost", c, limit-free-w.m.busyIn(c), limit)
		}
	}
	for id := range w.workers {
		if w.m.items[id] == nil {
			w.t.Fatalf("%s runs and is forgotten", id)
		}
	}
}

func (w *world) greet() {
	w.step(evDetached{})
	w.streaming = false
	w.granted, w.sends = map[agentpb.WorkClass]int{}, map[agentpb.WorkClass]int{}
	w.step(evGreeted{})
	maps.Copy(w.granted, w.m.unspent)
	var vs []*agentpb.Verdict
	for _, o := range w.m.open() {
		if e := w.disk[o.GetId()]; e == nil {
			w.t.Fatalf("Hello lists %s, which is not on disk", o.GetId())
		}
		d := agentpb.Verdict_DECISION_CONTINUE
		if w.settled[o.GetId()] >= o.GetAttempt() || w.attempts[o.GetId()] > o.GetAttempt() {
			d = agentpb.Verdict_DECISION_FORGET
		}
		vs = append(vs, &agentpb.Verdict{Id: o.GetId(), Attempt: o.GetAttempt(), Decision: d})
	}
	w.streaming = true
	w.step(evAttached{vs})
}

func (w *world) draw(ids []string, name string) string { return rapid.SampledFrom(ids).Draw(w.t, name) }

// TestModelInAnyOrder drives the model through random orders of everything that can happen.
func TestModelInAnyOrder(t *testing.T) {
	t.Parallel()
	ids := []string{"k1", "k2", "k3", "d1", "d2", "d3", "d4"}
	class := func(id string) agentpb.WorkClass {
		if id[0] == 'k' {
			return keyClass
		}
		return deployClass
	}
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.greet()
		assign := func(id string, attempt int64) {
			c := class(id)
			if w.granted[c]-w.sends[c] <= 0 {
				return // a server keeps to its credits
			}
			w.sends[c]++
			w.step(evAssigned{a: &agentpb.Assignment{Id: id, Attempt: attempt, Class: c}})
		}
		t.Repeat(map[string]func(*rapid.T){
			"assign": func(*rapid.T) {
				id := w.draw(ids, "id")
				if !w.streaming || w.granted[class(id)]-w.sends[class(id)] <= 0 {
					return
				}
				w.attempts[id]++
				assign(id, w.attempts[id])
			},
			"assign again": func(*rapid.T) {
				if id := w.draw(ids, "id"); w.streaming && w.attempts[id] > 0 {
					assign(id, w.attempts[id])
				}
			},
			"finish": func(t *rapid.T) {
				id := w.draw(ids, "id")
				attempt := w.workers[id]
				if attempt == 0 {
					return
				}
				delete(w.workers, id)
				ev := evFinished{id: id, attempt: attempt}
				switch {
				case class(id) == keyClass && rapid.Bool().Draw(t, "ok"):
					ev.csr, ev.spki = []byte("csr"), []byte("spki")
				default:
					ev.result = &agentpb.Result{Id: id, Attempt: attempt}
				}
				w.step(ev)
			},
			"settle": func(t *rapid.T) {
				id := w.draw(ids, "id")
				if !w.streaming || w.attempts[id] == 0 {
					return
				}
				w.settled[id] = w.attempts[id]
				w.step(evSettled{&agentpb.Settled{Id: id, Attempt: w.attempts[id]}})
			},
			"cancel": func(*rapid.T) {
				if id := w.draw(ids, "id"); w.streaming {
					w.step(evCancel{&agentpb.Cancel{Id: id, Attempt: w.attempts[id]}})
				}
			},
			"reconnect": func(*rapid.T) { w.greet() },
			"detach": func(*rapid.T) {
				w.streaming = false
				w.step(evDetached{})
			},
			"commit": func(t *rapid.T) { w.commit(rapid.IntRange(1, 5).Draw(t, "changes")) },
			"disk": func(t *rapid.T) {
				w.badDisk = rapid.Bool().Draw(t, "full")
				if w.m.sick {
					w.step(evProbed{!w.badDisk})
				}
			},
			"restart": func(*rapid.T) {
				w.m, w.waiting = newModel(w.m.limit), nil // what was on its way is lost
				w.workers, w.streaming = map[string]int64{}, false
				for _, id := range ids {
					if e := w.disk[id]; e != nil {
						w.step(evRestored{e.Clone()})
					}
				}
				w.greet()
			},
		})
	})
}

// TestModelTakesOver: a later attempt waits for the worker of the former one, and keeps its receipt.
func TestModelTakesOver(t *testing.T) {
	t.Parallel()
	m := newModel(map[agentpb.WorkClass]int{deployClass: 2})
	m.step(evGreeted{})
	m.step(evAttached{})
	a1 := &agentpb.Assignment{Id: "d", Attempt: 1, Class: deployClass}
	a2 := proto.CloneOf(a1)
	a2.Attempt = 2
	store := func(effs []any) *journal.Entry {
		for _, e := range effs {
			if s, ok := e.(doStore); ok {
				return s.entry
			}
		}
		t.Fatal("nothing is stored")
		return nil
	}
	m.step(evStored{entry: store(m.step(evAssigned{a: a1}))})
	if m.staged("d", 1, []byte(`{"r":1}`)) == nil || m.staged("d", 2, nil) != nil {
		t.Fatal("a receipt goes to the attempt that runs, and to no other")
	}
	kinds := func(effs []any) string {
		s := ""
		for _, e := range effs {
			s += fmt.Sprintf("%T ", e)
		}
		return s
	}
	// The last is the credit: no further place was taken.
	second := m.step(evAssigned{a: a2})
	if got := kinds(second); got != "work.doStop work.doStore work.doSend " {
		t.Errorf("a second attempt does %s", got)
	}
	if got := kinds(m.step(evStored{entry: store(second)})); got != "work.doSend " {
		t.Errorf("stored, it does %s", got)
	}
	effs := m.step(evFinished{id: "d", attempt: 1})
	if got := kinds(effs); got != "work.doStart " {
		t.Fatalf("once the first has ended it does %s", got)
	}
	if e := effs[0].(doStart).entry; string(e.Receipt) != `{"r":1}` || e.Assignment.GetAttempt() != 2 {
		t.Errorf("it runs %+v", e)
	}
}
