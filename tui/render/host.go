package render

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Agents is a list.
func (p *Page) Agents(list []*operatorpb.Agent, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, a := range list {
		rows = append(rows, []string{
			a.GetName(), a.GetState(), Relative(a.GetLastSeen(), now), host(a), a.GetVersion(), pairs(a.GetLabels()), short(Clean(a.GetReason()), 60),
		})
	}
	p.Table([]string{"NAME", "STATE", "SEEN", "HOST", "VERSION", "LABELS", "REASON"}, rows)
}

func host(a *operatorpb.Agent) string {
	s := a.GetHostname()
	if s == "" {
		s = a.GetIpAddress()
	} else if a.GetIpAddress() != "" {
		s += " (" + a.GetIpAddress() + ")"
	}
	return s
}

// Agent is one host.
func (p *Page) Agent(a *operatorpb.Agent, now time.Time) {
	platform := a.GetPlatform()
	if platform == "" {
		platform = a.GetOs()
	}
	p.Facts(
		Fact{"Name", a.GetName()},
		Fact{"Id", a.GetId()},
		Fact{"State", a.GetState()},
		Fact{"Reason", a.GetReason()},
		Fact{"Seen", Time(a.GetLastSeen(), now)},
		Fact{"Host", host(a)},
		Fact{"Platform", strings.TrimSpace(platform + " " + a.GetArchitecture())},
		Fact{"Version", a.GetVersion()},
		Fact{"Labels", pairs(a.GetLabels())},
		Fact{"Capabilities", strings.Join(a.GetCapabilities(), ", ")},
		Fact{"Credits", pairs(a.GetCredits())},
		Fact{"Joined", Time(a.GetCreatedAt(), now)},
	)
	for i, r := range a.GetRejectedStates() {
		if i == 0 {
			p.Say("It refused:")
		}
		p.Line("  " + r)
	}
}

func pairs[V any](m map[string]V) string {
	parts := make([]string, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s=%v", k, m[k]))
	}
	return strings.Join(parts, " ")
}

// Tokens is a list.
func (p *Page) Tokens(list []*operatorpb.JoinToken, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, t := range list {
		rows = append(rows, []string{
			t.GetId(), tokenState(t, now), fmt.Sprintf("%d/%d", t.GetUses(), t.GetMaxUses()), Time(t.GetExpiresAt(), now), pairs(t.GetLabels()), t.GetCreatedBy(),
		})
	}
	p.Table([]string{"ID", "STATE", "USES", "EXPIRES", "LABELS", "MADE BY"}, rows)
}

// tokenState says whether a host could join with it.
func tokenState(t *operatorpb.JoinToken, now time.Time) string {
	switch {
	case t.GetRevokedAt() != nil:
		return "revoked"
	case !now.Before(t.GetExpiresAt().AsTime()):
		return "expired"
	case t.GetUses() >= t.GetMaxUses():
		return "used up"
	default:
		return "valid"
	}
}

// Targets is a list.
func (p *Page) Targets(list []*operatorpb.Target, names Names) {
	rows := make([][]string, 0, len(list))
	for _, t := range list {
		rows = append(rows, []string{t.GetName(), t.GetKind(), names.of(t.GetAgentId()), verified(t), yes(t.GetEnabled())})
	}
	p.Table([]string{"NAME", "KIND", "AGENT", "VERIFIED AT", "ENABLED"}, rows)
}

func verified(t *operatorpb.Target) string {
	switch {
	case t.GetVerifyAddress() == "":
		return "not probed"
	case t.GetServerName() == "":
		return t.GetVerifyAddress()
	default:
		return t.GetVerifyAddress() + " as " + t.GetServerName()
	}
}

// Target is one, with its settings.
func (p *Page) Target(t *operatorpb.Target, names Names, now time.Time) {
	p.Facts(
		Fact{"Name", t.GetName()},
		Fact{"Id", t.GetId()},
		Fact{"Kind", t.GetKind()},
		Fact{"Agent", names.of(t.GetAgentId())},
		Fact{"Verified at", verified(t)},
		Fact{"Enabled", yes(t.GetEnabled())},
		Fact{"Created", Time(t.GetCreatedAt(), now)},
	)
	var settings map[string]json.RawMessage
	if json.Unmarshal([]byte(t.GetSettingsJson()), &settings) != nil || len(settings) == 0 {
		return
	}
	facts := make([]Fact, 0, len(settings))
	for _, k := range slices.Sorted(maps.Keys(settings)) {
		value := string(settings[k])
		var s string
		if json.Unmarshal(settings[k], &s) == nil {
			value = s
		}
		facts = append(facts, Fact{"  " + Clean(k), value})
	}
	p.Say("Settings:")
	p.b.WriteString(factsOf(facts))
}

// factsOf is Facts without the gap before it.
func factsOf(facts []Fact) string {
	var inner Page
	inner.Facts(facts...)
	return inner.String()
}
