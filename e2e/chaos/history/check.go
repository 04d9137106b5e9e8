package history

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Violation is a rule that does not hold.
type Violation struct {
	Rule, Text string
}

func (v Violation) String() string { return v.Rule + ": " + v.Text }

// Check returns all violations of the rules, by rule.
func Check(events []Event, s State) []Violation {
	w := newWorld(events, s)
	var all []Violation
	for _, r := range rules {
		r.check(w, func(format string, args ...any) {
			all = append(all, Violation{r.name, fmt.Sprintf(format, args...)})
		})
	}
	return all
}

// Rules are the names of all rules, and what each says.
func Rules() map[string]string {
	out := map[string]string{}
	for _, r := range rules {
		out[r.name] = r.says
	}
	return out
}

type report func(format string, args ...any)

var rules = []struct {
	name, says string
	check      func(*world, report)
}{
	{"results", "a job has one result: exactly one where it has ended, none while it is open; it was not tried more often than it was given out", (*world).results},
	{"versions", "a (certificate, agent, generation) is signed at most once, in the table and in the trail", (*world).versions},
	{"serials", "an issuer uses a serial once, and every serial that is seen anywhere is that of a version", (*world).serials},
	{"open jobs", "an open job is held by a node that lives, waits until a time or for an operator, or its agent is away", (*world).openJobs},
	{"revoked", "a revoked serial is on the complete CRL, and nothing else is", (*world).revoked},
	{"crl numbers", "a CRL number is published once, and what a node serves never goes back", (*world).numbers},
	{"audit", "an acknowledged operation that changed something has its row with its request id", (*world).audited},
	{"orders", "an acknowledged order is there, once, and ended Active, or Failed with a reason, or revoked by whoever asked for it", (*world).orders},
	{"renewals", "an acknowledged renewal has ended: done, or failed or cancelled with a reason; nothing was renewed that nobody asked for", (*world).renewals},
	{"revocations", "an acknowledged revocation holds for all that was issued, from the acknowledgement on", (*world).revocations},
	{"reads", "what a node answers never goes back in generation, and knows what was acknowledged before", (*world).reads},
	{"nodes agree", "at rest every node answers what the database holds", (*world).agree},
	{"files", "every target holds the newest version, with its key", (*world).files},
	{"leadership", "a duty is taken once per epoch, with no epoch left out, and the last taker holds it", (*world).leadership},
}

// leafKey is an agent's part of a certificate.
type leafKey struct{ certificate, agent string }

// world is history and state, sorted for the rules.
type world struct {
	State
	operations   []operation
	certificates map[string]Certificate // by id
	byName       map[string]Certificate
	leaves       map[leafKey]Leaf
	jobs         map[string]Job
	signed       map[string]Version // by serial
	// rows are the audit rows by action.
	rows map[string][]Audit
	// asked are the operations that may have been done, by what they are and the certificate's name.
	asked map[Kind]map[string][]operation
}

func newWorld(events []Event, s State) *world {
	w := &world{State: s, operations: pair(events), certificates: map[string]Certificate{}, byName: map[string]Certificate{}, leaves: map[leafKey]Leaf{},
		jobs: map[string]Job{}, signed: map[string]Version{}, rows: map[string][]Audit{}, asked: map[Kind]map[string][]operation{}}
	for _, c := range s.Certificates {
		w.certificates[c.ID], w.byName[c.Name] = c, c
	}
	for _, l := range s.Leaves {
		w.leaves[leafKey{l.CertificateID, l.AgentID}] = l
	}
	for _, j := range s.Jobs {
		w.jobs[j.ID] = j
	}
	for _, v := range s.Versions {
		w.signed[v.Serial] = v
	}
	for _, a := range s.Audit {
		w.rows[a.Action] = append(w.rows[a.Action], a)
	}
	for _, o := range w.operations {
		if o.outcome == Fail {
			continue
		}
		if w.asked[o.Kind] == nil {
			w.asked[o.Kind] = map[string][]operation{}
		}
		w.asked[o.Kind][o.Name] = append(w.asked[o.Kind][o.Name], o)
	}
	return w
}

// each yields the acknowledged operations of a kind.
func (w *world) each(k Kind, yield func(operation)) {
	for _, o := range w.operations {
		if o.Kind == k && o.outcome == OK {
			yield(o)
		}
	}
}

