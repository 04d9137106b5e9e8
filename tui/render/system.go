package render

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"time"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Jobs is a list.
func (p *Page) Jobs(list []*operatorpb.Job, names Names, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, j := range list {
		rows = append(rows, []string{
			j.GetId(), j.GetKind(), j.GetState(), names.of(j.GetCertificateId()), names.of(j.GetAgentId()), names.of(j.GetTargetId()),
			tries(j), Relative(j.GetCreatedAt(), now), short(Clean(j.GetError()), 60),
		})
	}
	p.Table([]string{"ID", "KIND", "STATE", "CERTIFICATE", "AGENT", "TARGET", "TRIES", "CREATED", "ERROR"}, rows)
}

func tries(j *operatorpb.Job) string {
	if j.GetMaxTries() == 0 {
		return fmt.Sprint(j.GetTries())
	}
	return fmt.Sprintf("%d/%d", j.GetTries(), j.GetMaxTries())
}

// Job is one.
func (p *Page) Job(j *operatorpb.Job, names Names, now time.Time) {
	failed := j.GetError()
	if failed != "" && j.GetErrorClass() != "" {
		failed += " (" + j.GetErrorClass() + ")"
	}
	p.Facts(
		Fact{"Id", j.GetId()},
		Fact{"Kind", j.GetKind()},
		Fact{"State", j.GetState()},
		Fact{"Reason", j.GetReason()},
		Fact{"Error", failed},
		Fact{"Certificate", names.of(j.GetCertificateId())},
		Fact{"Agent", names.of(j.GetAgentId())},
		Fact{"Target", names.of(j.GetTargetId())},
		Fact{"Generation", number(j.GetGeneration())},
		Fact{"Attempt", fmt.Sprint(j.GetAttempt())},
		Fact{"Tries", tries(j)},
		Fact{"Not before", Time(j.GetRunAt(), now)},
		Fact{"Created", Time(j.GetCreatedAt(), now)},
		Fact{"Changed", Time(j.GetUpdatedAt(), now)},
		Fact{"Finished", Time(j.GetFinishedAt(), now)},
		Fact{"Request id", j.GetRequestId()},
	)
}

// Issuers is a list.
func (p *Page) Issuers(list []*operatorpb.Issuer, now time.Time) {
	rows := make([][]string, 0, len(list))
	for _, i := range list {
		rows = append(rows, []string{i.GetName(), i.GetKind(), Time(i.GetNotAfter(), now), i.GetPublicUrl()})
	}
	p.Table([]string{"NAME", "KIND", "EXPIRES", "PUBLIC URL"}, rows)
}

// Issuer is one, with its chain by name.
func (p *Page) Issuer(i *operatorpb.Issuer, now time.Time) {
	p.Facts(
		Fact{"Name", i.GetName()},
		Fact{"Id", i.GetId()},
		Fact{"Kind", i.GetKind()},
		Fact{"Expires", Time(i.GetNotAfter(), now)},
		Fact{"Public URL", i.GetPublicUrl()},
		Fact{"Created", Time(i.GetCreatedAt(), now)},
	)
	for n, line := range chain(i.GetChainPem()) {
		if n == 0 {
			p.Say("Chain (the PEM is in --format json):")
		}
		p.Line("  " + line)
	}
}

func chain(text string) []string {
	var out []string
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			out = append(out, "a certificate that cannot be read")
			continue
		}
		out = append(out, fmt.Sprintf("%s, until %s", c.Subject, c.NotAfter.UTC().Format("2006-01-02")))
	}
}

// Profiles is a list.
func (p *Page) Profiles(list []*operatorpb.Profile) {
	rows := make([][]string, 0, len(list))
	for _, f := range list {
		rows = append(rows, []string{
			f.GetName(), f.GetKeyAlgorithm(), strings.Join(f.GetAllowedKeyAlgorithms(), " "), strings.Join(f.GetEkus(), " "), Exact(f.GetTtl()), Exact(f.GetMaxTtl()),
		})
	}
	p.Table([]string{"NAME", "KEY", "ALLOWED", "FOR", "LIFETIME", "AT MOST"}, rows)
}

// Audit is a part of the trail.
func (p *Page) Audit(list []*operatorpb.AuditEvent) {
	rows := make([][]string, 0, len(list))
	for _, e := range list {
		at := ""
		if e.GetAt() != nil {
			at = e.GetAt().AsTime().UTC().Format("2006-01-02 15:04:05")
		}
		rows = append(rows, []string{at, e.GetActor(), e.GetAction(), e.GetResource(), e.GetOutcome(), e.GetRemoteAddr(), short(Clean(pairs(e.GetDetail())), 80)})
	}
	p.Table([]string{"AT (UTC)", "ACTOR", "ACTION", "RESOURCE", "OUTCOME", "FROM", "DETAIL"}, rows)
}

// Status is the control plane at a glance.
func (p *Page) Status(s *operatorpb.GetStatusResponse, now time.Time) {
	up := ""
	if s.GetStartedAt() != nil {
		up = ", up " + Rough(now.Sub(s.GetStartedAt().AsTime()))
	}
	p.Facts(
		Fact{"Node", s.GetNodeId()},
		Fact{"Version", s.GetVersion() + up},
		Fact{"Trust domain", s.GetTrustDomain()},
		Fact{"Store", fmt.Sprintf("%s, schema %d", s.GetStore(), s.GetSchemaVersion())},
		Fact{"Certificates", none(counts(s.GetCertificatesByStatus()))},
		Fact{"In place", lagging(s)},
		Fact{"Agents", none(counts(s.GetAgentsByState()))},
		Fact{"Streams here", fmt.Sprint(s.GetSessions())},
		Fact{"Open jobs", none(counts(s.GetOpenJobsByState()))},
	)
	if len(s.GetDuties()) == 0 {
		return
	}
	rows := make([][]string, 0, len(s.GetDuties()))
	for _, d := range s.GetDuties() {
		last := Relative(d.GetLastRun(), now)
		if last == "" {
			last = "never"
		}
		rows = append(rows, []string{d.GetName(), Exact(d.GetInterval()), last, fmt.Sprint(d.GetEpoch()), d.GetLastError()})
	}
	p.Table([]string{"DUTY", "EVERY", "LAST RUN", "EPOCH", "LAST ERROR"}, rows)
}

func counts(m map[string]int64) string {
	parts := strings.Fields(pairs(m))
	for i, s := range parts {
		parts[i] = strings.Replace(s, "=", " ", 1)
	}
	return strings.Join(parts, ", ")
}

func none(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func lagging(s *operatorpb.GetStatusResponse) string {
	switch n := s.GetPlacementsLagging(); n {
	case 0:
		return "everywhere"
	case 1:
		return "not at 1 placement"
	default:
		return fmt.Sprintf("not at %d placements", n)
	}
}
