package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/duty"
	"github.com/certmesh/certmesh/controlplane/internal/gateway/crl"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// Recovery says what a recovery did.
type Recovery = domain.Recovery

// FoundLeaf is a leaf that an agent holds and that no version is known of.
type FoundLeaf = domain.FoundLeaf

// RecoverAfterRestore makes a database that was restored from a backup safe to go on with. No node may run: Conflict.
func RecoverAfterRestore(ctx context.Context, c *Configuration) (Recovery, error) {
	var r Recovery
	err := alone(ctx, c, func(s *store.Store) error {
		if c.loaded.Config.Store.Migrate {
			if err := s.Migrate(ctx); err != nil {
				return err
			}
		}
		if err := s.CheckSchema(ctx); err != nil {
			return err
		}
		var names []string
		for _, d := range duty.Table(duty.Deps{CRLs: &crl.Builder{}}) {
			names = append(names, d.Name)
		}
		var err error
		r, err = s.Recover(ctx, names, console())
		return err
	})
	return r, err
}

// FoundLeaves lists the leaves that agents hold and that no version could be made of.
func FoundLeaves(ctx context.Context, c *Configuration) ([]FoundLeaf, error) {
	s, err := openReady(ctx, c)
	if err != nil {
		return nil, err
	}
	all, err := s.FoundLeaves(ctx)
	return all, errors.Join(err, s.Close())
}

// RevokeFoundLeaf puts a found leaf on its issuer's next CRL.
func RevokeFoundLeaf(ctx context.Context, c *Configuration, serial, reason string) error {
	code, err := domain.ParseRevocationReason(reason)
	if err != nil {
		return err
	}
	s, err := openReady(ctx, c)
	if err != nil {
		return err
	}
	return errors.Join(s.RevokeFoundLeaf(ctx, serial, code, console()), s.Close())
}

// console is who acts beside the store.
func console() domain.Op {
	return domain.Op{Actor: "console", RequestID: id.New(id.Request), At: domain.Micro(time.Now())}
}

// alone opens the store while nobody else has it, and keeps nodes of this data directory away meanwhile.
func alone(ctx context.Context, c *Configuration, fn func(*store.Store) error) error {
	return locked(c, func() error {
		cfg := &c.loaded.Config
		dsn, err := store.Alone(ctx, cfg.Store.DSN)
		if err != nil {
			return err
		}
		s, err := store.Open(ctx, store.Config{DSN: dsn, NodeID: cfg.Node.ID, MaxReaders: 1, Now: time.Now, NewID: id.New, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		return errors.Join(fn(s), s.Close())
	})
}

// locked runs fn while no node of this data directory can start; where there is none, none will.
func locked(c *Configuration, fn func() error) error {
	dir := c.loaded.Config.Node.DataDir
	if _, err := os.Stat(dir); err != nil {
		return fn()
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(fn(), lock.Close())
}