func (w *world) results(bad report) {
	results := map[string][]string{}
	for _, action := range []string{"certificate.issued", "certificate.deployed", "certificate.verified"} {
		for _, a := range w.rows[action] {
			results[a.Detail["job"]] = append(results[a.Detail["job"]], action)
		}
	}
	for _, action := range []string{"job.failed", "job.reaped", "job.cancelled", "job.rejected"} {
		for _, a := range w.rows[action] {
			job := strings.TrimPrefix(a.Resource, "job/")
			results[job] = append(results[job], action)
		}
	}
	for _, j := range w.Jobs {
		switch r := results[j.ID]; {
		case len(r) > 1:
			bad("job %s (%s) has %d results: %v", j.ID, j.Kind, len(r), r)
		case j.Finished && len(r) == 0:
			bad("job %s (%s) is %s, and no row tells of its result", j.ID, j.Kind, j.State)
		case !j.Finished && len(r) == 1:
			bad("job %s (%s) has the result %s and is %s", j.ID, j.Kind, r[0], j.State)
		}
		if j.Tries > j.Attempt {
			bad("job %s was tried %d times and given out %d times", j.ID, j.Tries, j.Attempt)
		}
		delete(results, j.ID)
	}
	for _, job := range slices.Sorted(maps.Keys(results)) {
		bad("%v of job %s, which is not there", results[job], job)
	}
}

func (w *world) versions(bad report) {
	type key struct {
		leafKey
		generation int64
	}
	signed := map[key]string{}
	for _, v := range w.Versions {
		k := key{leafKey{v.CertificateID, v.AgentID}, v.Generation}
		if other, ok := signed[k]; ok {
			bad("%s and %s are both generation %d of %s at %s", other, v.Serial, v.Generation, v.CertificateID, v.AgentID)
		}
		signed[k] = v.Serial
	}
	issued := map[key]string{}
	for _, a := range w.rows["certificate.issued"] {
		generation, err := strconv.ParseInt(a.Detail["generation"], 10, 64)
		if err != nil {
			bad("a row of %s tells of generation %q", a.Resource, a.Detail["generation"])
			continue
		}
		k := key{leafKey{strings.TrimPrefix(a.Resource, "certificate/"), a.Detail["agent"]}, generation}
		if other, ok := issued[k]; ok {
			bad("the trail has %s and %s for generation %d of %s at %s", other, a.Detail["serial"], generation, k.certificate, k.agent)
		}
		issued[k] = a.Detail["serial"]
		if signed[k] != a.Detail["serial"] {
			bad("the trail has %s for generation %d of %s at %s, the table has %q", a.Detail["serial"], generation, k.certificate, k.agent, signed[k])
		}
	}
	for k, serial := range signed {
		if issued[k] == "" {
			bad("no row tells that %s was issued", serial)
		}
	}
}

func (w *world) serials(bad report) {
	type key struct{ issuer, serial string }
	used := map[key]Version{}
	for _, v := range w.Versions {
		k := key{v.IssuerID, v.Serial}
		if other, ok := used[k]; ok {
			bad("%s is generation %d of %s and generation %d of %s", v.Serial, other.Generation, other.CertificateID, v.Generation, v.CertificateID)
		}
		used[k] = v
	}
	for _, f := range w.Files {
		if _, ok := w.signed[f.Serial]; f.Serial != "" && !ok {
			bad("%s lies at %s and is no version", f.Serial, f.TargetID)
		}
	}
	w.each(Revoke, func(o operation) {
		for _, serial := range o.Serials {
			if _, ok := w.signed[serial]; !ok {
				bad("%s was revoked with %s and is no version", serial, o.Name)
			}
		}
	})
}

func (w *world) openJobs(bad report) {
	agents := map[string]Agent{}
	for _, a := range w.Agents {
		agents[a.ID] = a
	}
	for _, j := range w.Jobs {
		if j.Finished || j.State == "AwaitingApproval" || j.RunAt.After(w.Now) {
			continue
		}
		a := agents[j.AgentID]
		if a.State != "Online" && a.State != "Stale" {
			continue // it is given out when the agent comes
		}
		if !slices.Contains(w.Nodes, a.Holder) {
			bad("job %s (%s) is %s: agent %s is %s, and its stream is held by %q, which does not live", j.ID, j.Kind, j.State, a.Name, a.State, a.Holder)
		}
	}
}

