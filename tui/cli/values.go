package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// span is a duration flag that knows days.
type span struct{ d *time.Duration }

func newSpan(d *time.Duration, value time.Duration) *span {
	*d = value
	return &span{d}
}

func (s *span) Type() string { return "DURATION" }

func (s *span) String() string {
	if s.d == nil {
		return ""
	}
	text := s.d.String()
	// 1h0m0s reads badly in help.
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

func (s *span) Set(text string) error {
	if days, found := strings.CutSuffix(text, "d"); found {
		n, err := strconv.Atoi(days)
		if err != nil || n < 0 || n > 100_000 {
			return errors.New("give a duration such as 90s, 15m, 12h or 7d")
		}
		*s.d = time.Duration(n) * 24 * time.Hour
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("give a duration such as 90s, 15m, 12h or 7d")
	}
	*s.d = d
	return nil
}

// moment reads a flag that names a time: a duration from now, a day (it begins at 0:00 UTC) or a time. None is nil.
func moment(flag, text string, now time.Time) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	var d time.Duration
	if newSpan(&d, 0).Set(text) == nil {
		return timestamppb.New(now.Add(d)), nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if at, err := time.Parse(layout, text); err == nil {
			return timestamppb.New(at), nil
		}
	}
	return nil, misuse("%s: %q is no time; give 30d or 12h from now, a day such as 2027-01-31, or 2027-01-31T12:00:00Z", flag, text)
}

// maxInput bounds the files that flags name; the server takes documents of 64 KiB.
const maxInput = 64 << 10

// readFile reads what a flag or variable names.
func readFile(flag, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", misuse("%s: %s; name a file that can be read", flag, cause(err))
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxInput+1))
	if err != nil {
		return "", misuse("%s: %s; name a file that can be read", flag, cause(err))
	}
	if len(data) > maxInput {
		return "", misuse("%s: %s is larger than %d KiB; name another file", flag, path, maxInput>>10)
	}
	return string(data), nil
}

// cause is an error of the file system without the name of the system call.
func cause(err error) string {
	if p, isPath := errors.AsType[*os.PathError](err); isPath {
		return fmt.Sprintf("%s: %s", p.Path, p.Err)
	}
	return err.Error()
}

// words completes the values of a flag from a fixed list.
func words(cmd *cobra.Command, flag string, values ...string) {
	// It fails only for flags that do not exist; a test completes each.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
