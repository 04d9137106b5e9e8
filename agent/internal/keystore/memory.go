package keystore

import (
	"sync"
)

// Memory is a Store that lives with the process; for load tools that run many agents.
type Memory struct {
	mu   sync.Mutex
	keys map[string][]memoryKey
}

type memoryKey struct {
	key  Key
	leaf []byte
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{keys: map[string][]memoryKey{}} }

// Ensure implements Store.
func (m *Memory) Ensure(id string, generation int64, algorithm string) (Key, error) {
	if err := CheckName(id, generation); err != nil {
		return Key{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.keys[id] {
		if k.key.Generation == generation && algorithmOf(k.key.Signer) == algorithm {
			return k.key, nil
		}
	}
	s, err := Make(algorithm)
	if err != nil {
		return Key{}, err
	}
	spki, err := spkiOf(s)
	if err != nil {
		return Key{}, err
	}
	k := Key{CertificateID: id, Generation: generation, SPKI: spki, Signer: s}
	m.keys[id] = append(m.keys[id], memoryKey{key: k})
	return k, nil
}

func (m *Memory) findLocked(id string, spki SPKI) *memoryKey {
	for i := range m.keys[id] {
		if m.keys[id][i].key.SPKI == spki {
			return &m.keys[id][i]
		}
	}
	return nil
}

// BySPKI implements Store.
func (m *Memory) BySPKI(id string, spki SPKI) (Key, error) {
	if err := CheckName(id, 0); err != nil {
		return Key{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.findLocked(id, spki); k != nil {
		return k.key, nil
	}
	return Key{}, notHeld(id)
}

// Relabel implements Store.
func (m *Memory) Relabel(id string, spki SPKI, generation int64) error {
	if err := CheckName(id, generation); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.findLocked(id, spki); k != nil {
		k.key.Generation = generation
	}
	return nil
}

// Retire implements Store.
func (m *Memory) Retire(id string, below int64) (int, error) {
	if err := CheckName(id, 0); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var keep []memoryKey
	n := 0
	for _, k := range m.keys[id] {
		if k.key.Generation < below {
			n++
			continue
		}
		keep = append(keep, k)
	}
	m.keys[id] = keep
	if len(keep) == 0 {
		delete(m.keys, id)
	}
	return n, nil
}

// PutLeaf implements Store.
func (m *Memory) PutLeaf(id string, spki SPKI, leaf []byte) error {
	if err := CheckName(id, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.findLocked(id, spki)
	if k == nil {
		return notHeld(id)
	}
	k.leaf = append([]byte(nil), leaf...)
	return nil
}

// List implements Store.
func (m *Memory) List() ([]Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Info
	for id, ks := range m.keys {
		for _, k := range ks {
			out = append(out, Info{CertificateID: id, Generation: k.key.Generation, SPKI: k.key.SPKI,
				Algorithm: algorithmOf(k.key.Signer), Leaf: k.leaf})
		}
	}
	sortInfos(out)
	return out, nil
}