func (w *world) revoked(bad report) {
	on := map[string]bool{}
	for _, l := range w.CRLs {
		for _, serial := range l.Serials {
			on[serial] = true
			if v, ok := w.signed[serial]; !ok || !v.Revoked {
				bad("%s is on CRL %d of %s and was not revoked", serial, l.Number, l.IssuerID)
			}
		}
	}
	for _, v := range w.Versions {
		if v.Revoked && v.NotAfter.After(w.Now) && !on[v.Serial] {
			bad("%s of %s was revoked and is on no CRL", v.Serial, v.CertificateID)
		}
	}
}

func (w *world) numbers(bad report) {
	published := map[string]map[string]bool{}
	for _, a := range w.rows["crl.published"] {
		n := a.Detail["number"]
		if published[a.Resource] == nil {
			published[a.Resource] = map[string]bool{}
		}
		if published[a.Resource][n] {
			bad("%s was published twice with number %s", a.Resource, n)
		}
		published[a.Resource][n] = true
	}
	for _, l := range w.CRLs {
		for n := range published["issuer/"+l.IssuerID] {
			if number, err := strconv.ParseInt(n, 10, 64); err != nil || number > l.Number {
				bad("number %s of %s was published, and %d is in force", n, l.IssuerID, l.Number)
			}
		}
	}
	w.forward(CRL, "CRL", func(o operation) map[string]int64 { return map[string]int64{"number": o.Number} }, bad)
}

// forward checks that numbers that a node answers never fall: for two operations of which the second was invoked after the
// first was answered.
func (w *world) forward(k Kind, what string, numbers func(operation) map[string]int64, bad report) {
	type key struct{ node, name, of string }
	answers := map[key][]answered{}
	w.each(k, func(o operation) {
		for of, n := range numbers(o) {
			at := key{o.Node, o.Name, of}
			answers[at] = append(answers[at], answered{o, n})
		}
	})
	for at, all := range answers {
		byEnd := slices.SortedFunc(slices.Values(all), func(a, b answered) int { return cmp.Compare(a.end, b.end) })
		slices.SortFunc(all, func(a, b answered) int { return cmp.Compare(a.began, b.began) })
		var highest answered
		next := 0
		for _, a := range all {
			for ; next < len(byEnd) && byEnd[next].end < a.began; next++ {
				if byEnd[next].number > highest.number {
					highest = byEnd[next]
				}
			}
			if a.number < highest.number {
				bad("%s answered %d for %s %s %s in operation %d, and %d in operation %d before it", at.node, a.number, what, at.name, at.of, a.Operation, highest.number, highest.Operation)
			}
		}
	}
}

type answered struct {
	operation
	number int64
}

func (w *world) audited(bad report) {
	type key struct{ action, resource, requestID string }
	rows := map[key]int{}
	for _, action := range []string{"certificate.created", "certificate.renewal_ordered"} {
		for _, a := range w.rows[action] {
			rows[key{action, a.Resource, a.RequestID}]++
		}
	}
	w.each(Order, func(o operation) {
		if n := rows[key{"certificate.created", "certificate/" + o.CertificateID, o.RequestID}]; n != 1 {
			bad("%d rows tell of the order of %s (%s)", n, o.Name, o.RequestID)
		}
	})
	w.each(Renew, func(o operation) {
		mine := slices.ContainsFunc(o.Jobs, func(j Job) bool { return j.RequestID == o.RequestID })
		n := rows[key{"certificate.renewal_ordered", "certificate/" + w.byName[o.Name].ID, o.RequestID}]
		if mine && n != 1 {
			bad("%d rows tell of the renewal of %s (%s)", n, o.Name, o.RequestID)
		}
	})
	revoked := map[string][]Audit{}
	for _, a := range w.rows["certificate.revoked"] {
		revoked[a.Resource] = append(revoked[a.Resource], a)
	}
	w.each(Revoke, func(o operation) {
		all := revoked["certificate/"+w.byName[o.Name].ID]
		if len(all) != 1 {
			bad("%d rows tell that %s was revoked", len(all), o.Name)
			return
		}
		if !slices.ContainsFunc(w.asked[Revoke][o.Name], func(other operation) bool { return other.RequestID == all[0].RequestID }) {
			bad("%s was revoked under the request id %s, which nobody used", o.Name, all[0].RequestID)
		}
	})
}

