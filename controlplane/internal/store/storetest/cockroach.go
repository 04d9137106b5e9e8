package storetest

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/cockroach-go/v2/testserver"
)

// roach is the CockroachDB that this test binary started from COCKROACH_BINARY.
var roach struct {
	sync.Mutex
	server testserver.TestServer
	err    error
}

// cockroachURL returns the server to test on: the one that COCKROACH_URL names, or one started from COCKROACH_BINARY, once
// a test binary. Empty: neither is set.
func cockroachURL(t testing.TB) string {
	t.Helper()
	if base := os.Getenv("COCKROACH_URL"); base != "" {
		return base
	}
	binary := os.Getenv("COCKROACH_BINARY")
	if binary == "" {
		return ""
	}
	roach.Lock()
	defer roach.Unlock()
	if roach.server == nil && roach.err == nil {
		roach.server, roach.err = testserver.NewTestServer(testserver.CockroachBinaryPathOpt(binary), testserver.NonStableDbOpt())
	}
	if roach.err != nil {
		t.Fatalf("COCKROACH_BINARY=%s does not start: %v", binary, roach.err)
	}
	return roach.server.PGURL().String()
}

func stopCockroach() {
	roach.Lock()
	defer roach.Unlock()
	if roach.server != nil {
		roach.server.Stop()
	}
}

func newCockroach(t testing.TB, base string) string {
	t.Helper()
	dsn, name := newDatabase(t, base, "")
	t.Cleanup(func() {
		if err := dropDatabase(context.WithoutCancel(t.Context()), base, name); err != nil {
			t.Error(err)
		}
	})
	return "cockroach" + strings.TrimPrefix(dsn, "postgres")
}
