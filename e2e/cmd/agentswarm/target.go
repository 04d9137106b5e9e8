package main

import (
	"context"
	"crypto/x509"
	"sync"

	"github.com/certmesh/certmesh/connectors/target"
)

// memorySettings are those of the file connector that the swarm's targets are made with.
type memorySettings struct {
	Dir string `json:"dir" doc:"Version directory; nothing is written to it."`
}

// memoryKind stands in for the file connector: the control plane sees its kind, and what is deployed is remembered.
// Nothing is written, because what is measured is the control plane, not this machine's disk.
func memoryKind() target.Kind {
	return target.Define("file", 1, target.Facts{Atomic: true, Undo: true}, nil,
		func(_ context.Context, _ target.Env, s memorySettings) (target.Target, error) {
			m, _ := targets.LoadOrStore(s.Dir, &memory{})
			return m.(*memory), nil //nolint:forcetypeassert // nothing else is stored
		})
}

// targets are the memories by directory, of which each target has its own.
var targets sync.Map

// memory is one target.
type memory struct {
	mu     sync.Mutex
	served target.Served
}

func (m *memory) Current(context.Context) (target.Served, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.served, nil
}

func (m *memory) Stage(_ context.Context, mat target.Material) (target.Staged, error) {
	var leaf *x509.Certificate
	if len(mat.Chain) > 0 {
		leaf = mat.Chain[0]
	}
	return &staged{m, leaf}, nil
}

func (m *memory) Undo(context.Context, target.Receipt) error { return nil }

type staged struct {
	m    *memory
	leaf *x509.Certificate
}

func (s *staged) Receipt() target.Receipt { return target.Receipt("{}") }

func (s *staged) Commit(context.Context) error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.leaf != nil {
		s.m.served = target.Served{Leaf: target.FingerprintOf(s.leaf), NotAfter: s.leaf.NotAfter}
	}
	return nil
}