func (w *world) orders(bad report) {
	byRequest := map[string]string{}
	w.each(Order, func(o operation) {
		if other := byRequest[o.RequestID]; other != "" && other != o.CertificateID {
			bad("the order %s was answered with %s and with %s", o.RequestID, other, o.CertificateID)
		}
		byRequest[o.RequestID] = o.CertificateID
	})
	for _, requestID := range slices.Sorted(maps.Keys(byRequest)) {
		c, ok := w.certificates[byRequest[requestID]]
		if !ok {
			bad("the order %s was answered with %s, which is not there", requestID, byRequest[requestID])
			continue
		}
		w.ended(c, bad)
	}
	for _, c := range w.Certificates {
		if len(w.asked[Order][c.Name]) == 0 {
			bad("nobody ordered %s", c.Name)
		}
	}
}

// ended checks how an acknowledged order came out.
func (w *world) ended(c Certificate, bad report) {
	switch c.Status {
	case "Active", "Expiring":
	case "Revoked":
		if len(w.asked[Revoke][c.Name]) == 0 {
			bad("%s is revoked, and nobody asked for it", c.Name)
		}
		return
	case "Failed":
		for _, l := range w.Leaves {
			if l.CertificateID == c.ID && l.LastError != "" {
				return
			}
		}
		bad("%s is Failed and no leaf says why", c.Name)
		return
	default:
		bad("%s is %s", c.Name, c.Status)
		return
	}
	held := 0
	for _, l := range w.Leaves {
		if l.CertificateID != c.ID {
			continue
		}
		held++
		if l.Held == 0 || w.signed[l.Serial].Generation != l.Held || w.signed[l.Serial].CertificateID != c.ID {
			bad("%s is %s, and at %s serial %q is held as generation %d", c.Name, c.Status, l.AgentID, l.Serial, l.Held)
		}
	}
	if held == 0 {
		bad("%s is %s and has no leaf", c.Name, c.Status)
	}
}

func (w *world) renewals(bad report) {
	w.each(Renew, func(o operation) {
		for _, told := range o.Jobs {
			j, ok := w.jobs[told.ID]
			switch {
			case !ok:
				bad("the renewal of %s was answered with %s, which is not there", o.Name, told.ID)
			case !j.Finished:
				bad("job %s of the renewal of %s is %s", j.ID, o.Name, j.State)
			case j.State == "Completed" && w.leaves[leafKey{j.CertificateID, j.AgentID}].Held < j.Generation:
				bad("job %s has made generation %d of %s, and %d is held", j.ID, j.Generation, o.Name, w.leaves[leafKey{j.CertificateID, j.AgentID}].Held)
			case j.State != "Completed" && j.Error == "":
				bad("job %s of the renewal of %s is %s and does not say why", j.ID, o.Name, j.State)
			case j.State == "Cancelled" && len(w.asked[Revoke][o.Name]) == 0:
				bad("job %s of the renewal of %s is cancelled, and nobody revoked it", j.ID, o.Name)
			}
		}
	})
	// An agent that lost a key has its generation signed anew, which the trail tells.
	lost := map[string]int64{}
	for _, action := range []string{"certificate.key_lost", "certificate.intent_abandoned"} {
		for _, a := range w.rows[action] {
			lost[a.Resource]++
		}
	}
	for _, l := range w.Leaves {
		c := w.certificates[l.CertificateID]
		if most := 1 + int64(len(w.asked[Renew][c.Name])) + lost["certificate/"+c.ID]; l.Held > most {
			bad("%s is at generation %d at %s, and at most %d were asked for", c.Name, l.Held, l.AgentID, most)
		}
	}
}

