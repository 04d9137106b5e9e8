package main

import "fmt"

// suite is one invocation of go test.
type suite struct {
	title string
	pkg   string
	bench string   // regexp of -bench
	args  []string // further arguments of go test in run
	// short is the environment in which run fits into ten minutes; with -full it is left out.
	short []string
	// turns are the arguments in compare; nil: not compared. minute: also in the short form.
	turns  []string
	minute bool
	// figures are shown with what was promised; all other metrics are listed as they are.
	figures []figure
}

// figure is one promise.
type figure struct {
	what  string
	bench string // full name without the processors' suffix
	unit  string
	bar   string
	limit limit
}

// limit computes the physical limit of a figure from the results of the same run; ok is false when they are missing.
type limit func(r results) (text string, ok bool)

// suites lists all, in the order in which they run.
var suites = []suite{
	{
		title: "The parts of an issuance",
		pkg:   "./controlplane/internal/ca", bench: "BenchmarkCheckCSR|BenchmarkPrepare$|BenchmarkSignFromIntent",
		args: []string{"-benchtime=1s"}, turns: []string{"-benchtime=0.3s"}, minute: true,
		figures: []figure{
			{what: "CSR parsed, verified and compared with the order", bench: "CheckCSR", unit: "ns/op", bar: "81 µs"},
			{what: "to-be-signed bytes built and linted", bench: "Prepare", unit: "ns/op", bar: "130 µs for the lint"},
			{what: "signed, and the signature verified", bench: "SignFromIntent", unit: "ns/op", bar: "33 + 80 µs"},
		},
	},
	{
		title: "Issuance",
		pkg:   "./controlplane/node", bench: "BenchmarkIssue$",
		args: []string{"-benchtime=10000x"}, turns: []string{"-benchtime=2000x"}, minute: true,
		figures: []figure{
			{what: "CSR → checked, linted, intent, signed, verified, recorded; SQLite", bench: "Issue/sqlite", unit: "issued/s", bar: "≥ 1,500/s", limit: issueLimit("sqlite")},
			{what: "the same, PostgreSQL on the same cores", bench: "Issue/postgres", unit: "issued/s", bar: "≥ 2,000/s", limit: issueLimit("postgres")},
		},
	},
	{
		title: "The store alone",
		pkg:   "./controlplane/internal/store/storetest", bench: "BenchmarkIssueStore",
		args: []string{"-benchtime=4000x"}, turns: []string{"-benchtime=1000x"},
	},
	{
		title: "Latency, bursts and footprint",
		pkg:   "./e2e/bench/renewals", bench: ".",
		args: []string{"-benchtime=1x", "-timeout=10m"},
		figures: []figure{
			{what: "renew → deployed, verified and recorded, one by one; file target, the middle", bench: "Renewal/file", unit: "p50-ms", bar: "< 50 ms"},
			{what: "the same, the slowest of a hundred", bench: "Renewal/file", unit: "p99-ms", bar: "< 250 ms"},
			{what: "the same at an nginx, the middle", bench: "Renewal/nginx", unit: "p50-ms", bar: "< 150 ms", limit: reloadLimit},
			{what: "1,000 renewals of one agent at once, file targets", bench: "Renewal/burst-file", unit: "s", bar: "< 3 s"},
			{what: "1,000 renewals at once at one nginx: its reloads", bench: "Renewal/burst-nginx", unit: "reloads", bar: "≤ 20"},
			{what: "agent binary, stripped", bench: "Footprint", unit: "agent-MB", bar: "< 30 MB"},
			{what: "agent, resident while idle", bench: "Footprint", unit: "agent-MiB", bar: "< 30 MiB"},
			{what: "server with SQLite, resident while idle", bench: "Footprint", unit: "server-MiB", bar: "< 60 MiB"},
			{what: "server, start to ready on an existing database", bench: "Footprint", unit: "ready-ms", bar: "< 300 ms"},
		},
	},
	{
		title: "Fairness and overload",
		pkg:   "./controlplane/node", bench: "BenchmarkBurst|BenchmarkOverload|BenchmarkMalformed",
		args: []string{"-benchtime=1x", "-timeout=10m"}, short: []string{"CERTMESH_BURST=1000"},
		figures: []figure{
			{what: "another owner's renewal beside a burst of orders, the slowest; SQLite", bench: "Burst/sqlite", unit: "max-ms", bar: "< 1,000 ms"},
			{what: "the same, PostgreSQL", bench: "Burst/postgres", unit: "max-ms", bar: "< 1,000 ms"},
			{what: "issuance beside malformed requests at full rate, to without; SQLite", bench: "Malformed/sqlite", unit: "ratio", bar: "≥ 0.8"},
			{what: "the same, PostgreSQL", bench: "Malformed/postgres", unit: "ratio", bar: "≥ 0.8"},
		},
	},
	{
		title: "Streams",
		pkg:   "./e2e/bench/streams", bench: "BenchmarkStreams",
		args: []string{"-benchtime=1x", "-timeout=20m"}, short: []string{"STREAMS_AGENTS=2000"},
		figures: []figure{
			{what: "memory of a node for each idle agent, in use", bench: "Streams", unit: "node-B/agent", bar: "≤ bare + 12,288 B", limit: bareLimit("bare-B/stream")},
			{what: "the same, resident", bench: "Streams", unit: "node-rss-B/agent", bar: "≤ bare + 12,288 B", limit: bareLimit("bare-rss-B/stream")},
			{what: "one core while all are idle", bench: "Streams", unit: "idle-cpu-%", bar: "< 5 % with 10,000"},
			{what: "all back after the server's restart", bench: "Streams", unit: "back-s", bar: "< 20 s with 10,000"},
			{what: "a command to all, the last acknowledgement", bench: "Streams", unit: "ack-s", bar: "< 5 s with 10,000"},
			{what: "a command beside agents that misbehave, to without", bench: "Streams", unit: "disturbed-ratio", bar: "≤ 1.2"},
		},
	},
	{
		title: "Big tables",
		pkg:   "./controlplane/internal/store/storetest", bench: "BenchmarkBigTables",
		args: []string{"-benchtime=1x", "-timeout=30m"}, short: []string{"CERTMESH_BIG_ROWS=30000"},
		figures: bigFigures("sqlite", "postgres"),
	},
	{
		title: "Three nodes, one database",
		pkg:   "./controlplane/node", bench: "BenchmarkIssueNodes",
		args: []string{"-benchtime=1x", "-timeout=10m"},
		figures: []figure{
			{what: "issuance by three nodes on the same cores, to one", bench: "IssueNodes/postgres", unit: "ratio", bar: "≥ 0.75"},
		},
	},
	{
		title: "Cluster",
		pkg:   "./e2e/bench/cluster", bench: "BenchmarkCluster",
		args: []string{"-benchtime=1x", "-timeout=30m"}, short: []string{"CLUSTER_KILLS=5", "CLUSTER_STREAMS=1000", "CLUSTER_AGENTS=300"},
		figures: []figure{
			{what: "`kill -9` of the leader → another leads, the middle", bench: "Cluster/failover", unit: "leads-p50-ms", bar: "< 3,000 ms, aim 1,000 ms"},
			{what: "the same → all duties taken, the middle", bench: "Cluster/failover", unit: "duties-p50-ms", bar: "< 3,000 ms, aim 1,000 ms"},
			{what: "streams of a dead node, all with other nodes", bench: "Cluster/reattach", unit: "back-s", bar: "< 10 s with 3,000"},
			{what: "renewals of agents by three nodes on the same cores, to one", bench: "Cluster/rate", unit: "ratio", bar: "≥ 0.75"},
			{what: "a wake-up through another node adds, the middle", bench: "Cluster/wake", unit: "added-p50-ms", bar: "< 5 ms"},
			{what: "entries in Raft's log in an idle hour", bench: "Cluster/costs", unit: "raft-entries/hour", bar: "0"},
		},
	},
}

