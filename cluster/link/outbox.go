package link

import (
	"sync"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// Bounds of what waits for one node. What does not fit is not lost for good: the receiver sweeps.
const (
	maxWakes   = 1 << 16
	maxChanged = 256
	maxOrders  = 1024
	// wakeBatch keeps a message below the 64 KiB of the mesh listener.
	wakeBatch = 1000
)

// outbox is what is to be told to one node. Wakes and changes are merged; other messages keep their order. It never blocks.
type outbox struct {
	// ready coalesces: one token says that there is something to take.
	ready chan struct{}

	mu        sync.Mutex
	wakes     map[string]struct{}
	resources map[string]*clusterpb.Resource
	more      bool
	orders    []*clusterpb.LinkRequest
	// lost: something did not fit, so that the link must be made anew, which makes the other end look for itself.
	lost bool
}

func newOutbox() *outbox {
	return &outbox{ready: make(chan struct{}, 1), wakes: map[string]struct{}{}, resources: map[string]*clusterpb.Resource{}}
}

func (o *outbox) signal() {
	select {
	case o.ready <- struct{}{}:
	default:
	}
}

func (o *outbox) wake(agentIDs []string) {
	o.mu.Lock()
	for _, id := range agentIDs {
		if len(o.wakes) >= maxWakes {
			o.lost = true
			break
		}
		o.wakes[id] = struct{}{}
	}
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) changed(resources []*clusterpb.Resource, more bool) {
	o.mu.Lock()
	o.more = o.more || more
	for _, r := range resources {
		if len(o.resources) >= maxChanged {
			o.more = true
			break
		}
		o.resources[r.Kind+"/"+r.Id] = r
	}
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) push(m *clusterpb.LinkRequest) {
	o.mu.Lock()
	if len(o.orders) < maxOrders {
		o.orders = append(o.orders, m)
	} else {
		o.lost = true
	}
	o.mu.Unlock()
	o.signal()
}

// take empties the box. lost says that something was dropped.
func (o *outbox) take() (messages []*clusterpb.LinkRequest, lost bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	messages, lost = o.orders, o.lost
	o.orders, o.lost = nil, false
	ids := make([]string, 0, min(len(o.wakes), wakeBatch))
	flush := func() {
		if len(ids) > 0 {
			messages = append(messages, &clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_Wake{Wake: &clusterpb.Wake{AgentIds: ids}}})
			ids = nil
		}
	}
	for id := range o.wakes {
		if ids = append(ids, id); len(ids) == wakeBatch {
			flush()
		}
	}
	flush()
	clear(o.wakes)
	if len(o.resources) > 0 || o.more {
		c := &clusterpb.Changed{More: o.more}
		for _, r := range o.resources {
			c.Resources = append(c.Resources, r)
		}
		messages = append(messages, &clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_Changed{Changed: c}})
		clear(o.resources)
		o.more = false
	}
	return messages, lost
}

// clear drops what waits: the other end is told to look for itself.
func (o *outbox) clear() { o.take() }
