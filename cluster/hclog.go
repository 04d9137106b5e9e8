package cluster

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/jonboulle/clockwork"
)

// quiet is how long a message of Raft's is told on the level for details after it was told aloud.
const quiet = time.Minute

// bridge returns a logger for HashiCorp's libraries that writes to log. They tell each step as info and each lost beat as
// an error, many a second while a node is away; what an operator has to know is said by this package. So all is a level
// lower here, and what is said again within a minute is for debugging.
func bridge(log *slog.Logger, clk clockwork.Clock) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Off})
	l.RegisterSink(&sink{log: log, clk: clk, told: map[string]time.Time{}})
	return l
}

type sink struct {
	log *slog.Logger
	clk clockwork.Clock

	mu sync.Mutex
	// told is when a message was last told aloud. Messages are constants of the libraries.
	told map[string]time.Time
}

// aloud reports whether a message may be told on its own level.
func (s *sink) aloud(msg string) bool {
	switch msg {
	case "failed to decode incoming command", "failed to flush response":
		// Somebody hung up.
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clk.Now()
	if at, ok := s.told[msg]; ok && now.Sub(at) < quiet {
		return false
	}
	s.told[msg] = now
	return true
}

// Accept implements hclog.SinkAdapter.
func (s *sink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
		to = slog.LevelWarn
	case hclog.NoLevel, hclog.Trace, hclog.Debug, hclog.Info, hclog.Off:
	}
	if to > slog.LevelDebug && !s.aloud(msg) {
		to = slog.LevelDebug
	}
	ctx := context.TODO() //nolint:forbidigo // hclog carries none, and the handler needs one only for its values.
	if !s.log.Enabled(ctx, to) {
		return
	}
	args = slices.Clone(args)
	for i, a := range args {
		// Formatted values are for hclog's own writer.
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = f[0]
		}
	}
	if name != "" {
		args = append(args, "part", name)
	}
	s.log.Log(ctx, to, msg, args...)
}
