package work

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash/crc32"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// placed is what the last successful deployment left at a target. A value is never changed, only replaced.
type placed struct {
	spec          *agentpb.TargetSpec
	certificateID string
	generation    int64
	leaf          target.Fingerprint
	// said is the last observation that the server may have to be told again; nil: nothing differs, and that is known.
	said *agentpb.Observed
	// unanswered counts looks in a row that came to nothing; it is not kept on disk.
	unanswered int
}

// shelf keeps one placed per target, durably. It is safe for concurrent use.
type shelf struct {
	files durable.Store
	log   *slog.Logger
	mu    sync.Mutex
	by    map[string]*placed // by target id
	// writes keep what is written of one target in order, by a hash of its id; those of others share the disk's flushes.
	writes [16]sync.Mutex
}

const shelfPrefix = "placed-"

// placedRecord is the file: messages in their own encoding.
type placedRecord struct {
	Target        []byte `json:"target"`
	CertificateID string `json:"certificate_id"`
	Generation    int64  `json:"generation"`
	Leaf          string `json:"leaf"`
	Said          []byte `json:"said,omitempty"`
}

// shelfFile hashes the id: it comes from the server and must not be a path.
func shelfFile(targetID string) string {
	h := sha256.Sum256([]byte(targetID))
	return shelfPrefix + hex.EncodeToString(h[:16]) + ".json"
}

func newShelf(files durable.Store, log *slog.Logger) *shelf {
	return &shelf{files: files, log: log, by: map[string]*placed{}}
}

// load reads the records. A damaged one is dropped with a log line: the next deployment or verification makes it anew.
func (s *shelf) load() error {
	if s.files == nil {
		return nil
	}
	names, err := s.files.List(shelfPrefix)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range names {
		data, err := s.files.Read(n)
		if err != nil {
			return fault.Wrap(fault.Retryable, err, "what was deployed cannot be read (%s)", n)
		}
		p, err := decodePlaced(data)
		if err != nil || shelfFile(p.spec.GetId()) != n {
			s.log.Warn("damaged record of a deployment dropped", "file", n)
			continue
		}
		s.by[p.spec.GetId()] = p
	}
	return nil
}

func decodePlaced(data []byte) (*placed, error) {
	var r placedRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, err
	}
	leaf, err := hex.DecodeString(r.Leaf)
	if err != nil || len(leaf) != sha256.Size {
		return nil, fault.New(fault.Internal, "no fingerprint")
	}
	p := &placed{spec: &agentpb.TargetSpec{}, certificateID: r.CertificateID, generation: r.Generation, leaf: target.Fingerprint(leaf)}
	if err := proto.Unmarshal(r.Target, p.spec); err != nil {
		return nil, err
	}
	if len(r.Said) > 0 {
		p.said = &agentpb.Observed{}
		if err := proto.Unmarshal(r.Said, p.said); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// lock takes the lock of a target and returns its release.
func (s *shelf) lock(targetID string) func() {
	m := &s.writes[crc32.ChecksumIEEE([]byte(targetID))%uint32(len(s.writes))]
	m.Lock()
	return m.Unlock
}

// put keeps p durably. When the disk refuses it is kept in memory all the same, and the error says so.
func (s *shelf) put(p *placed) error {
	id := p.spec.GetId()
	defer s.lock(id)()
	s.mu.Lock()
	s.by[id] = p
	s.mu.Unlock()
	if s.files == nil {
		return nil
	}
	r := placedRecord{CertificateID: p.certificateID, Generation: p.generation, Leaf: p.leaf.String()}
	var err error
	if r.Target, err = proto.Marshal(p.spec); err != nil {
		return fault.Wrap(fault.Internal, err, "a target cannot be encoded")
	}
	if p.said != nil {
		if r.Said, err = proto.Marshal(p.said); err != nil {
			return fault.Wrap(fault.Internal, err, "an observation cannot be encoded")
		}
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fault.Wrap(fault.Internal, err, "a record cannot be encoded")
	}
	return s.files.Write(shelfFile(id), data)
}

// note replaces what is in memory only, if it still is was.
func (s *shelf) note(was, p *placed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id := p.spec.GetId(); s.by[id] == was {
		s.by[id] = p
	}
}

func (s *shelf) get(targetID string) *placed {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.by[targetID]
}

func (s *shelf) drop(targetID string) error {
	defer s.lock(targetID)()
	s.mu.Lock()
	known := s.by[targetID] != nil
	delete(s.by, targetID)
	s.mu.Unlock()
	if !known {
		return nil
	}
	if s.files == nil {
		return nil
	}
	return s.files.Remove(shelfFile(targetID))
}

// all lists what is kept, by target id.
func (s *shelf) all() []*placed {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*placed, 0, len(s.by))
	for _, p := range s.by {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *placed) int { return strings.Compare(a.spec.GetId(), b.spec.GetId()) })
	return out
}
