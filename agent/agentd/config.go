// Package agentd is the door of the agent: Run joins the mesh, keeps one stream to the control plane and does the work
// that comes down it. Nothing in it is global, so that one process may run many agents.
//
// The order at start is fixed: lock the data directory, settle what a crash left at targets (before anything else), read
// the identity or enrol, connect. What the stream says and when to connect where are decided in agent/internal; this
// package wires them.
package agentd

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"unicode"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/identity"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/agent/internal/stream"
	"github.com/certmesh/certmesh/connectors/catalog/onhost"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Backoff bounds the delays between connections.
type Backoff = stream.Backoff

// DialFunc opens the transport connection to addr (host:port).
type DialFunc = stream.DialFunc

// Config of an agent. Servers and a place for its data (DataDir, or Memory or InMemory) are required.
type Config struct {
	// Servers are mesh addresses of control-plane nodes, host:port.
	Servers []string
	// DataDir holds identity, journal and states; made with mode 0700.
	DataDir string
	// KeyDir holds the keys of managed certificates; empty: "keys" in DataDir.
	KeyDir string
	// Name is what operators will see, given once at enrolment; empty: the host's name.
	Name string
	// JoinToken is needed for enrolment only.
	JoinToken string
	// Labels are sent with every Hello.
	Labels map[string]string
	// TargetRoots are the absolute directories below which targets may be written; none allows nothing.
	TargetRoots []string
	// AllowCommands are the argument vectors that targets may have run, word for word.
	AllowCommands [][]string
	// BackupRetention is how many former versions are kept per target; 0: 3; -1: none.
	BackupRetention int
	// Version of the program; empty: "dev".
	Version string
	// Kinds are the target connectors; nil: connectors/catalog/onhost.
	Kinds []target.Kind
	// Facts describe the host; nil: they are gathered.
	Facts *agentpb.Facts
	// KeyLimit, DeployLimit and VerifyLimit are how many assignments of each class may be in work at once; 0: 16, 128 and 8.
	KeyLimit, DeployLimit, VerifyLimit int

	// InMemory keeps everything in memory; it is lost when Run returns. Memory does, and outlives Run.
	InMemory bool
	Memory   *Memory

	// Log; nil: nothing is logged.
	Log *slog.Logger
	// Clock; nil: the real one.
	Clock clockwork.Clock
	// Dial; nil: TCP, with the environment's proxy.
	Dial DialFunc
	// WrapConn, if set, is put around every connection after its TLS handshake and so sees plain text.
	WrapConn func(net.Conn) net.Conn
	// Backoff; zero: made for real fleets.
	Backoff Backoff
	// Probe makes a TLS handshake with address and says which leaf was served; nil: over TCP.
	Probe func(ctx context.Context, address, serverName string) (target.Proof, error)
	// Welcomed, if set, is called after every Welcome; it must not block.
	Welcomed func(agentID string)
	// Cut, if set, is called with a name before every message sent, after every message received, and before every
	// durable write and every step at a target, one call at a time. Once it returns an error the agent is dead:
	// nothing further is sent or written, and Run returns that error. It must not block.
	Cut func(point string) error
}

// Memory is the storage of an agent without a disk. It may be handed to one Run after another, like a data directory.
type Memory struct {
	identity, states, placed *durable.Memory
	journal                  *journal.Memory
	keys                     *keystore.Memory
	busy                     atomic.Bool
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory {
	return &Memory{durable.NewMemory(), durable.NewMemory(), durable.NewMemory(), journal.NewMemory(), keystore.NewMemory(), atomic.Bool{}}
}

const (
	defaultRetention = 3
	// A thousand renewals of sites of one service are to be no more than twenty reloads: what waits for a reload holds a place,
	// and so does what the former one made and is being verified. More keys in work at once would not be done sooner, and what
	// comes next, perhaps another owner's, would wait for all of it.
	defaultKeyLimit    = 16
	defaultDeployLimit = 128
	defaultVerifyLimit = 8
	defaultPort        = "8444"

	maxServers  = 64
	maxLabels   = 64
	maxLabel    = 63
	maxLabelVal = 255
	maxNameLen  = 253
)

// withDefaults fills in what is absent and refuses what cannot work.
func (c Config) withDefaults() (Config, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = clockwork.NewRealClock()
	}
	if c.Version == "" {
		c.Version = "dev"
	}
	if c.Kinds == nil {
		c.Kinds = onhost.Targets()
	}
	if c.Backoff == (Backoff{}) {
		c.Backoff = stream.DefaultBackoff()
	}
	if c.Probe == nil {
		c.Probe = handshake(c.Clock)
	}
	if c.BackupRetention == 0 {
		c.BackupRetention = defaultRetention
	}
	if c.KeyLimit <= 0 {
		c.KeyLimit = defaultKeyLimit
	}
	if c.DeployLimit <= 0 {
		c.DeployLimit = defaultDeployLimit
	}
	if c.VerifyLimit <= 0 {
		c.VerifyLimit = defaultVerifyLimit
	}
	if c.InMemory && c.Memory == nil {
		c.Memory = NewMemory()
	}
	if c.Memory == nil {
		if c.DataDir == "" {
			return c, fault.InvalidField("data_dir", "is empty; set CERTMESH_DATA_DIR")
		}
		if c.KeyDir == "" {
			c.KeyDir = filepath.Join(c.DataDir, "keys")
		}
	}
	return c, c.check()
}

