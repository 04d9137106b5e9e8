package main

import "regexp"

// rule is one line of the deny list. It is matched against plain(sql), in upper and lower case alike.
type rule struct {
	pattern *regexp.Regexp
	// except is the form of the whole text that is allowed all the same; nil: none.
	except *regexp.Regexp
	reason string
}

// denyList: what CockroachDB lacks or fakes, what SQLite lacks, and what the house forbids. An exception is a change of
// this list, with its reason.
func denyList() []rule {
	list := []struct{ pattern, reason string }{
		{`\bPG_(TRY_)?ADVISORY_`, "advisory locks lock nothing on CockroachDB: use a fence row"},
		{`^(LISTEN|UNLISTEN|NOTIFY)\b|\bPG_NOTIFY\b`, "LISTEN/NOTIFY do not exist on CockroachDB: wake nodes over the node link"},
		{`^LOCK\b|\bLOCK TABLE\b`, "LOCK TABLE does not exist on CockroachDB: lock rows by writing them"},
		{`\bTRIGGER\b`, "triggers hide writes and differ between the engines: write in the method's transaction"},
		{`^DO\b`, "DO blocks are procedures: write Go"},
		{`\bRULE\b`, "rules do not exist on CockroachDB"},
		{`\b(CTID|XMIN|XMAX|ROWID)\b`, "system columns are the engine's own business: use keys"},
		{`\b(BIG|SMALL)SERIAL\b|([(,] ?|\bADD COLUMN )[A-Z0-9_"]+ SERIAL[248]?\b|\bSEQUENCE\b|\bNEXTVAL\b|\bAUTOINCREMENT\b|\bAS IDENTITY\b|\bUNIQUE_ROWID\b`,
			"counted keys commit out of order and make hot ranges: ids are made in Go"},
		{`\bTEMP(ORARY)?\s+(TABLE|VIEW|SEQUENCE)\b`, "temporary tables are not portable"},
		{`\bSKIP LOCKED\b`, "tables are a journal, not a queue: SKIP LOCKED claims convoy on CockroachDB"},
		{`\b(SELECT|RETURNING)( DISTINCT| ALL)? ([A-Z_]+\.)?\*|, ?([A-Z_]+\.)?\*`, "write the columns out: a new column must not change an old statement"},
		{`\bDEFERRABLE\b|\bINITIALLY DEFERRED\b|\bSET CONSTRAINTS\b`, "deferrable constraints do not exist on CockroachDB"},
		{`\bALTER( COLUMN)? [A-Z_"]+ (SET DATA )?TYPE\b`, "ALTER COLUMN TYPE does not run in a transaction on CockroachDB: add a column"},
		{`\bUSING HASH\b`, "hash-sharded indexes have their own DDL: lead with an owner or shard column"},
		{`\bUNLOGGED\b|\bCREATE EXTENSION\b|^COPY\b|^DECLARE\b|^VACUUM\b|^MERGE\b|\bCREATE DOMAIN\b|\bINHERITS\b`, "not portable to CockroachDB"},
		{`\b(NOW|CLOCK_TIMESTAMP|STATEMENT_TIMESTAMP|TRANSACTION_TIMESTAMP|STRFTIME|UNIXEPOCH|RANDOM|GEN_RANDOM_UUID)\(|\bCURRENT_(TIMESTAMP|DATE|TIME)\b`,
			"no clock and no randomness inside a transaction: both are arguments, made in Go"},
		{`^CREATE TABLE\b.* TIMESTAMP(TZ)?\b`, "times are BIGINT microseconds: SQLite returns a TIMESTAMPTZ as an unsortable string"},
		{`^INSERT OR\b|^REPLACE\b|^UPSERT\b`, "one engine's own spelling: write INSERT … ON CONFLICT"},
	}
	rules := make([]rule, 0, len(list)+1)
	for _, l := range list {
		rules = append(rules, rule{pattern: regexp.MustCompile(`(?i)` + l.pattern), reason: l.reason, except: serverClock})
	}
	return append(rules, rule{
		pattern: regexp.MustCompile(`(?i)\bFOR (NO KEY )?(UPDATE|SHARE|KEY SHARE)\b`),
		// The store sends it to servers only: SQLite has one writer, and a write that changes nothing costs a row version.
		except: regexp.MustCompile(`^SELECT certificate\.id FROM certificate WHERE certificate\.id IN\b[^;]*ORDER BY certificate\.id FOR UPDATE$|^ ?ORDER BY certificate\.id FOR UPDATE$`),
		reason: "a syntax error on SQLite: check the fence by a write",
	})
}

// forbidden returns the reasons against sql, one for every rule it breaks.
func forbidden(sql string) []string {
	var reasons []string
	text := plain(sql)
	for _, r := range denyList() {
		if found := r.pattern.FindString(text); found != "" && (r.except == nil || !r.except.MatchString(text)) {
			reasons = append(reasons, found+": "+r.reason)
		}
	}
	return reasons
}

// serverClock is the one question about the time: a node that joins compares its own clock with what the database says.
var serverClock = regexp.MustCompile(`^SELECT CAST\(EXTRACT\(EPOCH FROM clock_timestamp\(\)\) \* 1000000 AS BIGINT\)$`)
