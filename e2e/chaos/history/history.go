package history

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// Phase is where an operation stands.
type Phase string

// An operation is invoked, and then it is known to have been done, known not to have been, or nobody knows.
const (
	Invoke Phase = "invoke"
	OK     Phase = "ok"
	Fail   Phase = "fail"
	Info   Phase = "info"
)

// Kind is what an operation is.
type Kind string

// What clients do, and what is done to the cluster.
const (
	Order   Kind = "order"
	Renew   Kind = "renew"
	Revoke  Kind = "revoke"
	Read    Kind = "read"
	CRL     Kind = "crl"
	Nemesis Kind = "nemesis"
)

// Event is one line of a history.
type Event struct {
	// Operation has the same number in an operation's two events.
	Operation int64 `json:"operation"`
	Phase     Phase `json:"phase"`
	// At is monotonic, since the beginning of the history.
	At     time.Duration `json:"at"`
	Kind   Kind          `json:"kind"`
	Client int           `json:"client"`
	// Node was asked.
	Node string `json:"node,omitempty"`
	// Name is the certificate's, the issuer's id for a CRL, and words for the nemesis.
	Name string `json:"name,omitempty"`
	// RequestID went with the call. Orders that are repeated keep theirs.
	RequestID string `json:"request_id,omitempty"`
	Answer
}

// Answer is what a node said.
type Answer struct {
	CertificateID string `json:"certificate_id,omitempty"`
	Status        string `json:"status,omitempty"`
	// Generations are those that are held, by agent.
	Generations map[string]int64 `json:"generations,omitempty"`
	Jobs        []Job            `json:"jobs,omitempty"`
	Serials     []string         `json:"serials,omitempty"`
	// Number is the CRL's.
	Number int64  `json:"number,omitempty"`
	Error  string `json:"error,omitempty"`
}

// Recorder writes a history as JSON lines. It is safe for concurrent use.
type Recorder struct {
	now func() time.Duration

	mu     sync.Mutex
	out    *json.Encoder
	last   int64
	events []Event
	err    error
}

// NewRecorder writes to out; now is the time since the beginning and never goes back.
func NewRecorder(out io.Writer, now func() time.Duration) *Recorder {
	return &Recorder{now: now, out: json.NewEncoder(out)}
}

// Invoke writes that an operation begins, and returns what writes its end.
func (r *Recorder) Invoke(e Event) (end func(Phase, Answer)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	e.Operation, e.Phase = r.last, Invoke
	r.write(e)
	return func(p Phase, a Answer) {
		r.mu.Lock()
		defer r.mu.Unlock()
		e.Phase, e.Answer = p, a
		r.write(e)
	}
}

// write appends an event; times are taken under the lock, so that they are in order.
func (r *Recorder) write(e Event) {
	e.At = r.now()
	r.events = append(r.events, e)
	r.err = errors.Join(r.err, r.out.Encode(e))
}

// Events are all that was written, and whether all of it reached the writer.
func (r *Recorder) Events() ([]Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clip(r.events), r.err
}

// Load reads what a Recorder has written.
func Load(in io.Reader) ([]Event, error) {
	var events []Event
	d := json.NewDecoder(bufio.NewReader(in))
	for {
		var e Event
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return events, nil
		} else if err != nil {
			return events, fmt.Errorf("line %d of the history: %w", len(events)+1, err)
		}
		events = append(events, e)
	}
}

// operation is a pair of events; the outcome of one that never ended is not known, and it ended at forever.
type operation struct {
	Event
	outcome    Phase
	began, end time.Duration
}

const forever = time.Duration(1<<63 - 1)

// pair joins the events of each operation, in the order in which they were invoked.
func pair(events []Event) []operation {
	var all []operation
	at := map[int64]int{}
	for _, e := range events {
		if e.Phase == Invoke {
			at[e.Operation] = len(all)
			all = append(all, operation{Event: e, outcome: Info, began: e.At, end: forever})
			continue
		}
		if i, ok := at[e.Operation]; ok {
			o := &all[i]
			o.outcome, o.Answer = e.Phase, e.Answer
			if e.Phase != Info {
				o.end = e.At
			}
		}
	}
	return all
}