func (w *world) revocations(bad report) {
	acknowledged := map[string]operation{}
	w.each(Revoke, func(o operation) {
		if first, ok := acknowledged[o.Name]; !ok || o.end < first.end {
			acknowledged[o.Name] = o
		}
		for _, serial := range o.Serials {
			if !w.signed[serial].Revoked {
				bad("%s was answered as revoked and is not", serial)
			}
		}
	})
	for _, name := range slices.Sorted(maps.Keys(acknowledged)) {
		c := w.byName[name]
		if c.Status != "Revoked" {
			bad("%s was revoked and is %s", name, c.Status)
		}
		for _, v := range w.Versions {
			if v.CertificateID == c.ID && !v.Revoked && v.NotAfter.After(w.Now) {
				bad("%s was revoked, its version %s is not", name, v.Serial)
			}
		}
	}
	w.each(Read, func(o operation) {
		if first, ok := acknowledged[o.Name]; ok && first.end < o.began && o.Status != "Revoked" {
			bad("%s answered in operation %d that %s is %s, after operation %d had revoked it", o.Node, o.Operation, o.Name, o.Status, first.Operation)
		}
	})
}

func (w *world) reads(bad report) {
	w.forward(Read, "generation of", func(o operation) map[string]int64 { return o.Generations }, bad)
	ordered := map[string]operation{}
	w.each(Order, func(o operation) {
		if first, ok := ordered[o.Name]; !ok || o.end < first.end {
			ordered[o.Name] = o
		}
	})
	for _, o := range w.operations {
		if first, ok := ordered[o.Name]; ok && o.Kind == Read && o.outcome == Fail && first.end < o.began {
			bad("%s did not know %s in operation %d, after operation %d had ordered it: %s", o.Node, o.Name, o.Operation, first.Operation, o.Error)
		}
	}
}

func (w *world) agree(bad report) {
	for _, s := range w.Seen {
		c, ok := w.certificates[s.CertificateID]
		if !ok || c.Status != s.Status {
			bad("%s answers that %s is %s, the database has %q", s.Node, s.CertificateID, s.Status, c.Status)
		}
		for agent, generation := range s.Generations {
			if held := w.leaves[leafKey{s.CertificateID, agent}].Held; held != generation {
				bad("%s answers generation %d of %s at %s, the database has %d", s.Node, generation, c.Name, agent, held)
			}
		}
	}
}

func (w *world) files(bad report) {
	at := map[string]File{}
	for _, f := range w.Files {
		at[f.TargetID] = f
	}
	for _, p := range w.Placements {
		c, l := w.certificates[p.CertificateID], w.leaves[leafKey{p.CertificateID, p.AgentID}]
		if c.Status == "Revoked" || l.Held == 0 {
			continue // what is revoked is not deployed any more
		}
		switch f := at[p.TargetID]; {
		case f.Problem != "":
			bad("%s at %s: %s", c.Name, p.TargetID, f.Problem)
		case f.Serial != l.Serial:
			bad("%s at %s: the file has serial %q, the newest version is %s (generation %d)", c.Name, p.TargetID, f.Serial, l.Serial, l.Held)
		case p.Installed != l.Held:
			bad("%s at %s: generation %d is said to be installed, %d is", c.Name, p.TargetID, p.Installed, l.Held)
		}
	}
}

func (w *world) leadership(bad report) {
	taken := map[string]map[int64]string{}
	for _, a := range w.rows["duty.taken"] {
		duty := strings.TrimPrefix(a.Resource, "duty/")
		epoch, err := strconv.ParseInt(a.Detail["epoch"], 10, 64)
		if err != nil {
			bad("duty %s was taken in epoch %q", duty, a.Detail["epoch"])
			continue
		}
		if taken[duty] == nil {
			taken[duty] = map[int64]string{}
		}
		if other, ok := taken[duty][epoch]; ok {
			bad("duty %s was taken in epoch %d by %s and by %s", duty, epoch, other, a.Actor)
		}
		taken[duty][epoch] = a.Actor
	}
	for _, d := range w.Duties {
		for epoch := int64(1); epoch <= d.Epoch; epoch++ {
			if taken[d.Name][epoch] == "" {
				bad("no row tells who took duty %s in epoch %d", d.Name, epoch)
			}
		}
		if len(taken[d.Name]) > int(d.Epoch) {
			bad("duty %s was taken %d times and is in epoch %d", d.Name, len(taken[d.Name]), d.Epoch)
		}
		if last := taken[d.Name][d.Epoch]; last != "" && last != "node:"+d.Holder {
			bad("duty %s is held by %s, and was last taken by %s", d.Name, d.Holder, last)
		}
	}
}
