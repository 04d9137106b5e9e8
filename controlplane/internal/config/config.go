// Package config is the control plane's configuration: one typed struct, filled from defaults, then a YAML file, then
// the environment, then flags. Unknown keys are refused by name, every problem is reported at once, and the origin of
// every value can be shown (`certmeshd config`). The reference page is made from the same struct (Reference).
package config

import (
	"encoding"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Config is everything an operator may set. Tags: yaml is the key in the file, env the environment variable, default
// the value when nothing is said, doc the sentence of the reference page; secret:"true" hides the value when printed.
type Config struct {
	Node      Node      `yaml:"node"`
	Listen    Listen    `yaml:"listen"`
	Store     Store     `yaml:"store"`
	Secrets   Secrets   `yaml:"secrets"`
	Mesh      Mesh      `yaml:"mesh"`
	Cluster   Cluster   `yaml:"cluster"`
	API       API       `yaml:"api"`
	PKI       PKI       `yaml:"pki"`
	Scheduler Scheduler `yaml:"scheduler"`
	Jobs      Jobs      `yaml:"jobs"`
	Log       Log       `yaml:"log"`
}

// Node is this process.
type Node struct {
	ID      string   `yaml:"id" env:"CERTMESH_NODE_ID" doc:"Name of this node, unique in the cluster; letters, digits, dash and dot. Empty: the host's name."`
	DataDir string   `yaml:"data_dir" env:"CERTMESH_DATA_DIR" default:"/var/lib/certmesh" doc:"Directory for what belongs to this node alone, mode 0700."`
	Names   []string `yaml:"names" env:"CERTMESH_NODE_NAMES" doc:"DNS names and IP addresses under which agents and operators reach this node; they go into its certificate. Empty: the host's name, localhost and the loopback addresses."`
}

// Listen are the listeners of section Processes and ports in docs/architecture.md.
type Listen struct {
	API   string `yaml:"api" env:"CERTMESH_LISTEN_API" default:":8443" doc:"host:port for /health, /ready and /metrics over TLS."`
	GRPC  string `yaml:"grpc" env:"CERTMESH_LISTEN_GRPC" default:":8442" doc:"host:port for operators over gRPC."`
	Mesh  string `yaml:"mesh" env:"CERTMESH_LISTEN_MESH" default:":8444" doc:"host:port for agents."`
	Raft  string `yaml:"raft" env:"CERTMESH_LISTEN_RAFT" default:":8445" doc:"host:port for the other nodes' Raft."`
	PKI   string `yaml:"pki" env:"CERTMESH_LISTEN_PKI" default:":8080" doc:"host:port for CRLs and CA certificates, plain HTTP as RFC 5280 section 8 advises."`
	Debug string `yaml:"debug" env:"CERTMESH_LISTEN_DEBUG" doc:"host:port of a loopback address for profiles (/debug/pprof), which anybody on this host may then read. Empty: off."`
}

// Store is where the truth lies.
type Store struct {
	DSN        string `yaml:"dsn" env:"CERTMESH_STORE_DSN" secret:"true" doc:"sqlite:/path/file.db, postgres://… or cockroach://…. Empty: a SQLite file in the data directory."`
	MaxReaders int    `yaml:"max_readers" env:"CERTMESH_STORE_MAX_READERS" default:"4" doc:"Connections for reading, 1 to 64."`
	Migrate    bool   `yaml:"migrate" env:"CERTMESH_STORE_MIGRATE" default:"true" doc:"Bring the schema up to date at start. Switch it off to run certmeshd migrate up yourself."`
}

// Secrets seal private keys in the database.
type Secrets struct {
	KEKFile string `yaml:"kek_file" env:"CERTMESH_SECRETS_KEK_FILE" doc:"File with the key-encryption key (32 bytes, base64), mode 0600, the same on every node. Required by serve; dev makes one beside its data. Without it nothing sealed can be opened again: back it up apart from the database."`
}

// Mesh is the trust between agents and nodes.
type Mesh struct {
	TrustDomain string        `yaml:"trust_domain" env:"CERTMESH_TRUST_DOMAIN" default:"certmesh.local" doc:"Trust domain of the SPIFFE ids. It cannot change once agents have joined."`
	IdentityTTL time.Duration `yaml:"identity_ttl" env:"CERTMESH_IDENTITY_TTL" default:"168h" doc:"Validity of agents' and nodes' identities, 1m to 2160h; they are renewed at half of it."`
	Handshakes  int           `yaml:"handshakes" env:"CERTMESH_MESH_HANDSHAKES" default:"64" doc:"Hellos and enrolments that are worked on at the same time; more Hellos wait, more enrolments are asked to come back."`
}

// Cluster is how nodes find each other; see docs/cluster.md.
type Cluster struct {
	Join            []string      `yaml:"join" env:"CERTMESH_CLUSTER_JOIN" doc:"host:port of the mesh listeners of some nodes, this one may be among them; the same list on every node. Empty: a cluster of one."`
	BootstrapExpect int           `yaml:"bootstrap_expect" env:"CERTMESH_CLUSTER_BOOTSTRAP_EXPECT" default:"1" doc:"How many nodes begin a new cluster together: 1, 3, 5 or 7. It counts where none of them belongs to one yet, and may stay as it is for ever."`
	Token           string        `yaml:"token" env:"CERTMESH_CLUSTER_TOKEN" secret:"true" doc:"Token of certmeshd cluster token create. It counts at the node's first start alone."`
	TokenFile       string        `yaml:"token_file" env:"CERTMESH_CLUSTER_TOKEN_FILE" doc:"File that holds the token, instead of cluster.token."`
	MeshAddress     string        `yaml:"mesh_address" env:"CERTMESH_CLUSTER_MESH_ADDRESS" doc:"host:port under which agents and other nodes reach the mesh listener. Empty: the first of node.names and the port of listen.mesh."`
	RaftAddress     string        `yaml:"raft_address" env:"CERTMESH_CLUSTER_RAFT_ADDRESS" doc:"host:port under which other nodes reach the raft listener. Empty: the first of node.names and the port of listen.raft."`
	ReapAfter       time.Duration `yaml:"reap_after" env:"CERTMESH_CLUSTER_REAP_AFTER" default:"24h" doc:"How long a member may be dead before it loses its vote; never below three voters."`
	MaxClockSkew    time.Duration `yaml:"max_clock_skew" env:"CERTMESH_CLUSTER_MAX_CLOCK_SKEW" default:"1m" doc:"How far a node's clock may be off when it joins."`
}

// API is what operators may ask of a node at the same time.
type API struct {
	Changes        int `yaml:"changes" env:"CERTMESH_API_CHANGES" default:"256" doc:"Calls that change something (orders, renewals, revocations and the like) that are worked on at the same time, 1 to 10000; more wait, and API keys take turns. Reads are not counted."`
	ChangesWaiting int `yaml:"changes_waiting" env:"CERTMESH_API_CHANGES_WAITING" default:"2000" doc:"Such calls that may wait, 0 to 100000, a quarter of them of one API key; each costs some 20 KiB. Calls beyond it are refused with RESOURCE_EXHAUSTED and told when to come back."`
}

// PKI is what relying parties see of our own CAs.
type PKI struct {
	PublicURL   string        `yaml:"public_url" env:"CERTMESH_PKI_PUBLIC_URL" doc:"Base of the CRL and CA URLs in certificates, e.g. http://pki.example.com. Required by serve; dev uses its own pki listener."`
	CRLValidity time.Duration `yaml:"crl_validity" env:"CERTMESH_CRL_VALIDITY" default:"24h" doc:"From thisUpdate to nextUpdate."`
}

// Scheduler are the duties' intervals.
type Scheduler struct {
	RenewalCheckInterval     time.Duration `yaml:"renewal_check_interval" env:"CERTMESH_SCHEDULER_RENEWAL_CHECK_INTERVAL" default:"1h" doc:"Longest pause between two looks for leaves that are due; the next due time shortens it."`
	JobProcessorInterval     time.Duration `yaml:"job_processor_interval" env:"CERTMESH_SCHEDULER_JOB_PROCESSOR_INTERVAL" default:"30s" doc:"Safety net under wake-ups: agents with open jobs are woken this often."`
	RetryInterval            time.Duration `yaml:"retry_interval" env:"CERTMESH_SCHEDULER_RETRY_INTERVAL" default:"5m" doc:"Longest pause between two looks for placements that do not hold what is wanted."`
	JobTimeoutInterval       time.Duration `yaml:"job_timeout_interval" env:"CERTMESH_JOB_TIMEOUT_INTERVAL" default:"10m" doc:"How often jobs that stand still are looked for."`
	AgentHealthCheckInterval time.Duration `yaml:"agent_health_check_interval" env:"CERTMESH_SCHEDULER_AGENT_HEALTH_CHECK_INTERVAL" default:"2m" doc:"How often silent agents are looked for."`
	ShortLivedExpiryInterval time.Duration `yaml:"short_lived_expiry_check_interval" env:"CERTMESH_SHORT_LIVED_EXPIRY_CHECK_INTERVAL" default:"30s" doc:"How often statuses that change by time alone are moved."`
	CRLGenerationInterval    time.Duration `yaml:"crl_generation_interval" env:"CERTMESH_CRL_GENERATION_INTERVAL" default:"1h" doc:"How often CRLs are rebuilt; a revocation rebuilds at once."`
	RetentionInterval        time.Duration `yaml:"retention_interval" env:"CERTMESH_RETENTION_INTERVAL" default:"1h" doc:"How often old rows are dropped."`
}

// Jobs bound the work.
type Jobs struct {
	RenewalConcurrency      int           `yaml:"renewal_concurrency" env:"CERTMESH_RENEWAL_CONCURRENCY" default:"25" doc:"Calls in flight toward one external issuer; 0 or less counts as 1. Our own CAs take none."`
	PermitLease             time.Duration `yaml:"permit_lease" env:"CERTMESH_PERMIT_LEASE" default:"30s" doc:"How long permits toward an external issuer are leased to a node, the same on every node. One call takes at most two fifths of it; after a change of the leader such calls pause for about as long."`
	AwaitingCSRTimeout      time.Duration `yaml:"awaiting_csr_timeout" env:"CERTMESH_JOB_AWAITING_CSR_TIMEOUT" default:"24h" doc:"How long a job may wait for a CSR while its agent is online."`
	AwaitingApprovalTimeout time.Duration `yaml:"awaiting_approval_timeout" env:"CERTMESH_JOB_AWAITING_APPROVAL_TIMEOUT" default:"168h" doc:"How long a job may wait for an operator."`
	RunningTimeout          time.Duration `yaml:"running_timeout" env:"CERTMESH_JOB_RUNNING_TIMEOUT" default:"30m" doc:"How long an accepted job may run without a result while its agent is online."`
	VerifyTimeout           time.Duration `yaml:"verify_timeout" env:"CERTMESH_VERIFY_TIMEOUT" default:"5s" doc:"How long a deployment is verified before it counts as failed and is rolled back."`
	VerifyInterval          time.Duration `yaml:"verify_interval" env:"CERTMESH_VERIFY_INTERVAL" default:"1h" doc:"How often agents look by themselves whether their targets still hold and serve what was deployed there; 0: never."`
	Keep                    time.Duration `yaml:"keep" env:"CERTMESH_JOB_RETENTION" default:"720h" doc:"How long finished jobs are kept."`
	AgentStale              time.Duration `yaml:"agent_stale" env:"CERTMESH_AGENT_STALE" default:"2m" doc:"Silence after which an agent is Stale."`
	AgentOffline            time.Duration `yaml:"agent_offline" env:"CERTMESH_AGENT_OFFLINE" default:"5m" doc:"Silence after which an agent is Offline."`
	ShutdownTimeout         time.Duration `yaml:"shutdown_timeout" env:"CERTMESH_SHUTDOWN_TIMEOUT" default:"30s" doc:"Budget of a graceful stop."`
}

// Log is what is written to standard error.
type Log struct {
	Level  string `yaml:"level" env:"CERTMESH_LOG_LEVEL" default:"info" doc:"debug, info, warn or error."`
	Format string `yaml:"format" env:"CERTMESH_LOG_FORMAT" default:"json" doc:"json or text."`
}

// Origin says where a value came from.
type Origin string

// The origins, weakest first.
const (
	FromDefault Origin = "default"
	FromFile    Origin = "file"
	FromEnv     Origin = "environment"
	FromFlag    Origin = "flag"
)

// Value is one effective setting. Text is "(set)" for secrets.
type Value struct {
	Key, Env, Text, Doc, Default string
	Origin                       Origin
}

// Loaded is a configuration with its origins.
type Loaded struct {
	Config Config
	values []Value
}

// Values lists every setting in the struct's order.
func (l *Loaded) Values() []Value { return l.values }

// Refresh takes over what was changed in Config since it was loaded, for Values to show. Origins stay: what a program
// derives where nothing was said is a default.
func (l *Loaded) Refresh() {
	i := 0
	walk(reflect.ValueOf(&l.Config).Elem(), "", func(_ string, f reflect.StructField, v reflect.Value) {
		l.values[i].Text = shown(f, textOf(v))
		i++
	})
}

// Sources are what Load reads. Getenv is os.Getenv-like; Flags maps keys ("listen.grpc") to what flags said.
type Sources struct {
	File string
	// Defaults overrule the struct's defaults, by key.
	Defaults map[string]string
	Getenv   func(string) (string, bool)
	Flags    map[string]string
}

// Load fills a Config. The error joins every problem found, each naming the key and where the value came from.
func Load(src Sources) (*Loaded, error) {
	l := &Loaded{}
	var fileKeys map[string]bool
	var problems []error
	if src.File != "" {
		b, err := os.ReadFile(src.File)
		if err != nil {
			return nil, fault.Wrap(fault.Invalid, err, "cannot read the configuration file")
		}
		fileKeys, problems = readFile(filepath.Base(src.File), b, &l.Config)
	}
	known := map[string]bool{}
	walk(reflect.ValueOf(&l.Config).Elem(), "", func(key string, f reflect.StructField, v reflect.Value) {
		known[key] = true
		origin := FromDefault
		set := func(text string, from Origin) {
			if err := setValue(v, text); err != nil {
				problems = append(problems, fault.InvalidField(key, "%s (from %s): %s", strconv.Quote(shown(f, text)), from, err))
			}
			origin = from
		}
		if fileKeys[key] {
			origin = FromFile
		} else if d, ok := src.Defaults[key]; ok {
			set(d, FromDefault)
		} else if d := f.Tag.Get("default"); d != "" {
			set(d, FromDefault)
		}
		if name := f.Tag.Get("env"); name != "" && src.Getenv != nil {
			if text, ok := src.Getenv(name); ok {
				set(text, FromEnv)
			}
		}
		if text, ok := src.Flags[key]; ok {
			set(text, FromFlag)
		}
		l.values = append(l.values, Value{Key: key, Env: f.Tag.Get("env"), Text: shown(f, textOf(v)), Doc: f.Tag.Get("doc"),
			Default: f.Tag.Get("default"), Origin: origin})
	})
	for key := range src.Flags {
		if !known[key] {
			problems = append(problems, fault.InvalidField(key, "no such setting; `certmeshd config` lists them all"))
		}
	}
	problems = append(problems, l.Config.problems()...)
	return l, errors.Join(problems...)
}

// Reference lists all settings with their defaults, for the reference page.
func Reference() []Value {
	var out []Value
	walk(reflect.ValueOf(&Config{}).Elem(), "", func(key string, f reflect.StructField, _ reflect.Value) {
		out = append(out, Value{Key: key, Env: f.Tag.Get("env"), Default: f.Tag.Get("default"), Doc: f.Tag.Get("doc")})
	})
	return out
}

func (c *Cluster) problems(bad func(key, format string, args ...any)) {
	for i, a := range c.Join {
		if _, _, err := net.SplitHostPort(a); err != nil {
			bad(fmt.Sprintf("cluster.join[%d]", i), "%q is not host:port", a)
		}
	}
	for key, a := range map[string]string{"cluster.mesh_address": c.MeshAddress, "cluster.raft_address": c.RaftAddress} {
		if host, _, err := net.SplitHostPort(a); a != "" && (err != nil || host == "") {
			bad(key, "%q is not host:port", a)
		}
	}
	switch n := c.BootstrapExpect; {
	case n == 2:
		bad("cluster.bootstrap_expect", "two voters stand still as soon as one of them is away: use 1 or 3")
	case n < 1 || n > 7 || n%2 == 0:
		bad("cluster.bootstrap_expect", "%d is not 1, 3, 5 or 7", n)
	case n > 1 && len(c.Join) == 0:
		bad("cluster.bootstrap_expect", "%d nodes can begin together only if cluster.join names them", n)
	}
	if c.Token != "" && c.TokenFile != "" {
		bad("cluster.token_file", "set this or cluster.token, not both")
	}
}

// minIdentityTTL is the shortest validity that the CA signs; values of minutes are for trying out what happens when
// identities expire.
const minIdentityTTL = time.Minute

func (c *Config) problems() []error {
	var out []error
	bad := func(key, format string, args ...any) { out = append(out, fault.InvalidField(key, format, args...)) }
	for key, addr := range map[string]string{"listen.api": c.Listen.API, "listen.grpc": c.Listen.GRPC,
		"listen.mesh": c.Listen.Mesh, "listen.raft": c.Listen.Raft, "listen.pki": c.Listen.PKI} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			bad(key, "%q is not host:port", addr)
		}
	}
	if c.Listen.Debug != "" {
		host, _, err := net.SplitHostPort(c.Listen.Debug)
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
			bad("listen.debug", "%q is not a loopback address with a port, such as 127.0.0.1:6060; profiles show what a process works on", c.Listen.Debug)
		}
	}
	if c.Node.ID != "" && strings.Trim(strings.ToLower(c.Node.ID), "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
		bad("node.id", "%q may hold letters, digits, dash and dot only", c.Node.ID)
	}
	if d := strings.ToLower(c.Mesh.TrustDomain); d == "" || strings.Trim(d, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		bad("mesh.trust_domain", "%q is not a SPIFFE trust domain: use lower-case letters, digits, dash, dot, underscore", c.Mesh.TrustDomain)
	}
	if c.Mesh.IdentityTTL < minIdentityTTL || c.Mesh.IdentityTTL > 90*24*time.Hour {
		bad("mesh.identity_ttl", "%s is not between 1m and 2160h", c.Mesh.IdentityTTL)
	}
	if c.Mesh.Handshakes < 1 {
		bad("mesh.handshakes", "must be 1 or more")
	}
	c.Cluster.problems(bad)
	if c.API.Changes < 1 || c.API.Changes > 10_000 {
		bad("api.changes", "%d is not between 1 and 10000", c.API.Changes)
	}
	if c.API.ChangesWaiting < 0 || c.API.ChangesWaiting > 100_000 {
		bad("api.changes_waiting", "%d is not between 0 and 100000", c.API.ChangesWaiting)
	}
	if c.Store.MaxReaders < 1 || c.Store.MaxReaders > 64 {
		bad("store.max_readers", "%d is not between 1 and 64", c.Store.MaxReaders)
	}
	if c.PKI.PublicURL != "" {
		u, err := url.Parse(c.PKI.PublicURL)
		if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || u.RawQuery != "" || u.Fragment != "" {
			bad("pki.public_url", "%q is not an http URL such as http://pki.example.com", c.PKI.PublicURL)
		}
	}
	walk(reflect.ValueOf(c).Elem(), "", func(key string, _ reflect.StructField, v reflect.Value) {
		// Zero stands for never where that is possible at all.
		if d, ok := reflect.TypeAssert[time.Duration](v); ok && (d < 0 || d == 0 && key != "jobs.verify_interval") {
			bad(key, "must be above zero")
		}
	})
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		bad("log.level", "%q is not debug, info, warn or error", c.Log.Level)
	}
	if c.Log.Format != "json" && c.Log.Format != "text" {
		bad("log.format", "%q is not json or text", c.Log.Format)
	}
	return out
}

