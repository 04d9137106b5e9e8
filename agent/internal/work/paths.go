package work

import (
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// claims knows which paths targets write. Where the paths of the others lead is looked up once a minute at most: an agent may
// have a thousand, and each that comes is compared with all.
type claims struct {
	kinds []target.Kind
	now   func() time.Time

	mu sync.Mutex
	by map[string]claim // by target id
}

const claimAge = time.Minute

// claim is what one target writes.
type claim struct {
	spec  *agentpb.TargetSpec
	at    time.Time
	paths []claimed
}

// claimed is where a path leads, and as the settings name it.
type claimed struct{ real, shown string }

func newClaims(kinds []target.Kind, now func() time.Time) *claims {
	return &claims{kinds: kinds, now: now, by: map[string]claim{}}
}

// shared says which other target writes a path that spec writes: each would take the other's work for drift, and put
// its own in its place, without end.
func (c *claims) shared(spec *agentpb.TargetSpec, others []*agentpb.TargetSpec) error {
	mine := c.writes(spec)
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if len(c.by) > 2*len(others)+16 {
		clear(c.by) // mostly of targets that are gone
	}
	c.by[spec.GetId()] = claim{spec, now, mine}
	for _, o := range others {
		if o.GetId() == spec.GetId() {
			continue
		}
		h, ok := c.by[o.GetId()]
		if !ok || h.spec != o || now.Sub(h.at) > claimAge || now.Before(h.at) {
			h = claim{o, now, c.writes(o)}
			c.by[o.GetId()] = h
		}
		for _, p := range h.paths {
			i := slices.IndexFunc(mine, func(m claimed) bool { return m.real == p.real })
			if i < 0 {
				continue
			}
			as := ""
			if own := mine[i].shown; own != p.shown {
				as = " (as " + clean(p.shown, 500, false) + ")"
			}
			return fault.New(fault.Rejected, "the path %s is written by target %q already%s; give this target its own path, or use that one",
				clean(mine[i].shown, 500, false), clean(o.GetName(), 100, false), as)
		}
	}
	return nil
}

// writes lists the paths that a target writes.
func (c *claims) writes(spec *agentpb.TargetSpec) []claimed {
	i := slices.IndexFunc(c.kinds, func(k target.Kind) bool { return k.Name == spec.GetKind() })
	if i < 0 || c.kinds[i].Paths == nil {
		return nil
	}
	var out []claimed
	for _, p := range c.kinds[i].Paths(spec.GetSettings()) {
		out = append(out, claimed{resolve(p), p})
	}
	return out
}

// resolve follows the links on the way to path, but not path itself, which may be a link that a deployment swaps. What does
// not exist yet leads where it says.
func resolve(path string) string {
	path = filepath.Clean(path)
	dir, base := filepath.Split(path)
	if dir = filepath.Clean(dir); dir == path {
		return path
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		return filepath.Join(real, base)
	}
	return filepath.Join(resolve(dir), base)
}
