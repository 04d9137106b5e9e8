package stream

import (
	"sync"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// maxQueue bounds the FIFO. Work is bounded by credits (some tens) and by work.MaxOpen entries that are sent again
// after a reconnect, each with at most Accepted, four Progress, Csr or Result and Credit; beyond that the server does not read.
const maxQueue = 4096

// maxBox bounds the keys of the box: an agent keeps a few hundred states, and answers at most one message each. A
// server that sends more names than that and reads no answers is given up.
const maxBox = 1024

// Outbox holds what one stream has still to send: a box where the latest message of a key wins (answers to states,
// beats), and a FIFO where nothing is merged or left out (work). Nothing in it blocks. It ends with its stream: what
// must not be lost is in the journal and is sent again on the next one.
type Outbox struct {
	mu     sync.Mutex
	queue  []*agentpb.ConnectRequest
	box    []boxed
	last   *agentpb.ConnectRequest
	closed bool
	full   bool
	wake   chan struct{}
}

type boxed struct {
	key string
	msg *agentpb.ConnectRequest
}

func newOutbox() *Outbox { return &Outbox{wake: make(chan struct{}, 1)} }

// Post appends m to the FIFO.
func (o *Outbox) Post(m *agentpb.ConnectRequest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	if len(o.queue) >= maxQueue {
		o.full = true
	} else {
		o.queue = append(o.queue, m)
	}
	o.signal()
}

// Latest puts m into the box in place of an unsent message with the same key.
func (o *Outbox) Latest(key string, m *agentpb.ConnectRequest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	for i := range o.box {
		if o.box[i].key == key {
			o.box[i].msg = m
			return
		}
	}
	if len(o.box) >= maxBox {
		o.full = true
	} else {
		o.box = append(o.box, boxed{key, m})
	}
	o.signal()
}

// close lets no more in; what is in is still sent, then last (which may be nil), then the sending side is closed.
func (o *Outbox) close(last *agentpb.ConnectRequest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.closed, o.last = true, last
	o.signal()
}

func (o *Outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// next returns the next message: the box first, because it is small and says that the agent lives. done means that
// nothing will ever follow; full that the queue overflowed and the stream must end.
func (o *Outbox) next() (m *agentpb.ConnectRequest, done, full bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.full:
		return nil, false, true
	case len(o.box) > 0:
		m = o.box[0].msg
		if o.box = o.box[1:]; len(o.box) == 0 {
			o.box = nil
		}
	case len(o.queue) > 0:
		m = o.queue[0]
		o.queue[0] = nil
		if o.queue = o.queue[1:]; len(o.queue) == 0 {
			o.queue = nil
		}
	case o.last != nil:
		m, o.last = o.last, nil
	default:
		done = o.closed
	}
	return m, done, false
}
