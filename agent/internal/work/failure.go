package work

import (
	"context"
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	maxMessage = 1 << 10
	maxOutput  = 4 << 10
)

// outputer is implemented by errors that carry the output of a command.
type outputer interface{ Output() string }

// FailureOf translates err for the wire: its class, one sentence, and a bounded tail of a command's output. Causes that
// are not meant for users stay in the log.
func FailureOf(err error) *agentpb.Failure {
	f := &agentpb.Failure{Class: string(fault.ClassOf(err))}
	var fe *fault.Error
	switch {
	case errors.As(err, &fe):
		f.Message = fe.Message
		if fe.Field != "" {
			f.Message = fe.Field + ": " + f.Message
		}
	case errors.Is(err, context.DeadlineExceeded):
		f.Message = "it took too long"
	case errors.Is(err, context.Canceled):
		f.Message = "it was cancelled"
	default:
		f.Message = "the agent met an unexpected error; its log has the details"
	}
	f.Message = clean(f.Message, maxMessage, false)
	var o outputer
	if errors.As(err, &o) {
		f.Output = clean(o.Output(), maxOutput, true)
	}
	return f
}

// clean makes text fit for the wire: valid UTF-8, no control characters (lines stay where lines are meant to be), no
// private key, at most most bytes. Of output the tail is kept, of a sentence the beginning.
func clean(s string, most int, lines bool) string {
	if strings.Contains(s, "PRIVATE KEY") {
		return "(withheld: the text contains a private key)"
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case lines && (r == '\n' || r == '\t'):
			return r
		case r == '\n' || r == '\t':
			return ' '
		case r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return -1
		default:
			return r
		}
	}, strings.ToValidUTF8(s, ""))
	s = strings.TrimSpace(s)
	switch {
	case len(s) <= most:
		return s
	case lines:
		s = s[len(s)-most:]
	default:
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "")
}
