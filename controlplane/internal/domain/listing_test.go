package domain_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// docs/lists.md has a row for each declared list, in their order.
func TestListsPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../../docs/lists.md")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	row := func(l domain.Listing, directions string) {
		by := "none"
		if len(l.Filters) > 0 {
			by = "`" + strings.Join(l.Filters, "` and `") + "`"
		}
		read := "`" + strings.ReplaceAll(l.Index, ", ", "`, `") + "`"
		if l.Merged {
			read += ", merged"
		}
		want = append(want, fmt.Sprintf("| %s | %s | %s |", by, directions, read))
	}
	for _, l := range domain.CertificateListings {
		row(l, fmt.Sprintf("`%s`, `-%s`", l.Order, l.Order))
	}
	for _, l := range domain.JobListings {
		row(l, "the newest first")
	}
	for line := range strings.Lines(string(page)) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "| none |") || strings.HasPrefix(line, "| `") {
			got = append(got, line)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("docs/lists.md has\n%s\nand must have\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Whatever is asked for is a declared list, or it is refused by a field of the request, with what can be listed.
func TestEveryFilterIsListedOrRefused(t *testing.T) {
	t.Parallel()
	at := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	listed := map[string]bool{}
	check := func(f fmt.Stringer, l domain.Sorted, err error, fields ...string) {
		t.Helper()
		if err == nil {
			listed[fmt.Sprint(l.Filters, l.Order)] = true
			return
		}
		field, _, _ := strings.Cut(err.Error(), ":")
		if !fault.Is(err, fault.Invalid) || !slices.Contains(fields, field) || !strings.Contains(err.Error(), "use ") && !strings.Contains(err.Error(), "can be listed: all") {
			t.Errorf("%s: %v", f, err)
		}
		if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "together with ;") {
			t.Errorf("%s: %v", f, err)
		}
	}
	for bits := range 1 << 8 {
		for _, sort := range []string{"", "created", "-created", "name", "-name", "not_after", "-not_after", "owner", "--name", "-"} {
			f := domain.CertificateFilter{Sort: sort}
			for i, set := range []func(){
				func() { f.Status = domain.CertificateActive }, func() { f.IssuerID = "x" }, func() { f.ProfileID = "x" }, func() { f.AgentID = "x" },
				func() { f.Owner = "x" }, func() { f.NamePrefix = "x" }, func() { f.ExpiresBefore = at }, func() { f.ExpiresAfter = at.Add(-time.Hour) },
			} {
				if bits>>i&1 == 1 {
					set()
				}
			}
			l, err := f.Listing()
			check(text(fmt.Sprintf("%+v", f)), l, err, "status", "issuer_id", "profile_id", "agent_id", "owner", "name_prefix", "expires_before", "expires_after", "sort")
		}
	}
	for _, state := range append([]domain.JobState{""}, append(slices.Clone(domain.OpenJobStates), domain.FinishedJobStates...)...) {
		for bits := range 1 << 3 {
			f := domain.JobFilter{State: state, Open: bits&1 == 1}
			if bits&2 == 2 {
				f.AgentID = "x"
			}
			if bits&4 == 4 {
				f.CertificateID = "x"
			}
			l, err := f.Listing()
			check(text(fmt.Sprintf("%+v", f)), l, err, "state", "agent_id", "certificate_id", "open")
		}
	}
	for _, l := range slices.Concat(domain.CertificateListings, domain.JobListings) {
		if !listed[fmt.Sprint(l.Filters, l.Order)] {
			t.Errorf("no filter leads to the list by %s in the order of %s", l.By(), l.Order)
		}
	}
}

type text string

func (t text) String() string { return string(t) }
