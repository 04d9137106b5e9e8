package client

import (
	"context"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc/codes"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

const (
	firstPause = 500 * time.Millisecond
	longPause  = 15 * time.Second
)

// Feed tells that something may have changed.
type Feed struct {
	// C has a value whenever what is watched should be read again: at first, after every notice (several may be one
	// value), and after a reconnection. It is closed when the feed has ended.
	C <-chan struct{}

	c    chan struct{}
	mu   sync.Mutex
	err  error
	lost error
}

// Err is why the feed ended; nil when its context did.
func (f *Feed) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Lost is what the connection was lost of, nil while it is there.
func (f *Feed) Lost() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lost
}

func (f *Feed) set(lost, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost, f.err = lost, err
}

func (f *Feed) wake() {
	select {
	case f.c <- struct{}{}:
	default: // one is waiting already
	}
}

// Watch subscribes to notices of kinds (empty: all) about id (empty: any). A lost connection is made again, with
// growing pauses, for as long as ctx lives; an answer that no repetition will change ends the feed.
func (c *Client) Watch(ctx context.Context, clk clockwork.Clock, kinds []string, id string) *Feed {
	ch := make(chan struct{}, 1)
	f := &Feed{C: ch, c: ch}
	go func() {
		defer close(ch)
		for pause := firstPause; ; pause = min(2*pause, longPause) {
			heard, err := c.listen(ctx, f, kinds, id)
			if heard {
				pause = firstPause
			}
			if ctx.Err() != nil {
				return
			}
			switch err = c.describe(err); Code(err) {
			case codes.Unavailable, codes.Internal, codes.Unknown, codes.Aborted, codes.ResourceExhausted, codes.DeadlineExceeded, codes.OK:
				f.set(err, nil)
				// Whoever shows something learns that it may be stale.
				f.wake()
			default:
				f.set(nil, err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-clk.After(pause):
			}
		}
	}()
	return f
}

// listen passes on the notices of one stream until it breaks; heard says whether there were any.
func (c *Client) listen(ctx context.Context, f *Feed, kinds []string, id string) (heard bool, err error) {
	stream, err := c.System.Watch(ctx, &operatorpb.WatchRequest{Kinds: kinds, Id: id})
	if err != nil {
		return false, err
	}
	for {
		// What changed, and whether notices were dropped, makes no difference: all that is shown is read again.
		if _, err := stream.Recv(); err != nil {
			return heard, err
		}
		heard = true
		f.set(nil, nil)
		f.wake()
	}
}
