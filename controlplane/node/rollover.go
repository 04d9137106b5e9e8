package node

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// RolloverProgress is how far a change of the mesh CA has come.
type RolloverProgress = domain.RolloverProgress

// RolloverLag is an agent that a rollover waits for.
type RolloverLag = domain.RolloverLag

// rolloverList bounds the agents and tokens that are listed.
const rolloverList = 100

// rollover moves the mesh CA on, next to the store. Nodes notice by themselves.
type rollover struct {
	store *store.Store
	ring  func() (*secret.Keyring, error)
	now   func() time.Time
}

// withRollover runs one step and returns how things stand after it.
func withRollover(ctx context.Context, c *Configuration, step func(ctx context.Context, r *rollover) error) (RolloverProgress, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return RolloverProgress{}, err
	}
	r := &rollover{store: s, ring: func() (*secret.Keyring, error) { return secret.LoadFile(c.loaded.Config.Secrets.KEKFile) }, now: time.Now}
	var p RolloverProgress
	if err = step(ctx, r); err == nil {
		p, err = r.progress(ctx)
	}
	return p, errors.Join(err, s.Close())
}

// RolloverStatus says how far the rollover has come.
func RolloverStatus(ctx context.Context, c *Configuration) (RolloverProgress, error) {
	return withRollover(ctx, c, func(context.Context, *rollover) error { return nil })
}

// StartRollover makes the next mesh CA, whose root is trusted from then on beside the present one. Started already, it
// changes nothing.
func StartRollover(ctx context.Context, c *Configuration) (RolloverProgress, error) {
	return withRollover(ctx, c, func(ctx context.Context, r *rollover) error { return r.start(ctx) })
}

// ActivateRollover makes the next CA the one that signs. It is refused while agents have not acknowledged the next root,
// unless force is at least their number.
func ActivateRollover(ctx context.Context, c *Configuration, force int) (RolloverProgress, error) {
	return withRollover(ctx, c, func(ctx context.Context, r *rollover) error { return r.activate(ctx, force) })
}

// FinishRollover ends the trust in the former root and destroys its key. It is refused while agents depend on it or join
// tokens name it, unless force is at least the number of both.
func FinishRollover(ctx context.Context, c *Configuration, force int) (RolloverProgress, error) {
	return withRollover(ctx, c, func(ctx context.Context, r *rollover) error { return r.finish(ctx, force) })
}

// AbortRollover takes back a rollover that is not activated yet.
func AbortRollover(ctx context.Context, c *Configuration) (RolloverProgress, error) {
	return withRollover(ctx, c, func(ctx context.Context, r *rollover) error {
		_, err := r.store.AbortRollover(ctx, r.op())
		return err
	})
}

func (r *rollover) op() domain.Op {
	return domain.Op{Actor: "console", RequestID: id.New(id.Request), At: domain.Micro(r.now())}
}

func (r *rollover) progress(ctx context.Context) (RolloverProgress, error) {
	p, err := r.store.RolloverProgress(ctx, r.op(), rolloverList)
	if fault.Is(err, fault.NotFound) {
		return p, fault.Wrap(fault.Conflict, err, "there is no mesh CA yet; a node makes it when it first starts")
	}
	return p, err
}

// open opens a mesh CA; that it can be is worth knowing before it is made the one that signs.
func (r *rollover) open(ctx context.Context, material domain.CA) (*ca.Authority, *secret.Keyring, error) {
	ring, err := r.ring()
	if err != nil {
		return nil, nil, err
	}
	a, err := ca.Open(material, func(id string) (domain.SealedKey, error) { return r.store.SealedKey(ctx, id) }, ring)
	if err != nil {
		return nil, nil, fmt.Errorf("open the mesh CA: %w", err)
	}
	return a, ring, nil
}

func (r *rollover) start(ctx context.Context) error {
	p, err := r.progress(ctx)
	if err != nil || p.Rollover.Phase == domain.RolloverStarted {
		return err
	}
	present, ring, err := r.open(ctx, p.Mesh.CA)
	if err != nil {
		return err
	}
	next, err := ca.NewSuccessor(present, ca.Params{Now: r.now()}, ring)
	if err != nil {
		return err
	}
	_, err = r.store.StartRollover(ctx, next.CA, next.Keys, r.op())
	return err
}

func (r *rollover) activate(ctx context.Context, force int) error {
	p, err := r.progress(ctx)
	if err != nil {
		return err
	}
	if p.Rollover.Phase == domain.RolloverStarted {
		if err := mayActivate(p, force); err != nil {
			return err
		}
		if _, _, err := r.open(ctx, p.Rollover.Other); err != nil {
			return err
		}
	}
	_, err = r.store.ActivateRollover(ctx, p.Rollover.Revision, p.Lagging, r.op())
	return err
}

func (r *rollover) finish(ctx context.Context, force int) error {
	p, err := r.progress(ctx)
	if err != nil {
		return err
	}
	if p.Rollover.Phase == domain.RolloverActivated {
		if err := mayFinish(p, force); err != nil {
			return err
		}
	}
	_, err = r.store.FinishRollover(ctx, p.Rollover.Revision, p.Lagging+p.TokensTotal, r.op())
	return err
}

var errForce = fault.InvalidField("force", "must be the number of those that may be left behind")

const rolloverHelp = "certmeshd mesh rollover status lists them"

// mayActivate judges whether the next CA may sign.
func mayActivate(p RolloverProgress, force int) error {
	if force < 0 {
		return errForce
	}
	if p.Lagging <= force {
		return nil
	}
	fate := "they can still come back until the rollover is finished"
	if !Vouched(p) {
		fate = "they will have to join again with a new token, because the former root vouches for no other CA"
	}
	return fault.New(fault.Conflict, "%d of %d agents have not acknowledged the new root, %s among them; %s. Wait for them, retire them, or go on with --force %d: %s",
		p.Lagging, p.Agents, p.Lags[0].Name, rolloverHelp, p.Lagging, fate)
}

// mayFinish judges whether the former root may go.
func mayFinish(p RolloverProgress, force int) error {
	left := p.Lagging + p.TokensTotal
	switch {
	case force < 0:
		return errForce
	case left <= force:
		return nil
	case p.Lagging == 0:
		return fault.New(fault.Conflict, "%d join tokens that can still be used name the former root, %s among them; %s. Revoke them and make new ones, let them expire, or go on with --force %d: they will be of no use",
			p.TokensTotal, p.Tokens[0].ID, rolloverHelp, left)
	}
	return fault.New(fault.Conflict, "%d of %d agents depend on the former root, %s among them, and %d join tokens name it; %s. Wait for them, retire them, or go on with --force %d: they will have to join again with a new token",
		p.Lagging, p.Agents, p.Lags[0].Name, p.TokensTotal, rolloverHelp, left)
}

// Vouched says whether the former root vouches for the next one: those who know only the former one accept it then.
func Vouched(p RolloverProgress) bool {
	return len(p.Mesh.CA.Vouched) > 0 || p.Rollover.Phase == domain.RolloverStarted && len(p.Rollover.Other.Vouched) > 0
}

// RootUntil is when a root of a rollover expires; zero if it does not parse.
func RootUntil(der []byte) time.Time {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return time.Time{}
	}
	return c.NotAfter
}
