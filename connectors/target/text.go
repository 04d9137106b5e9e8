package target

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/certmesh/certmesh/protocol/fault"
)

// printable makes text from elsewhere fit for a sentence: one line, no control or formatting characters, at most most
// bytes of its beginning.
func printable(s string, most int) string {
	s = strings.TrimSpace(clean(s, false))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// clean drops what a terminal or a log could be fooled by; with lines, line ends and tabs stay.
func clean(s string, lines bool) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			if lines {
				return r
			}
			return ' '
		case r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return -1
		default:
			return r
		}
	}, strings.ToValidUTF8(s, ""))
}

// Sentence is what a person may read of err: the message of its class, not its causes.
func Sentence(err error) string {
	if fe, ok := errors.AsType[*fault.Error](err); ok {
		return fe.Message
	}
	return printable(err.Error(), 300)
}
