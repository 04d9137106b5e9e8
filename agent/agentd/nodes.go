package agentd

import (
	"encoding/json"
	"errors"
	"io/fs"
	"slices"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/stream"
)

// nodesFile remembers, beside the states, the nodes that a Welcome named: an agent that starts while those it is
// configured with are down finds the others.
const nodesFile = "nodes.json"

// nodes is what this agent knows of the control plane's nodes besides its configuration.
type nodes struct {
	files durable.Store
	known []string
}

// addresses are those of a server's list that can be connected to, as many as are kept.
func addresses(list []string) []string {
	var out []string
	for _, n := range list {
		if addr, err := ServerAddress(n); err == nil && !slices.Contains(out, addr) && len(out) < maxServers {
			out = append(out, addr)
		}
	}
	return out
}

// recallNodes reads what was remembered. Without it the configuration has to do, so nothing in it is an error.
func (a *agent) recallNodes(files durable.Store) {
	a.nodes = nodes{files: files}
	b, err := files.Read(nodesFile)
	if err == nil {
		var list []string
		if err = json.Unmarshal(b, &list); err == nil {
			a.nodes.known = addresses(list)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.cfg.Log.Warn("the nodes known before are not; those of the configuration are tried", "err", err)
	}
}

// rememberNodes keeps the list of a Welcome, if there is one and it names others than the last.
func (a *agent) rememberNodes(list []string) {
	list = addresses(list)
	slices.Sort(list) // servers send it in another order to each
	if len(list) == 0 || slices.Equal(list, a.nodes.known) {
		return
	}
	a.nodes.known = list
	b, err := json.Marshal(list)
	if err == nil {
		err = a.nodes.files.Write(nodesFile, b)
	}
	if err != nil {
		a.cfg.Log.Warn("the nodes of the control plane are not remembered for the next start", "err", err)
	}
}

// bounded keeps of how a conversation ended what can be used: lists come from the other side.
func bounded(e stream.End) stream.End {
	if e.Known != nil {
		e.Known = addresses(e.Known)
	}
	if e.Move != nil {
		e.Move.Nodes = addresses(e.Move.GetNodes())
	}
	return e
}
