package history

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
	"time"
)

var now = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// tale is a history with its end, for a test to spoil.
type tale struct {
	events []Event
	State
}

// do appends an operation that takes a millisecond.
func (t *tale) do(k Kind, p Phase, node, name, request string, a Answer) *Event {
	n := int64(len(t.events)/2 + 1)
	at := time.Duration(len(t.events)) * time.Millisecond
	begin := Event{Operation: n, Phase: Invoke, At: at, Kind: k, Node: node, Name: name, RequestID: request}
	end := begin
	end.Phase, end.At, end.Answer = p, at+time.Millisecond, a
	t.events = append(t.events, begin, end)
	return &t.events[len(t.events)-1]
}

func (t *tale) audit(action, resource, request string, detail map[string]string) {
	t.Audit = append(t.Audit, Audit{At: now, Actor: "node:n1", Action: action, Resource: resource, RequestID: request, Detail: detail})
}

// good is a run in which one certificate was ordered and renewed, and another ordered and revoked.
func good() *tale {
	t := &tale{State: State{Now: now, Nodes: []string{"n1", "n2"},
		Certificates: []Certificate{{"c1", "one", "Active", "o1"}, {"c2", "two", "Revoked", "o2"}},
		Leaves:       []Leaf{{CertificateID: "c1", AgentID: "a1", Serial: "11", Ordered: 2, Held: 2}, {CertificateID: "c2", AgentID: "a1", Serial: "20", Ordered: 1, Held: 1}},
		Placements:   []Placement{{"c1", "t1", "a1", 2}, {"c2", "t2", "a1", 1}},
		Versions: []Version{{"i", "10", "c1", "a1", 1, false, now.Add(time.Hour)}, {"i", "11", "c1", "a1", 2, false, now.Add(time.Hour)},
			{"i", "20", "c2", "a1", 1, true, now.Add(time.Hour)}},
		Jobs: []Job{{ID: "j1", Kind: "Issuance", State: "Completed", CertificateID: "c1", AgentID: "a1", Generation: 1, Attempt: 1, Tries: 1, Finished: true},
			{ID: "j2", Kind: "Renewal", State: "Completed", CertificateID: "c1", AgentID: "a1", Generation: 2, Attempt: 2, Tries: 1, Finished: true},
			{ID: "j3", Kind: "Issuance", State: "Completed", CertificateID: "c2", AgentID: "a1", Generation: 1, Attempt: 1, Tries: 1, Finished: true},
			{ID: "j4", Kind: "Deployment", State: "Pending", CertificateID: "c1", AgentID: "a2"}},
		Agents: []Agent{{"a1", "east", "Online", "n1"}, {"a2", "west", "Offline", ""}},
		Duties: []Duty{{"crl", "n1", 2}},
		CRLs:   []List{{"i", 7, []string{"20"}}},
		Seen:   []Seen{{"n1", "c1", "Active", map[string]int64{"a1": 2}}},
		Files:  []File{{TargetID: "t1", Serial: "11"}, {TargetID: "t2", Serial: "20"}},
	}}
	t.do(Order, Info, "n1", "one", "o1", Answer{Error: "it died"})
	t.do(Order, OK, "n2", "one", "o1", Answer{CertificateID: "c1"})
	t.do(Read, OK, "n1", "one", "", Answer{Status: "Active", Generations: map[string]int64{"a1": 1}})
	t.do(Renew, OK, "n1", "one", "r1", Answer{Jobs: []Job{{ID: "j2", RequestID: "r1"}}})
	t.do(Read, OK, "n1", "one", "", Answer{Status: "Active", Generations: map[string]int64{"a1": 2}})
	t.do(Order, OK, "n1", "two", "o2", Answer{CertificateID: "c2"})
	t.do(Revoke, OK, "n1", "two", "v1", Answer{Serials: []string{"20"}})
	t.do(Read, OK, "n2", "two", "", Answer{Status: "Revoked", Generations: map[string]int64{"a1": 1}})
	t.do(CRL, OK, "n1", "i", "", Answer{Number: 6})
	t.do(CRL, OK, "n1", "i", "", Answer{Number: 7})
	t.audit("certificate.created", "certificate/c1", "o1", nil)
	t.audit("certificate.created", "certificate/c2", "o2", nil)
	t.audit("certificate.renewal_ordered", "certificate/c1", "r1", nil)
	t.audit("certificate.revoked", "certificate/c2", "v1", nil)
	t.audit("certificate.issued", "certificate/c1", "o1", map[string]string{"job": "j1", "agent": "a1", "generation": "1", "serial": "10"})
	t.audit("certificate.issued", "certificate/c1", "r1", map[string]string{"job": "j2", "agent": "a1", "generation": "2", "serial": "11"})
	t.audit("certificate.issued", "certificate/c2", "o2", map[string]string{"job": "j3", "agent": "a1", "generation": "1", "serial": "20"})
	t.audit("crl.published", "issuer/i", "", map[string]string{"number": "6"})
	t.audit("crl.published", "issuer/i", "", map[string]string{"number": "7"})
	t.audit("duty.taken", "duty/crl", "", map[string]string{"epoch": "1"})
	t.audit("duty.taken", "duty/crl", "", map[string]string{"epoch": "2"})
	return t
}

