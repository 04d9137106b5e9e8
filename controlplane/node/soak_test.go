package node

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

const (
	// Memory at the end may be so many times that of the reference measurement, and soakSlack more: what a heap of some
	// 20 MiB differs by from one quiet moment to the next.
	soakFactor = 1.2
	soakSlack  = 8 << 20
	// soakGoroutines is how many more goroutines than at the reference there may be: connections of a pool that open late.
	soakGoroutines = 32
)

// soakLength is how long the load lasts, and when the reference is measured: after two minutes of CERTMESH_SOAK_MINUTES, in
// the short form of every run when caches are filled.
func soakLength(t *testing.T) (length, reference time.Duration) {
	t.Helper()
	s := os.Getenv("CERTMESH_SOAK_MINUTES")
	if s == "" {
		return 5 * time.Second, 2 * time.Second
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n <= 0 {
		t.Fatalf("CERTMESH_SOAK_MINUTES=%q is not a number above zero", s)
	}
	length = time.Duration(n * float64(time.Minute))
	return length, min(2*time.Minute, length/4)
}

// TestSoak offers a node far more changes than it takes, by callers who come back when they are told to: what is refused says
// when to come back, another owner's certificate is renewed all the while, and memory and goroutines stay where they were.
func TestSoak(t *testing.T) {
	length, reference := soakLength(t)
	// What the other tests of this package do would be measured too, so that it runs alone: the engines one after the other.
	for _, e := range storetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) { soak(t, e, length, reference) })
	}
}

func soak(t *testing.T, e storetest.Engine, length, reference time.Duration) {
	w := newWorldWith(t, e, nil)
	// Far fewer places than callers, and enough readers that who a caller is does not take longer than the change.
	w.set = map[string]string{"store.max_readers": "8", "api.changes": "64", "api.changes_waiting": "400"}
	stopNode(t, w.node)
	_ = w.operator.Close()
	w.operator = nil
	w.startNode()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.place("one")
	call(w, ctx, "order", func(ctx context.Context, c clients) (*operatorpb.CreateCertificateResponse, error) {
		return c.certs.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: "one", Owner: "small", Issuer: "internal",
			Profile: "tls-server", Names: &operatorpb.Names{Dns: []string{"one.test"}}, Targets: []string{"one"}})
	})
	w.served(ctx, "one", 1)

	l := &soakLoad{}
	key, row, err := authz.NewKey("crowd", authz.Admin, time.Time{}, time.Now())
	if err == nil {
		err = w.node.store.CreateAPIKey(ctx, row, domain.Op{Actor: "test", At: time.Now()})
	}
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	const connections, callers = 10, 100
	for range connections {
		_, conn := operator(t, w.node)
		for range callers {
			wg.Go(func() { l.call(t, metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key), conn) })
		}
	}

	var first, last measured
	begun := time.Now()
	over := make(chan struct{})
	wg.Go(func() {
		defer close(over)
		wait := func(d time.Duration) {
			select {
			case <-time.After(d):
			case <-ctx.Done():
			}
		}
		wait(reference)
		first = l.measure()
		wait(length - time.Since(begun))
		last = l.measure()
	})
	var took []time.Duration
	for generation, running := int64(2), true; running; generation++ {
		at := time.Now()
		call(w, ctx, "renew", func(ctx context.Context, c clients) (*operatorpb.RenewCertificateResponse, error) {
			return c.certs.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: "one"})
		})
		w.served(ctx, "one", generation)
		took = append(took, time.Since(at))
		select {
		case <-over:
			running = false
		default:
		}
	}
	t.Logf("after %v: %v; after %v: %v", reference, first, length, last)
	slices.Sort(took)
	t.Logf("%d admitted, %d refused; %d renewals of another owner: p50 %.0f ms, p99 %.0f ms, at most %.0f ms", l.admitted.Load(), l.refused.Load(),
		len(took), percentile(took, 0.5), percentile(took, 0.99), percentile(took, 1))
	if l.refused.Load() == 0 || l.admitted.Load() == 0 {
		t.Error("the load was not more than the node takes, or it took none")
	}
	if most := soakFactor*float64(first.heap) + soakSlack; float64(last.heap) > most {
		t.Errorf("the heap grew from %d to %d KiB", first.heap>>10, last.heap>>10)
	}
	if last.goroutines > first.goroutines+soakGoroutines {
		t.Errorf("goroutines grew from %d to %d", first.goroutines, last.goroutines)
	}
}

// soakLoad is the load, which rests while something is measured.
type soakLoad struct {
	rest              sync.RWMutex
	admitted, refused atomic.Int64
}

// call changes something again and again until ctx ends.
func (l *soakLoad) call(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
	c := clientsOf(conn)
	for ctx.Err() == nil {
		l.rest.RLock()
		_, err := c.agents.CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
		l.rest.RUnlock()
		switch {
		case err == nil:
			l.admitted.Add(1)
		case ctx.Err() != nil:
		case status.Code(err) == codes.ResourceExhausted:
			l.refused.Add(1)
			delay := time.Duration(0)
			for _, d := range status.Convert(err).Details() {
				if r, ok := d.(*errdetails.RetryInfo); ok {
					delay = r.GetRetryDelay().AsDuration()
				}
			}
			if delay <= 0 {
				t.Errorf("a refusal does not say when to come back: %v", err)
				return
			}
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		default:
			t.Error(err)
			return
		}
	}
}

type measured struct {
	heap       uint64
	goroutines int
	resident   uint64
}

// measure looks at the process when no call of the load is under way.
func (l *soakLoad) measure() measured {
	l.rest.Lock()
	defer l.rest.Unlock()
	// What finalizers and pools hold goes with the second.
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return measured{heap: m.HeapAlloc, goroutines: runtime.NumGoroutine(), resident: resident()}
}

func (m measured) String() string {
	return fmt.Sprintf("heap %.1f MiB, resident %.1f MiB (clients and agent included), %d goroutines", float64(m.heap)/(1<<20), float64(m.resident)/(1<<20), m.goroutines)
}

// resident is the memory of the process as the system counts it, 0 where it does not say.
func resident() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}
