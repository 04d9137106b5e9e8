package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxSocketPath is what the system takes for the path of a socket (sun_path), its end included.
const maxSocketPath = 107

const socketName = "console.sock"

// socketPath names the socket in the data directory so that it fits into a socket's address; longer paths go through the
// directory's descriptor. The address is good until release.
func socketPath(dataDir string) (path string, release func(), err error) {
	path, err = filepath.Abs(filepath.Join(dataDir, socketName))
	if err != nil {
		return "", nil, fault.Wrap(fault.Invalid, err, "node.data_dir cannot be resolved")
	}
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return "", nil, fault.Wrap(fault.Invalid, err, "the data directory cannot be opened (node.data_dir)")
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName), func() { _ = dir.Close() }, nil // it was only named
}

// desk answers certmeshd's own commands on a socket in the data directory, which only the node's own user can enter.
type desk struct {
	clusterpb.UnimplementedConsoleServiceServer
	n *Node
}

// listenConsole binds the socket. What an earlier process left there is removed: the data directory is locked by this one.
func listenConsole(dataDir string) (net.Listener, error) {
	path, release, err := socketPath(dataDir)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(fault.Invalid, err, "the socket of an earlier process cannot be removed from node.data_dir")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "cannot make a socket in node.data_dir")
	}
	// The next start removes it: the name may be of use until release only.
	l.SetUnlinkOnClose(false)
	// The directory is 0700 already.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close() // nobody knows it yet
		return nil, fault.Wrap(fault.Invalid, err, "cannot protect the socket in node.data_dir")
	}
	return l, nil
}

// Status implements the console service.
func (c *desk) Status(ctx context.Context, _ *clusterpb.StatusRequest) (*clusterpb.StatusResponse, error) {
	n := c.n
	r := &clusterpb.StatusResponse{ClusterId: n.member.clusterID, Self: &clusterpb.Member{Id: n.cfg.Node.ID}, Agents: n.parts.sessions.Count()}
	r.LeaderId, _ = n.raft.Leader()
	r.Members = n.raft.Members()
	for _, m := range r.Members {
		if m.GetId() == r.GetSelf().GetId() {
			r.Self = m
		}
	}
	for peer, up := range n.links.Up() {
		if up {
			r.Linked = append(r.Linked, peer)
		}
	}
	slices.Sort(r.Linked)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := n.store.Ping(ctx); err != nil {
		r.StoreError = "the store does not answer; the log of the node says why"
	}
	if t := n.raft.Trouble(); t != "" {
		r.Notes = append(r.Notes, t)
	}
	r.Notes = append(r.Notes, clusterNotes(r)...)
	return r, nil
}

// clusterNotes are what an operator should know of a cluster that looks like r.
func clusterNotes(r *clusterpb.StatusResponse) []string {
	var notes []string
	voters, healthy := 0, 0
	for _, m := range r.GetMembers() {
		if m.GetSuffrage() == clusterpb.Member_SUFFRAGE_VOTER {
			voters++
			if m.GetHealthy() {
				healthy++
			}
		}
	}
	if r.GetLeaderId() == "" {
		notes = append(notes, "nobody leads: streams, the API, our own CAs and revocation go on; renewals that are due are not begun, and external issuers wait. If the other voters are gone for good, see `certmeshd cluster recover --help`.")
	}
	switch n := len(r.GetMembers()); {
	case n == 1:
		notes = append(notes, "one node: when it is away nothing works. Three stand the loss of one.")
	case n == 2:
		notes = append(notes, "two nodes: the second has no vote, because two voters stand still as soon as one is away. Add a third.")
	case n%2 == 0:
		notes = append(notes, fmt.Sprintf("%d nodes: an even number stands the loss of no more than %d would. Add one, or leave it at that.", n, n-1))
	}
	if r.GetLeaderId() == r.GetSelf().GetId() && voters > 1 && healthy == voters/2+1 {
		notes = append(notes, fmt.Sprintf("%d of %d voters are well: one more away, and nobody leads.", healthy, voters))
	}
	return notes
}

// Drain implements the console service.
func (c *desk) Drain(context.Context, *clusterpb.DrainRequest) (*clusterpb.DrainResponse, error) {
	c.n.end(nil)
	return &clusterpb.DrainResponse{}, nil
}

// RemoveNode implements the console service.
func (c *desk) RemoveNode(ctx context.Context, r *clusterpb.RemoveNodeRequest) (*clusterpb.RemoveNodeResponse, error) {
	if err := c.n.removeNode(ctx, r.GetNodeId()); err != nil {
		return nil, consoleStatus(err)
	}
	return &clusterpb.RemoveNodeResponse{}, nil
}

