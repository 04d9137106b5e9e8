package cluster

import (
	"context"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// bridge returns a logger for HashiCorp's libraries that writes to log. They tell each step as info and each lost beat as
// an error; what an operator has to know is said by this package, so all is one or two levels lower here.
func bridge(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Off})
	l.RegisterSink(sink{log})
	return l
}

type sink struct{ log *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s sink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
		to = slog.LevelWarn
	case hclog.NoLevel, hclog.Trace, hclog.Debug, hclog.Info, hclog.Off:
	}
	ctx := context.TODO() //nolint:forbidigo // hclog carries none, and the handler needs one only for its values.
	if !s.log.Enabled(ctx, to) {
		return
	}
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
