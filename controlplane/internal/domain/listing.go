package domain

import (
	"slices"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Order is what a list is sorted by. Rows that are alike in it follow their ids.
type Order string

const (
	ByCreation Order = "created" // by id: ids sort by the time they were made
	ByName     Order = "name"
	ByExpiry   Order = "not_after" // what is not issued yet has none and comes first
)

// The filters by which lists are narrowed, as requests name them.
const (
	filterStatus      = "status"
	filterIssuer      = "issuer_id"
	filterProfile     = "profile_id"
	filterOwner       = "owner"
	filterAgent       = "agent_id"
	filterNamePrefix  = "name_prefix"
	filterExpires     = "expires" // expires_after, expires_before, or both
	filterState       = "state"
	filterCertificate = "certificate_id"
	filterOpen        = "open"
)

// Listing is a list that can be asked for: a set of filters with an order. Each is read from the index named, row by row
// from where the page begins, however large the table is; what is not declared here is refused. The store's queries, the
// API's validation, the tests of the plans, the benchmark and docs/lists.md all come from the two tables below.
type Listing struct {
	Filters []string
	Order   Order
	// Index is what leads to the rows. "a, b" means that both are read and merged.
	Index string
	// Merged: the rows of a page are the first of several stretches of the index, of which each is read as far as a page
	// may need it.
	Merged bool
}

// CertificateListings are the lists of certificates; each can be had in both directions.
var CertificateListings = []Listing{
	{nil, ByCreation, "certificate_pkey", false},
	{nil, ByName, "certificate_name_key", false},
	{nil, ByExpiry, "certificate_expiry", true},
	{[]string{filterExpires}, ByExpiry, "certificate_expiry", true},
	{[]string{filterStatus}, ByCreation, "certificate_status", false},
	{[]string{filterStatus}, ByExpiry, "certificate_expiry", false},
	{[]string{filterStatus, filterExpires}, ByExpiry, "certificate_expiry", false},
	{[]string{filterIssuer}, ByCreation, "certificate_issuer", false},
	{[]string{filterProfile}, ByCreation, "certificate_profile", false},
	{[]string{filterOwner}, ByCreation, "certificate_owner_status", true},
	{[]string{filterOwner, filterStatus}, ByCreation, "certificate_owner_status", false},
	{[]string{filterAgent}, ByCreation, "leaf_agent", false},
	{[]string{filterNamePrefix}, ByName, "certificate_name_key", false},
}

// JobListings are the lists of jobs, the newest first. With agent_id, state is one of those in which a job is finished.
var JobListings = []Listing{
	{nil, ByCreation, "job_pkey", false},
	{[]string{filterState}, ByCreation, "job_state", false},
	{[]string{filterOpen}, ByCreation, "job_state", true},
	{[]string{filterCertificate}, ByCreation, "job_certificate", false},
	{[]string{filterCertificate, filterOpen}, ByCreation, "job_open_key_key", true},
	{[]string{filterAgent}, ByCreation, "job_agent_open, job_agent_finished", true},
	{[]string{filterAgent, filterOpen}, ByCreation, "job_agent_open", false},
	{[]string{filterAgent, filterState}, ByCreation, "job_agent_finished", false},
}

// Sorted is a listing in one direction.
type Sorted struct {
	Listing
	Descending bool
}

// Sort is the direction as a request names it: "name", "-name".
func (s Sorted) Sort() string {
	if s.Descending {
		return "-" + string(s.Order)
	}
	return string(s.Order)
}

// By names the filters, "all" without any.
func (l Listing) By() string {
	if len(l.Filters) == 0 {
		return "all"
	}
	return strings.Join(l.Filters, "+")
}

// Listing finds what serves the filter in its order. Invalid: an order that does not exist, or filters that no index
// serves together; the error names the field to change and lists what works.
func (f CertificateFilter) Listing() (Sorted, error) {
	var set []string
	for _, c := range []struct {
		filter string
		is     bool
	}{
		{filterOwner, f.Owner != ""}, {filterStatus, f.Status != ""}, {filterIssuer, f.IssuerID != ""}, {filterProfile, f.ProfileID != ""},
		{filterAgent, f.AgentID != ""}, {filterNamePrefix, f.NamePrefix != ""}, {filterExpires, f.expires() != ""},
	} {
		if c.is {
			set = append(set, c.filter)
		}
	}
	if !f.ExpiresBefore.IsZero() && !f.ExpiresAfter.IsZero() && !f.ExpiresAfter.Before(f.ExpiresBefore) {
		return Sorted{}, fault.InvalidField("expires_before", "is not after expires_after: nothing expires between them")
	}
	order, down := strings.CutPrefix(f.Sort, "-")
	switch {
	case f.Sort == "" && f.NamePrefix != "":
		order = string(ByName)
	case f.Sort == "" && f.expires() != "":
		order = string(ByExpiry)
	case f.Sort == "":
		order = string(ByCreation)
	case !slices.Contains([]Order{ByCreation, ByName, ByExpiry}, Order(order)):
		return Sorted{}, fault.InvalidField("sort", "%q is no order; use created, name or not_after, with - before it for the other way round", f.Sort)
	}
	l, err := find(CertificateListings, set, Order(order), func(filter string) string {
		if filter == filterExpires {
			return f.expires()
		}
		return filter
	})
	return Sorted{l, down}, err
}

// expires is the field that bounds the expiry; empty when none does.
func (f CertificateFilter) expires() string {
	switch {
	case !f.ExpiresBefore.IsZero():
		return "expires_before"
	case !f.ExpiresAfter.IsZero():
		return "expires_after"
	}
	return ""
}

// Listing is as that of CertificateFilter.
func (f JobFilter) Listing() (Sorted, error) {
	var set []string
	for _, c := range []struct {
		filter string
		is     bool
	}{
		{filterCertificate, f.CertificateID != ""}, {filterAgent, f.AgentID != ""}, {filterState, f.State != ""},
		// A state that is open says it already.
		{filterOpen, f.Open && !f.State.Open()},
	} {
		if c.is {
			set = append(set, c.filter)
		}
	}
	if f.AgentID != "" && f.State.Open() {
		return Sorted{}, fault.InvalidField(filterState, "%s is not indexed by agent; use open, which lists every unfinished job of it", f.State)
	}
	l, err := find(JobListings, set, ByCreation, func(filter string) string { return filter })
	return Sorted{l, true}, err
}

// find looks for the listing of exactly these filters. field is how a request names a filter.
func find(all []Listing, set []string, order Order, field func(filter string) string) (Listing, error) {
	var orders []string
	for _, l := range all {
		if !same(l.Filters, set) {
			continue
		}
		if l.Order == order {
			return l, nil
		}
		orders = append(orders, string(l.Order))
	}
	if orders != nil {
		return Listing{}, fault.InvalidField("sort", "%s is not indexed with %s; use %s, or another list: %s",
			order, strings.Join(set, " and "), strings.Join(orders, " or "), describe(all))
	}
	// The filter to change is the first that no listing has beside those before it.
	var kept []string
	for _, f := range set {
		beside := append(slices.Clone(kept), f)
		if !slices.ContainsFunc(all, func(l Listing) bool { return covers(l.Filters, beside) }) {
			return Listing{}, fault.InvalidField(field(f), "is not indexed together with %s; what can be listed: %s", strings.Join(kept, " and "), describe(all))
		}
		kept = beside
	}
	return Listing{}, fault.InvalidField(field(set[0]), "is not indexed alone; what can be listed: %s", describe(all))
}

func same(a, b []string) bool { return len(a) == len(b) && covers(a, b) }

// covers reports whether all of some are in list.
func covers(list, some []string) bool {
	return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(list, s) })
}

// describe names the listings, each set of filters once, with its orders where there is a choice.
func describe(all []Listing) string {
	var sets []string
	orders := map[string][]string{}
	choice := false
	for _, l := range all {
		by := l.By()
		if orders[by] == nil {
			sets = append(sets, by)
		}
		orders[by] = append(orders[by], string(l.Order))
		choice = choice || l.Order != all[0].Order
	}
	for i, by := range sets {
		if choice {
			sets[i] += " by " + strings.Join(orders[by], ", ")
		}
	}
	return strings.Join(sets, "; ")
}