// removeNode takes another node out: first its permission, then its place in Raft, where somebody must lead.
func (n *Node) removeNode(ctx context.Context, nodeID string) error {
	if nodeID == n.cfg.Node.ID {
		return fault.New(fault.Conflict, "this is node %q itself: drain it, then remove it beside another node", nodeID)
	}
	if err := n.store.RemoveNode(ctx, nodeID, console()); err != nil {
		return err
	}
	var err error
	// A leader that is to go gives leadership away first, and the next one is asked.
	for range 4 {
		leader, _ := n.raft.Leader()
		switch leader {
		case "":
			err = fault.New(fault.Retryable, "nobody leads the cluster")
		case n.cfg.Node.ID:
			err = n.raft.Remove(ctx, nodeID)
		default:
			err = n.links.AskRemove(ctx, leader, nodeID)
		}
		if err == nil || fault.Is(err, fault.NotFound) {
			return nil
		}
		pause := n.clk.NewTimer(time.Second)
		select {
		case <-pause.Chan():
		case <-ctx.Done():
			pause.Stop()
		}
	}
	return fault.Wrap(fault.ClassOf(err), err, "node %q may not come back, but it still has its place in Raft; run the command again", nodeID)
}

// consoleStatus carries the sentence; the console's user may see causes as well.
func consoleStatus(err error) error {
	code := codes.Internal
	switch fault.ClassOf(err) {
	case fault.NotFound:
		code = codes.NotFound
	case fault.Conflict, fault.Rejected:
		code = codes.FailedPrecondition
	case fault.Retryable:
		code = codes.Unavailable
	case fault.Invalid:
		code = codes.InvalidArgument
	}
	return status.Error(code, err.Error())
}

// errNoNode: nothing listens in the data directory.
var errNoNode = errors.New("no node runs with this data directory")

// withConsole calls the node that runs with the data directory.
func withConsole[R any](ctx context.Context, c *Configuration, f func(context.Context, clusterpb.ConsoleServiceClient) (R, error)) (R, error) {
	var none R
	dir := c.loaded.Config.Node.DataDir
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return none, fault.Wrap(fault.NotFound, errNoNode, "%s", dir)
	}
	path, release, err := socketPath(dir)
	if err != nil {
		return none, err
	}
	defer release()
	conn, err := grpc.NewClient("passthrough:///console", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return none, fault.Wrap(fault.Internal, err, "the node's socket cannot be dialled")
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := f(ctx, clusterpb.NewConsoleServiceClient(conn))
	if status.Code(err) == codes.Unavailable && !reachable(ctx, path) {
		return none, fault.Wrap(fault.NotFound, errNoNode, "%s", dir)
	}
	if err != nil {
		return none, errors.New(status.Convert(err).Message())
	}
	return r, nil
}

func reachable(ctx context.Context, path string) bool {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	if err != nil {
		return false
	}
	_ = conn.Close() // it was opened to see that it can be
	return true
}

// ClusterStatus asks the node that runs with the data directory. NotFound: none does.
func ClusterStatus(ctx context.Context, c *Configuration) (*clusterpb.StatusResponse, error) {
	return withConsole(ctx, c, func(ctx context.Context, k clusterpb.ConsoleServiceClient) (*clusterpb.StatusResponse, error) {
		return k.Status(ctx, &clusterpb.StatusRequest{})
	})
}

// DrainNode makes the node that runs with the data directory move its agents elsewhere and end, and waits until it has
// ended or ctx does.
func DrainNode(ctx context.Context, c *Configuration) error {
	_, err := withConsole(ctx, c, func(ctx context.Context, k clusterpb.ConsoleServiceClient) (*clusterpb.DrainResponse, error) {
		return k.Drain(ctx, &clusterpb.DrainRequest{})
	})
	if err != nil {
		return err
	}
	for {
		lock, err := lockDir(c.loaded.Config.Node.DataDir)
		if err == nil {
			return lock.Close()
		}
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return fault.Wrap(fault.Retryable, ctx.Err(), "the node is draining and has not ended yet")
		case <-t.C:
		}
	}
}

// RemoveNode takes a node out of the cluster for good. Without a node that runs with the data directory it works on the store
// alone: the removed one may not come back, and Raft lets it go when somebody leads again.
func RemoveNode(ctx context.Context, c *Configuration, nodeID string) error {
	_, err := withConsole(ctx, c, func(ctx context.Context, k clusterpb.ConsoleServiceClient) (*clusterpb.RemoveNodeResponse, error) {
		return k.RemoveNode(ctx, &clusterpb.RemoveNodeRequest{NodeId: nodeID})
	})
	if !errors.Is(err, errNoNode) {
		return err
	}
	s, err := openReady(ctx, c)
	if err != nil {
		return err
	}
	return errors.Join(s.RemoveNode(ctx, nodeID, console()), s.Close())
}

// Nodes lists who may be a node, from the store.
func Nodes(ctx context.Context, c *Configuration) ([]domain.Node, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return nil, err
	}
	nodes, err := s.Nodes(ctx)
	return nodes, errors.Join(err, s.Close())
}

// CreateClusterToken makes a token with which one node can enrol, and returns it; it is not shown again.
func CreateClusterToken(ctx context.Context, c *Configuration, ttl time.Duration) (string, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return "", err
	}
	now := time.Now()
	text, k := newClusterToken(ttl, now)
	return text, errors.Join(s.CreateClusterToken(ctx, k, console()), s.Close())
}
