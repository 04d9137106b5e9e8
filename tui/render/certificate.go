package render

import (
	"fmt"
	"slices"
	"strings"
	"time"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// inPlace is the second fact about a certificate: how many placements serve what is wanted, or hold it where they are not probed.
func inPlace(c *operatorpb.Certificate) string {
	return fmt.Sprintf("%d/%d", c.GetPlacementsCurrent(), c.GetPlacementsTotal())
}

// Certificates is a list.
func (p *Page) Certificates(list []*operatorpb.Certificate, names Names, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, c := range list {
		rows = append(rows, []string{
			c.GetName(), c.GetStatus(), inPlace(c), Time(c.GetNotAfter(), now), names.of(c.GetIssuerId()), names.of(c.GetProfileId()), c.GetOwner(),
		})
	}
	p.Table([]string{"NAME", "STATUS", "IN PLACE", "EXPIRES", "ISSUER", "PROFILE", "OWNER"}, rows)
}

// Certificate is one with its leaves and placements.
func (p *Page) Certificate(c *operatorpb.Certificate, names Names, now time.Time) {
	n := c.GetNames()
	p.Facts(
		Fact{"Name", c.GetName()},
		Fact{"Id", c.GetId()},
		Fact{"Status", c.GetStatus()},
		Fact{"In place", inPlace(c)},
		Fact{"Expires", Time(c.GetNotAfter(), now)},
		Fact{"Common name", n.GetCommonName()},
		Fact{"DNS", strings.Join(n.GetDns(), ", ")},
		Fact{"IP", strings.Join(n.GetIp(), ", ")},
		Fact{"Email", strings.Join(n.GetEmail(), ", ")},
		Fact{"URI", strings.Join(n.GetUri(), ", ")},
		Fact{"Issuer", names.of(c.GetIssuerId())},
		Fact{"Profile", names.of(c.GetProfileId())},
		Fact{"Owner", c.GetOwner()},
		Fact{"Renewal", policy(c.GetPolicy())},
		Fact{"Created", Time(c.GetCreatedAt(), now)},
		Fact{"Changed", Time(c.GetUpdatedAt(), now)},
	)
	if len(c.GetLeaves()) > 0 {
		rows := make([][]string, 0, len(c.GetLeaves()))
		for _, l := range c.GetLeaves() {
			rows = append(rows, []string{
				names.of(l.GetAgentId()), generation(l), l.GetSerial(), Time(l.GetNotAfter(), now), Time(l.GetDueAt(), now), failures(l, now),
			})
		}
		p.Table([]string{"AGENT", "GENERATION", "SERIAL", "EXPIRES", "RENEWAL DUE", "FAILURES"}, rows)
	}
	if len(c.GetPlacements()) > 0 {
		rows := make([][]string, 0, len(c.GetPlacements()))
		for _, pl := range c.GetPlacements() {
			state := pl.GetState()
			if pl.GetDriftedAt() != nil {
				state += ", changed " + Relative(pl.GetDriftedAt(), now)
			}
			rows = append(rows, []string{
				placementName(pl.GetTargetName(), pl.GetTargetId()), names.of(pl.GetAgentId()), state, yes(pl.GetCurrent()), number(pl.GetInstalledGeneration()),
				number(pl.GetServedGeneration()), Time(pl.GetServedAt(), now), pl.GetLastError(),
			})
		}
		p.Table([]string{"TARGET", "AGENT", "STATE", "CURRENT", "INSTALLED", "SERVED", "SEEN", "LAST ERROR"}, rows)
	}
}

func placementName(name, id string) string {
	if name != "" {
		return name
	}
	return id
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// number leaves a zero, which means "none yet", out.
func number(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func generation(l *operatorpb.Leaf) string {
	if l.GetOrderedGeneration() > l.GetGeneration() {
		return fmt.Sprintf("%s (%d ordered)", number(l.GetGeneration()), l.GetOrderedGeneration())
	}
	return number(l.GetGeneration())
}

func failures(l *operatorpb.Leaf, now time.Time) string {
	if l.GetFailures() == 0 {
		return ""
	}
	s := fmt.Sprint(l.GetFailures())
	if l.GetBackoffUntil() != nil {
		s += ", next try " + Relative(l.GetBackoffUntil(), now)
	}
	if l.GetLastError() != "" {
		s += ": " + l.GetLastError()
	}
	return s
}

func policy(p *operatorpb.RenewalPolicy) string {
	s := "after 2/3 of the lifetime"
	if f := p.GetFraction(); f > 0 {
		s = fmt.Sprintf("after %.4g of the lifetime", f)
	}
	if p.GetDisabled() {
		s = "off"
	} else if n := len(p.GetWindows()); n > 0 {
		s += ", " + windows(p.GetWindows())
	}
	if p.GetRequireApproval() {
		s += ", each approved by an operator"
	}
	return s
}

func windows(list []*operatorpb.RenewalWindow) string {
	names := []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}
	out := make([]string, 0, len(list))
	for _, w := range list {
		var days []string
		for _, d := range w.GetDays() {
			if d >= 0 && int(d) < len(names) {
				days = append(days, names[d])
			}
		}
		out = append(out, fmt.Sprintf("%s %02d:%02d-%02d:%02d UTC", strings.Join(days, ","),
			w.GetStartMinute()/60, w.GetStartMinute()%60, w.GetEndMinute()/60, w.GetEndMinute()%60))
	}
	return "within " + strings.Join(out, " or ")
}

// Versions is the history of a certificate.
func (p *Page) Versions(list []*operatorpb.Version, names Names, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, v := range list {
		revoked := ""
		if v.GetRevokedAt() != nil {
			revoked = Absolute(v.GetRevokedAt()) + " " + v.GetRevocationReason()
		}
		rows = append(rows, []string{
			number(v.GetGeneration()), names.of(v.GetAgentId()), v.GetSerial(), v.GetKeyAlgorithm(), Absolute(v.GetNotBefore()), Time(v.GetNotAfter(), now),
			revoked, short(v.GetFingerprint(), 17),
		})
	}
	p.Table([]string{"GENERATION", "AGENT", "SERIAL", "KEY", "FROM", "EXPIRES", "REVOKED", "SHA-256"}, rows)
}

// Why explains in sentences.
func (p *Page) Why(e *operatorpb.ExplainCertificateResponse, names Names, now time.Time) {
	c := e.GetCertificate()
	line := c.GetName() + " is " + c.GetStatus()
	if c.GetNotAfter() != nil {
		verb := " and expires "
		if !c.GetNotAfter().AsTime().After(now) {
			verb = " and expired "
		}
		line += verb + Time(c.GetNotAfter(), now)
	}
	p.Say(sentence(line))
	switch current, total := c.GetPlacementsCurrent(), c.GetPlacementsTotal(); {
	case total == 0:
		p.Line("It is placed on no target.")
	case current == total:
		p.Line(fmt.Sprintf("What is wanted is in place at every placement (%d of %d)%s.", current, total, proven(c.GetPlacements())))
	default:
		p.Line(fmt.Sprintf("What is wanted is in place at %d of %d placements.", current, total))
	}
	for i, l := range e.GetLeaves() {
		due := "is not due"
		if l.GetDue() {
			due = "is due"
		}
		line := fmt.Sprintf("On agent %s it %s", names.of(l.GetAgentId()), due)
		reason, at := l.GetReason(), Absolute(l.GetDueAt())
		told := at != "" && strings.Contains(reason, at)
		if told {
			reason = strings.Replace(reason, at, Time(l.GetDueAt(), now), 1)
		}
		if reason != "" {
			line += ": " + reason
		}
		line = sentence(line)
		if at != "" && !told && !l.GetDue() {
			line += " It will be due " + Time(l.GetDueAt(), now) + "."
		}
		p.block(i, line)
	}
	for i, pl := range e.GetPlacements() {
		name := placementName(pl.GetTargetName(), pl.GetTargetId())
		if pl.GetCurrent() {
			line := "Target " + name + " has what is wanted"
			if pl.GetWaitsFor() != "" {
				line += ": " + pl.GetWaitsFor()
			}
			p.block(i, sentence(line))
			continue
		}
		line := "Target " + name + " does not have what is wanted"
		if pl.GetWaitsFor() != "" {
			line += "; it waits for: " + pl.GetWaitsFor()
		}
		p.block(i, sentence(line))
	}
}

// proven says how it is known of placements that they have what is wanted.
func proven(list []*operatorpb.Placement) string {
	served := 0
	for _, pl := range list {
		if pl.GetState() == "Served" {
			served++
		}
	}
	switch unprobed := len(list) - served; {
	case len(list) == 0:
		return ""
	case unprobed == 0:
		return ": served"
	case served == 0:
		return ": read back, not probed"
	default:
		return fmt.Sprintf(": %d served, %d read back and not probed", served, unprobed)
	}
}

// block begins a paragraph with its first line.
func (p *Page) block(i int, line string) {
	if i == 0 {
		p.Say(line)
		return
	}
	p.Line(line)
}

// Revoked says what was revoked.
func (p *Page) Revoked(c *operatorpb.Certificate, serials []string) {
	p.Say(fmt.Sprintf("%s is %s; %s revoked.", c.GetName(), c.GetStatus(), count(len(serials), "serial", "serials")))
	for _, s := range slices.Sorted(slices.Values(serials)) {
		p.Line("  " + s)
	}
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
