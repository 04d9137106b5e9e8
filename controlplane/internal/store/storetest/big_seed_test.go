package storetest

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// big is an estate written past the store, by the database itself: as many certificates as asked for, each with a leaf, a
// placement, a version and a name, and three jobs of history for each.
//
// Who comes first is not who is first in name or expiry. One owner, issuer, profile and agent have most of the certificates,
// as a platform team and a large load balancer do, so that each list has a ten-thousandth page; the newest hundredth is
// Pending, and its jobs are open: rows of one value that lie together at one end are what misleads a planner.
type big struct {
	e    Engine
	db   *sql.DB
	rows int
}

const (
	bigOwner, bigIssuer, bigProfile = "platform", "iss_0", "prof_0"
	bigSpan                         = 90 * 24 * time.Hour
)

// jobsEach is how many jobs a certificate has behind it.
const jobsEach = 3

func bigID(prefix string, i int) string { return fmt.Sprintf("%s_%032x", prefix, i) }

// seedBig fills the database of w. Its indexes, but those of keys, are made afterwards: that is three times as fast.
func seedBig(t testing.TB, w *World, rows int) big {
	t.Helper()
	b := big{w.Engine, w.DB(t), rows}
	ctx := t.Context()
	conn, err := b.db.Conn(ctx)
	must(t, err)
	defer func() { _ = conn.Close() }()
	exec := func(statement string) {
		t.Helper()
		if _, err := conn.ExecContext(ctx, statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	if b.lite() {
		for _, pragma := range []string{"synchronous = OFF", "cache_size = -262144", "temp_store = MEMORY"} {
			exec("PRAGMA " + pragma)
		}
	} else {
		exec("SET synchronous_commit = off")
		exec("SET maintenance_work_mem = '256MB'")
	}
	indexes := b.indexes(t)
	if rows > 10_000 {
		for name := range indexes {
			exec("DROP INDEX " + name)
		}
	}
	exec("BEGIN")
	for _, s := range b.statements() {
		exec(s)
	}
	exec("COMMIT")
	if rows > 10_000 {
		for _, definition := range indexes {
			exec(definition)
		}
	}
	if b.lite() {
		exec("PRAGMA wal_checkpoint(TRUNCATE)")
	} else {
		exec("VACUUM ANALYZE")
	}
	return b
}

func (b big) lite() bool { return b.e.Name == "sqlite" }

// indexes are the definitions of the indexes that no key needs, by name.
func (b big) indexes(t testing.TB) map[string]string {
	t.Helper()
	query := `SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexname NOT LIKE '%\_pkey' AND indexname NOT LIKE '%\_key'`
	if b.lite() {
		query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
	}
	rows, err := b.db.QueryContext(t.Context(), query)
	must(t, err)
	defer func() { _ = rows.Close() }()
	out := map[string]string{}
	for rows.Next() {
		var name, definition string
		must(t, rows.Scan(&name, &definition))
		out[name] = definition
	}
	must(t, rows.Err())
	return out
}

// statements are the INSERTs. In each, i counts rows from 0.
func (b big) statements() []string {
	n := b.rows
	from := func(rows int) string {
		if b.lite() {
			return fmt.Sprintf("FROM (WITH RECURSIVE seq(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM seq WHERE i < %d) SELECT i FROM seq) AS seq", rows-1)
		}
		return fmt.Sprintf("FROM generate_series(0::bigint, %d) AS seq(i)", rows-1)
	}
	hex := func(prefix, i string) string {
		if b.lite() {
			return fmt.Sprintf("printf('%s_%%032x', %s)", prefix, i)
		}
		return fmt.Sprintf("'%s_' || lpad(to_hex(%s), 32, '0')", prefix, i)
	}
	// of replaces @name in a statement by an expression over i.
	of := func(i string) *strings.Replacer {
		return strings.NewReplacer(
			"@cert", hex("cert", i), "@agent", hex("agt", b.agentOf(i)), "@target", hex("tgt", i),
			"@shard", "("+i+") % 8",
			"@name", fmt.Sprintf("CASE WHEN %s %% 10 < 7 THEN 'svc-' ELSE 'web-' END || (1000000000 + (%s * 611953 + 17) %% %d)", i, i, n),
			"@status", fmt.Sprintf(`CASE WHEN %[1]s >= %[2]d THEN 'Pending' ELSE CASE WHEN %[3]s < 900 THEN 'Active' WHEN %[3]s < 940 THEN 'Expiring'
 WHEN %[3]s < 960 THEN 'RenewalInProgress' WHEN %[3]s < 975 THEN 'Expired' WHEN %[3]s < 985 THEN 'Failed' WHEN %[3]s < 995 THEN 'Revoked' ELSE 'Archived' END END`,
				i, b.settled(), spread(i, 7919, 1000)),
			"@owner", fmt.Sprintf("CASE WHEN %[1]s < 700 THEN '%[2]s' ELSE 'team-' || %[1]s END", spread(i, 104729, 1000), bigOwner),
			"@issuer", fmt.Sprintf("CASE WHEN %[1]s < 7 THEN '%[2]s' ELSE 'iss_' || %[1]s END", spread(i, 1299709, 10), bigIssuer),
			"@profile", fmt.Sprintf("CASE WHEN %[1]s < 7 THEN '%[2]s' ELSE 'prof_' || %[1]s END", spread(i, 15487, 10), bigProfile),
			// Several expire at the same minute.
			"@expiry", fmt.Sprintf("CASE WHEN %s >= %d THEN 0 ELSE %d + ((%s * 611969 + 5) %% %d) * %d / %d * 60000000 END", i, b.settled(),
				Start.UnixMicro(), i, n, int64(bigSpan/time.Minute), n))
	}
	insert := func(table, columns, values string, rows int, i string) string {
		return "INSERT INTO " + table + " (" + columns + ") SELECT " + of(i).Replace(values) + " " + from(rows)
	}
	due := int64(15 * 24 * time.Hour / time.Microsecond)
	// Jobs go round: the last round ends with those of the Pending certificates.
	open := fmt.Sprintf("i >= %d", (jobsEach-1)*n+b.settled())
	bytes := map[bool]string{true: "BLOB", false: "BYTEA"}[b.lite()]
	return []string{
		insert("profile", "id, name, key_algorithm, allowed, ekus, ttl, max_ttl, created_at",
			"'prof_' || i, 'profile-' || i, 'ECDSA-P256', '[\"ECDSA-P256\"]', '[\"serverAuth\"]', 4060800000000, 4060800000000, 0", 10, "i"),
		insert("agent", "id, name, state, labels, facts, capabilities, protocol, reason, created_at, last_seen, offline_since",
			hex("agt", "i")+", 'host-' || i, CASE WHEN i % 20 = 0 THEN 'Offline' ELSE 'Online' END, '{}', '{}', '[]', 1, '', 0, 0, 0", 1001, "i"),
		insert("certificate", "id, name, common_name, issuer_id, profile_id, owner, policy, status, not_after, status_at, shard, request_id, created_by, created_at, updated_at, revision",
			"@cert, @name, 'www.example.com', @issuer, @profile, @owner, '{}', @status, @expiry, NULLIF(@expiry, 0), @shard, NULL, 'operator:x', i, i, 1", n, "i"),
		insert("certificate_san", "certificate_id, kind, value", "@cert, 'dns', 'host-' || i || '.example.com'", n, "i"),
		insert("leaf", "certificate_id, agent_id, generation, current_generation, serial, not_before, not_after, due_at, failures, backoff_until, last_error, revoked, shard",
			fmt.Sprintf("@cert, @agent, 1, CASE WHEN @expiry = 0 THEN 0 ELSE 1 END, '', 0, @expiry, CASE WHEN @expiry = 0 THEN NULL ELSE @expiry - %d END, 0, 0, '', FALSE, @shard", due), n, "i"),
		insert("placement", "certificate_id, target_id, agent_id, state, installed_generation, served_generation, installed_fingerprint, served_fingerprint, served_at, due_at, failures, backoff_until, last_error, shard, updated_at",
			"@cert, @target, @agent, 'Served', 1, 1, 'f', 'f', 1, CASE WHEN i % 200 = 0 THEN i ELSE NULL END, 0, 0, '', @shard, 0", n, "i"),
		insert("version", "issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm, not_before, not_after, revoked_at, revocation_reason, created_at",
			"@issuer, 's' || (1000000000 + i), @cert, @agent, 1, CAST('der' AS "+bytes+"), CAST('' AS "+bytes+"), 'f' || i, 'k' || i, 'ECDSA-P256', 0, @expiry, NULL, 0, i", n, "i"),
		// The last job of each certificate that is Pending is open.
		insert("job", "id, kind, state, certificate_id, agent_id, target_id, generation, attempt, tries, max_tries, run_at, accepted_at, error_class, error, reason, request_id, open_key, shard, created_at, updated_at, finished_at",
			hex("job", "i")+", 'Renewal', CASE WHEN "+open+" THEN CASE WHEN i % 10 = 0 THEN 'Running' ELSE 'AwaitingCSR' END WHEN i % 33 = 0 THEN 'Failed' WHEN i % 100 = 1 THEN 'Cancelled' ELSE 'Completed' END,"+
				"@cert, @agent, '', 1, 1, 1, 5, 0, 0, '', '', 'due', '', CASE WHEN "+open+" THEN 'leaf:' || @cert || ':' || @agent ELSE NULL END, @shard, i, i, CASE WHEN "+open+" THEN NULL ELSE i END",
			jobsEach*n, "(i % "+fmt.Sprint(n)+")"),
	}
}

// settled is the first row that is Pending.
func (b big) settled() int { return b.rows - b.rows/100 }

// agentOf: agent 0 holds six of ten certificates, the rest is spread over a thousand.
func (b big) agentOf(i string) string {
	return fmt.Sprintf("CASE WHEN %s < 6 THEN 0 ELSE 1 + (%s) %% 1000 END", spread(i, 32452843, 10), i)
}

// spread maps i to 0 … m-1, a little differently in each thousand.
func spread(i string, by, m int) string {
	return fmt.Sprintf("((%s * %d + %s / 1000 * 13) %% %d)", i, by, i, m)
}

// one reads a number.
func (b big) one(t testing.TB, query string, args ...any) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var n int
	if err := b.db.QueryRowContext(ctx, query, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

// bigCertificates is a filter of each declared listing, and bigJobs of each of jobs, that most rows pass.
func bigCertificates(l domain.Listing) domain.CertificateFilter {
	f := domain.CertificateFilter{Sort: string(l.Order)}
	for _, filter := range l.Filters {
		switch filter {
		case "status":
			f.Status = domain.CertificateActive
		case "issuer_id":
			f.IssuerID = bigIssuer
		case "profile_id":
			f.ProfileID = bigProfile
		case "owner":
			f.Owner = bigOwner
		case "agent_id":
			f.AgentID = bigID("agt", 0)
		case "name_prefix":
			f.NamePrefix = "svc-"
		case "expires":
			f.ExpiresAfter, f.ExpiresBefore = Start.Add(5*24*time.Hour), Start.Add(80*24*time.Hour)
		default:
			panic("no value to filter by " + filter)
		}
	}
	return f
}

func bigJobs(b big, l domain.Listing) domain.JobFilter {
	var f domain.JobFilter
	for _, filter := range l.Filters {
		switch filter {
		case "state":
			f.State = domain.JobCompleted
		case "certificate_id":
			f.CertificateID = bigID("cert", b.rows-1)
		case "agent_id":
			f.AgentID = bigID("agt", 0)
		case "open":
			f.Open = true
		default:
			panic("no value to filter by " + filter)
		}
	}
	return f
}