func TestNothingIsWrong(t *testing.T) {
	t.Parallel()
	g := good()
	if v := Check(g.events, g.State); len(v) > 0 {
		t.Error(v)
	}
	if v := Check(nil, State{}); len(v) > 0 {
		t.Error(v)
	}
}

// without drops the audit rows of an action.
func (t *tale) without(action string) {
	t.Audit = slices.DeleteFunc(t.Audit, func(a Audit) bool { return a.Action == action })
}

func TestEveryRuleCatches(t *testing.T) {
	t.Parallel()
	cases := []struct {
		rule, what string
		spoil      func(*tale)
	}{
		{"results", "two results", func(t *tale) { t.audit("job.failed", "job/j1", "", nil) }},
		{"results", "deployed twice", func(t *tale) {
			t.Jobs = append(t.Jobs, Job{ID: "j9", Finished: true})
			t.audit("certificate.deployed", "certificate/c1", "", map[string]string{"job": "j9"})
			t.audit("certificate.deployed", "certificate/c1", "", map[string]string{"job": "j9"})
		}},
		{"results", "ended without one", func(t *tale) { t.Jobs[3].Finished = true }},
		{"results", "a result and still open", func(t *tale) { t.Jobs[0].Finished = false }},
		{"results", "tried more often than given out", func(t *tale) { t.Jobs[0].Tries = 2 }},
		{"results", "a result of nothing", func(t *tale) { t.audit("job.failed", "job/j8", "", nil) }},
		{"versions", "two of a generation", func(t *tale) { t.Versions[1].Generation = 1 }},
		{"versions", "two of a generation in the trail", func(t *tale) {
			t.audit("certificate.issued", "certificate/c1", "", map[string]string{"job": "j2", "agent": "a1", "generation": "2", "serial": "12"})
		}},
		{"versions", "issued and not there", func(t *tale) { t.Versions = t.Versions[1:] }},
		{"versions", "issued in silence", func(t *tale) { t.without("certificate.issued") }},
		{"serials", "used twice", func(t *tale) { t.Versions[2].Serial = "10" }},
		{"serials", "a file that nobody signed", func(t *tale) { t.Files[0].Serial = "99" }},
		{"serials", "revoked and never signed", func(t *tale) { t.events[13].Serials = []string{"99"} }},
		{"open jobs", "held by the dead", func(t *tale) { t.Agents[1] = Agent{"a2", "west", "Online", "n3"} }},
		{"open jobs", "held by nobody", func(t *tale) { t.Agents[1] = Agent{"a2", "west", "Online", ""} }},
		{"revoked", "not on the CRL", func(t *tale) { t.CRLs[0].Serials = nil }},
		{"revoked", "on the CRL for nothing", func(t *tale) { t.CRLs[0].Serials = []string{"20", "11"} }},
		{"crl numbers", "published twice", func(t *tale) { t.audit("crl.published", "issuer/i", "", map[string]string{"number": "7"}) }},
		{"crl numbers", "one that is not in force", func(t *tale) { t.audit("crl.published", "issuer/i", "", map[string]string{"number": "8"}) }},
		{"crl numbers", "going back", func(t *tale) { t.do(CRL, OK, "n1", "i", "", Answer{Number: 6}) }},
		{"audit", "an order without a row", func(t *tale) { t.without("certificate.created") }},
		{"audit", "an order under another id", func(t *tale) { t.Audit[0].RequestID = "other" }},
		{"audit", "a renewal without a row", func(t *tale) { t.without("certificate.renewal_ordered") }},
		{"audit", "a revocation without a row", func(t *tale) { t.without("certificate.revoked") }},
		{"audit", "revoked twice", func(t *tale) { t.audit("certificate.revoked", "certificate/c2", "v1", nil) }},
		{"audit", "revoked by nobody", func(t *tale) { t.Audit[3].RequestID = "other" }},
		{"orders", "lost", func(t *tale) { t.Certificates = t.Certificates[1:] }},
		{"orders", "two answers", func(t *tale) { t.events[1].Phase = OK; t.events[1].CertificateID = "c2" }},
		{"orders", "still pending", func(t *tale) { t.Certificates[0].Status = "Pending" }},
		{"orders", "failed without a reason", func(t *tale) { t.Certificates[0].Status = "Failed" }},
		{"orders", "active with nothing", func(t *tale) { t.Leaves[0].Held, t.Leaves[0].Serial = 0, "" }},
		{"orders", "active without a leaf", func(t *tale) { t.Leaves = t.Leaves[1:] }},
		{"orders", "revoked by nobody", func(t *tale) { t.Certificates[0].Status = "Revoked" }},
		{"orders", "ordered by nobody", func(t *tale) {
			t.Certificates = append(t.Certificates, Certificate{ID: "c3", Name: "three", Status: "Active"})
		}},
		{"orders", "refused and there", func(t *tale) { t.events[1].Phase, t.events[3].Phase = Fail, Fail }},
		{"renewals", "lost", func(t *tale) { t.Jobs = slices.Delete(t.Jobs, 1, 2) }},
		{"renewals", "still open", func(t *tale) { t.Jobs[1].Finished = false }},
		{"renewals", "done and forgotten", func(t *tale) { t.Leaves[0].Held = 1 }},
		{"renewals", "failed without a reason", func(t *tale) { t.Jobs[1].State = "Failed" }},
		{"renewals", "cancelled by nobody", func(t *tale) { t.Jobs[1].State, t.Jobs[1].Error = "Cancelled", "somebody" }},
		{"renewals", "one too many", func(t *tale) { t.Leaves[0].Held = 3 }},
		{"revocations", "lost", func(t *tale) { t.Certificates[1].Status = "Active" }},
		{"revocations", "a version left out", func(t *tale) { t.Versions[2].Revoked = false }},
		{"revocations", "a serial answered and not revoked", func(t *tale) { t.events[13].Serials = []string{"10"} }},
		{"revocations", "read as active", func(t *tale) { t.do(Read, OK, "n1", "two", "", Answer{Status: "Active"}) }},
		{"reads", "going back", func(t *tale) {
			t.do(Read, OK, "n1", "one", "", Answer{Status: "Active", Generations: map[string]int64{"a1": 1}})
		}},
		{"reads", "not knowing what was ordered", func(t *tale) { t.do(Read, Fail, "n2", "one", "", Answer{Error: "not found"}) }},
		{"nodes agree", "another status", func(t *tale) { t.Seen[0].Status = "Pending" }},
		{"nodes agree", "another generation", func(t *tale) { t.Seen[0].Generations["a1"] = 1 }},
		{"files", "the one before", func(t *tale) { t.Files[0].Serial = "10" }},
		{"files", "none", func(t *tale) { t.Files = nil }},
		{"files", "another key", func(t *tale) { t.Files[0].Problem = "the key is another's" }},
		{"files", "said to be another", func(t *tale) { t.Placements[0].Installed = 1 }},
		{"leadership", "two in an epoch", func(t *tale) { t.audit("duty.taken", "duty/crl", "", map[string]string{"epoch": "2"}) }},
		{"leadership", "an epoch that nobody took", func(t *tale) { t.Duties[0].Epoch = 3 }},
		{"leadership", "an epoch to come", func(t *tale) { t.audit("duty.taken", "duty/crl", "", map[string]string{"epoch": "3"}) }},
		{"leadership", "held by another", func(t *tale) { t.Duties[0].Holder = "n2" }},
	}
	caught := map[string]bool{}
	for _, c := range cases {
		g := good()
		c.spoil(g)
		found := Check(g.events, g.State)
		if !slices.ContainsFunc(found, func(v Violation) bool { return v.Rule == c.rule }) {
			t.Errorf("%s, %s: not caught; found %v", c.rule, c.what, found)
		}
		caught[c.rule] = true
	}
	for rule := range Rules() {
		if !caught[rule] {
			t.Errorf("nothing here breaks the rule %q", rule)
		}
	}
}

