package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/duty"
	"github.com/certmesh/certmesh/controlplane/internal/gateway/crl"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Recovery says what a recovery did.
type Recovery = domain.Recovery

// FoundLeaf is a leaf that an agent holds and that no version is known of.
type FoundLeaf = domain.FoundLeaf

// Relisted says what the CRLs of the lost time brought back.
type Relisted = store.Relisted

// RecoverAfterRestore makes a database that was restored from a backup safe to go on with, and brings back the revocations of
// CRLs that were published after the backup. No node may run: Conflict.
func RecoverAfterRestore(ctx context.Context, c *Configuration, crls []string) (Recovery, Relisted, error) {
	var r Recovery
	var back Relisted
	err := alone(ctx, c, func(s *store.Store) error {
		if c.loaded.Config.Store.Migrate {
			if err := s.Migrate(ctx); err != nil {
				return err
			}
		}
		if err := s.CheckSchema(ctx); err != nil {
			return err
		}
		lists, err := readCRLs(ctx, s, crls)
		if err != nil {
			return err
		}
		var names []string
		for _, d := range duty.Table(duty.Deps{CRLs: &crl.Builder{}}) {
			names = append(names, d.Name)
		}
		if r, err = s.Recover(ctx, names, console()); err != nil {
			return err
		}
		for _, l := range lists {
			x, err := s.Relist(ctx, l.IssuerID, l.Number, l.Entries, l.NotAfter, console())
			back.Certificates = append(back.Certificates, x.Certificates...)
			back.Versions, back.Unknown = back.Versions+x.Versions, back.Unknown+x.Unknown
			if err != nil {
				return err
			}
		}
		return nil
	})
	return r, back, err
}

// readCRLs reads all of them before anything is changed.
func readCRLs(ctx context.Context, s *store.Store, files []string) ([]ca.Listed, error) {
	cas, err := s.CAs(ctx)
	if err != nil {
		return nil, err
	}
	lists := make([]ca.Listed, len(files))
	for i, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fault.Wrap(fault.Invalid, err, "--crl: the file cannot be read")
		}
		if lists[i], err = ca.ReadCRL(data, cas); err != nil {
			return nil, fmt.Errorf("--crl %s: %w", name, err)
		}
	}
	return lists, nil
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
