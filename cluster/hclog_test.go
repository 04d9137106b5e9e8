package cluster

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/jonboulle/clockwork"
)

// TestBridge: what Raft says many times a second is in the log once a minute.
func TestBridge(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	clk := clockwork.NewFakeClock()
	l := bridge(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo})), clk)
	for range 3 {
		l.Debug("entering follower state")
		l.Info("entering candidate state")
		l.Error("failed to heartbeat to", "peer", "n2", "backoff time", 10*time.Millisecond, "raw", hclog.Fmt("%x", 3))
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `level=WARN msg="failed to heartbeat to" peer=n2`) {
		t.Errorf("%s", got)
	}
	clk.Advance(quiet)
	l.Error("failed to heartbeat to", "peer", "n2")
	if got := out.String(); strings.Count(got, "\n") != 2 {
		t.Errorf("a minute later: %s", got)
	}
}
