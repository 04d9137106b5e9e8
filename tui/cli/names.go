package cli

import (
	"context"
	"maps"
	"regexp"
	"sync"

	"golang.org/x/sync/errgroup"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

const (
	// maxLookups bounds what a table's names may cost; rows beyond show ids.
	maxLookups    = 64
	lookupsAtOnce = 8
)

// namer finds what resources are called, for tables. It remembers, so that watching asks once.
type namer struct {
	c     *client.Client
	mu    sync.Mutex
	known render.Names
}

func newNamer(c *client.Client) *namer { return &namer{c: c, known: render.Names{}} }

// names are the names of the ids of each kind, as far as they can be had: a table with an id in it is better than none.
func (n *namer) names(ctx context.Context, ids map[kind][]string) render.Names {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(lookupsAtOnce)
	asked := map[string]bool{}
	for k, list := range ids {
		for _, id := range list {
			n.mu.Lock()
			known := n.known[id] != ""
			n.mu.Unlock()
			if id == "" || known || asked[id] || len(asked) == maxLookups {
				continue
			}
			asked[id] = true
			group.Go(func() error {
				name, err := k.name(ctx, n.c, id)
				if err == nil {
					n.mu.Lock()
					n.known[id] = name
					n.mu.Unlock()
				}
				return nil
			})
		}
	}
	_ = group.Wait() // none of them fails
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.known)
}

// kind is a kind of resource that has a name.
type kind int

const (
	certificates kind = iota
	agents
	issuers
	targets
	profiles
)

// find reads a resource by its id or name.
func (k kind) find(ctx context.Context, c *client.Client, ref string) (id, name string, err error) {
	switch k {
	case certificates:
		r, err := c.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: ref})
		return r.GetCertificate().GetId(), r.GetCertificate().GetName(), err
	case agents:
		r, err := c.Agents.GetAgent(ctx, &operatorpb.GetAgentRequest{Id: ref})
		return r.GetAgent().GetId(), r.GetAgent().GetName(), err
	case issuers:
		r, err := c.Issuers.GetIssuer(ctx, &operatorpb.GetIssuerRequest{Id: ref})
		return r.GetIssuer().GetId(), r.GetIssuer().GetName(), err
	case targets:
		r, err := c.Targets.GetTarget(ctx, &operatorpb.GetTargetRequest{Id: ref})
		return r.GetTarget().GetId(), r.GetTarget().GetName(), err
	default:
		return k.profile(ctx, c, ref)
	}
}

func (k kind) name(ctx context.Context, c *client.Client, id string) (string, error) {
	_, name, err := k.find(ctx, c, id)
	return name, err
}

// profile searches the list: there are few, and no call for one.
func (kind) profile(ctx context.Context, c *client.Client, ref string) (id, name string, err error) {
	r, err := c.Issuers.ListProfiles(ctx, &operatorpb.ListProfilesRequest{Page: &operatorpb.Page{Size: maxPage}})
	if err != nil {
		return "", "", err
	}
	for _, p := range r.GetProfiles() {
		if p.GetId() == ref || p.GetName() == ref {
			return p.GetId(), p.GetName(), nil
		}
	}
	return "", "", misuse("there is no profile %q; certmesh profiles list shows them", ref)
}

// idLike is what ids look like; names cannot.
var idLike = regexp.MustCompile(`^[a-z]{2,4}_[0-9a-f]{32}$`)

// id turns what a person calls a resource into its id, which filters want. Empty stays empty.
func (k kind) id(ctx context.Context, c *client.Client, ref string) (string, error) {
	if ref == "" || idLike.MatchString(ref) {
		return ref, nil
	}
	id, _, err := k.find(ctx, c, ref)
	return id, err
}

// ids turns several references into ids, in place.
func ids(ctx context.Context, c *client.Client, refs map[*string]kind) error {
	for ref, k := range refs {
		id, err := k.id(ctx, c, *ref)
		if err != nil {
			return err
		}
		*ref = id
	}
	return nil
}