func walk(v reflect.Value, prefix string, each func(key string, f reflect.StructField, v reflect.Value)) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		key := f.Tag.Get("yaml")
		if prefix != "" {
			key = prefix + "." + key
		}
		if f.Type.Kind() == reflect.Struct {
			walk(v.Field(i), key, each)
			continue
		}
		each(key, f, v.Field(i))
	}
}

func setValue(v reflect.Value, text string) error {
	switch p := v.Addr().Interface().(type) {
	case *string:
		*p = text
	case *bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("is not true or false")
		}
		*p = b
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return errors.New("is not a whole number")
		}
		*p = n
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return errors.New("is not a duration such as 30s or 1h")
		}
		*p = d
	case *[]string:
		*p = nil
		for s := range strings.SplitSeq(text, ",") {
			if s = strings.TrimSpace(s); s != "" {
				*p = append(*p, s)
			}
		}
	case encoding.TextUnmarshaler:
		return p.UnmarshalText([]byte(text))
	default:
		return fmt.Errorf("has a type (%s) that cannot be set", v.Type())
	}
	return nil
}

func textOf(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case []string:
		return strings.Join(x, ",")
	case time.Duration:
		return x.String()
	default:
		return fmt.Sprint(x)
	}
}

func shown(f reflect.StructField, text string) string {
	if f.Tag.Get("secret") == "true" && text != "" {
		return "(set)"
	}
	return text
}
