package work

import (
	"path/filepath"
	"slices"

	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// sharesPath says which other target writes a path that spec writes: each would take the other's work for drift, and put
// its own in its place, without end.
func sharesPath(spec *agentpb.TargetSpec, others []*agentpb.TargetSpec, kinds []target.Kind) error {
	mine := writes(spec, kinds)
	for _, o := range others {
		if o.GetId() == spec.GetId() {
			continue
		}
		for real, shown := range writes(o, kinds) {
			if own, ok := mine[real]; ok {
				as := ""
				if own != shown {
					as = " (as " + clean(shown, 500, false) + ")"
				}
				return fault.New(fault.Rejected, "the path %s is written by target %q already%s; give this target its own path, or use that one",
					clean(own, 500, false), clean(o.GetName(), 100, false), as)
			}
		}
	}
	return nil
}

// writes lists the paths that a target writes: where they lead, and as its settings name them.
func writes(spec *agentpb.TargetSpec, kinds []target.Kind) map[string]string {
	i := slices.IndexFunc(kinds, func(k target.Kind) bool { return k.Name == spec.GetKind() })
	if i < 0 || kinds[i].Paths == nil {
		return nil
	}
	out := map[string]string{}
	for _, p := range kinds[i].Paths(spec.GetSettings()) {
		out[resolve(p)] = p
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