// TestAtTheSameTime: reads that overlap may be answered in any order.
func TestAtTheSameTime(t *testing.T) {
	t.Parallel()
	g := good()
	older := Event{Operation: 100, Phase: Invoke, At: 0, Kind: Read, Node: "n1", Name: "one"}
	g.events = slices.Insert(g.events, 0, older)
	older.Phase, older.At = OK, time.Second
	older.Answer = Answer{Status: "Active", Generations: map[string]int64{"a1": 1}}
	g.events = append(g.events, older)
	if v := Check(g.events, g.State); len(v) > 0 {
		t.Error(v)
	}
}

func TestRecorderAndLoad(t *testing.T) {
	t.Parallel()
	var file bytes.Buffer
	var clock time.Duration
	r := NewRecorder(&file, func() time.Duration { clock++; return clock })
	first := r.Invoke(Event{Kind: Order, Client: 1, Node: "n1", Name: "one", RequestID: "o1"})
	second := r.Invoke(Event{Kind: Read, Client: 2, Node: "n2", Name: "one"})
	second(Fail, Answer{Error: "not found"})
	first(OK, Answer{CertificateID: "c1", Jobs: []Job{{ID: "j1", RequestID: "o1"}}, Generations: map[string]int64{"a1": 1}})
	r.Invoke(Event{Kind: Renew, Client: 1, Node: "n1", Name: "one"})
	wrote, err := r.Events()
	if err != nil {
		t.Fatal(err)
	}
	read, err := Load(&file)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(read, wrote) {
		t.Errorf("read %+v\nwrote %+v", read, wrote)
	}
	all := pair(read)
	if len(all) != 3 || all[0].outcome != OK || all[0].CertificateID != "c1" || all[1].outcome != Fail || all[2].outcome != Info || all[2].end != forever {
		t.Errorf("%+v", all)
	}
	if _, err := Load(bytes.NewBufferString("{\"operation\":1}\n{")); err == nil {
		t.Error("half a line was read")
	}
}