// reloadLimit is what nginx itself takes to validate and load its configuration.
func reloadLimit(r results) (string, bool) {
	test, ok := r.median("Renewal/nginx", "nginx-test-ms")
	if !ok {
		return "", false
	}
	reload, ok := r.median("Renewal/nginx", "nginx-reload-ms")
	return fmt.Sprintf("%.0f ms for `nginx -t` and `nginx -s reload`", test+reload), ok
}

// issueLimit is what the processors would give if nothing were lost between the parts: the cryptography and the lint, which
// no store saves.
func issueLimit(engine string) limit {
	return func(r results) (string, bool) {
		var ns float64
		for _, part := range []string{"CheckCSR", "Prepare", "SignFromIntent"} {
			v, ok := r.median(part, "ns/op")
			if !ok {
				return "", false
			}
			ns += v
		}
		cores := float64(r.cores)
		text := fmt.Sprintf("%.0f/s with a store that costs nothing (%.0f µs of cryptography and lint, %d cores)", cores*1e9/ns, ns/1000, r.cores)
		own, ok := r.median("Issue/"+engine, "cpu-µs/op")
		if !ok {
			return text, true
		}
		total := own
		if db, ok := r.median("Issue/"+engine, "db-cpu-µs/op"); ok {
			total += db
		}
		return text + fmt.Sprintf("; %.0f/s with the %.0f µs of processor that each takes here, database included", cores*1e6/total, total), true
	}
}

// bareLimit is what a bare grpc-go server took for a stream in the same run.
func bareLimit(unit string) limit {
	return func(r results) (string, bool) {
		v, ok := r.median("Streams", unit)
		return fmt.Sprintf("%.0f B for a bare grpc-go stream", v), ok
	}
}

// bigFigures are what is promised of large tables on each engine.
func bigFigures(engines ...string) []figure {
	var all []figure
	for _, e := range engines {
		for _, f := range []figure{
			{what: "pages of every list, the slowest p50", unit: "list-worst-p50-ms", bar: "< 5 ms"},
			{what: "pages of every list, the slowest p99", unit: "list-worst-p99-ms", bar: "< 10 ms"},
			{what: "a page at full size, to one of 1,000 rows", unit: "list-median-ratio", bar: "1"},
			{what: "a batch of 1,000 due renewals found", unit: "due-p50-ms", bar: "< 20 ms"},
			{what: "the counts of the estate", unit: "counts-p50-ms", bar: "< 50 ms"},
		} {
			f.what, f.bench = f.what+"; "+e, "BigTables/"+e
			all = append(all, f)
		}
	}
	return all
}