func (c *Config) check() error {
	if len(c.Servers) == 0 || len(c.Servers) > maxServers {
		return fault.InvalidField("server_url", "names %d servers; 1 to %d are expected (CERTMESH_SERVER_URL=host:port[,host:port…])", len(c.Servers), maxServers)
	}
	servers := make([]string, 0, len(c.Servers))
	for _, s := range c.Servers {
		addr, err := ServerAddress(s)
		if err != nil {
			return err
		}
		servers = append(servers, addr)
	}
	c.Servers = servers
	if c.JoinToken != "" {
		if _, err := identity.ParseToken(c.JoinToken); err != nil {
			return err
		}
	}
	if !plain(c.Name, maxNameLen) {
		return fault.InvalidField("name", "must be plain text of at most %d bytes", maxNameLen)
	}
	if len(c.Labels) > maxLabels {
		return fault.InvalidField("labels", "are %d; at most %d are kept", len(c.Labels), maxLabels)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Labels)) {
		if k == "" || !plain(k, maxLabel) || !plain(c.Labels[k], maxLabelVal) {
			return fault.InvalidField("labels", "%q must be plain text, at most %d bytes with a value of at most %d", clip(k), maxLabel, maxLabelVal)
		}
	}
	for _, r := range c.TargetRoots {
		if !filepath.IsAbs(r) || filepath.Clean(r) != r {
			return fault.InvalidField("target_roots", "%q is not a clean absolute path", clip(r))
		}
	}
	for i, cmd := range c.AllowCommands {
		if ps := target.Command(cmd).Problems(fmt.Sprintf("allow_commands[%d]", i)); len(ps) > 0 {
			return fault.InvalidField(ps[0].Field, "%s", ps[0].Message)
		}
	}
	if c.BackupRetention < -1 || c.BackupRetention > 1000 {
		return fault.InvalidField("backup_retention", "%d is outside -1 to 1000", c.BackupRetention)
	}
	return nil
}

// ServerAddress reads host, host:port or https://host:port; the default port is the mesh listener's.
func ServerAddress(s string) (string, error) {
	bad := func(why string) error {
		return fault.InvalidField("server_url", "%q %s; give the mesh listener's address as host:port, such as certmesh.example.com:8444", clip(s), why)
	}
	addr := strings.TrimSpace(s)
	if scheme, rest, ok := strings.Cut(addr, "://"); ok {
		if scheme != "https" {
			return "", bad("is not an address of the mesh listener, which speaks TLS")
		}
		addr = strings.TrimSuffix(rest, "/")
	}
	if addr == "" || !plain(addr, 300) || strings.ContainsAny(addr, "/ @?#") {
		return "", bad("is not an address")
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host, port = strings.Trim(addr, "[]"), defaultPort
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return "", bad("is not an address")
		}
	}
	if n, err := strconv.Atoi(port); host == "" || err != nil || n < 1 || n > 65535 {
		return "", bad("has no host or no port between 1 and 65535")
	}
	return net.JoinHostPort(host, port), nil
}

func plain(s string, most int) bool {
	return len(s) <= most && strings.ToValidUTF8(s, "") == s && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// clip bounds and cleans text of the other side, or of a configuration, before it is shown.
func clip(s string) string {
	const most = 500
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.TrimSpace(s)
}
