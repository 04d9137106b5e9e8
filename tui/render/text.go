package render

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Clean makes s safe for one line of a terminal: control characters, which escape sequences begin with, and characters
// that reorder or hide text are removed; line breaks and tabs become blanks.
func Clean(s string) string {
	if !strings.ContainsFunc(s, unsafe) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n' || r == '\t' || r == '\r' || r == '\u2028' || r == '\u2029' || r == '\u0085':
			b.WriteByte(' ')
		case r == utf8.RuneError:
			b.WriteRune('?')
		case unsafe(r):
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// unsafe characters do something to a terminal other than being shown: control characters (C0, DEL, C1), line and
// paragraph separators, and format characters, among them those that turn the direction of text.
func unsafe(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) || r >= 0xfe00 && r <= 0xfe0f
}

// width is the number of columns that s takes: combining marks take none, East Asian wide characters two.
func width(s string) int {
	n := 0
	for _, r := range s {
		switch {
		case unicode.In(r, unicode.Mn, unicode.Me):
		case wide(r):
			n += 2
		default:
			n++
		}
	}
	return n
}

func wide(r rune) bool {
	return r >= 0x1100 && r <= 0x115f || r >= 0x2e80 && r <= 0xa4cf && r != 0x303f || r >= 0xac00 && r <= 0xd7a3 ||
		r >= 0xf900 && r <= 0xfaff || r >= 0xfe30 && r <= 0xfe6f || r >= 0xff00 && r <= 0xff60 || r >= 0xffe0 && r <= 0xffe6 ||
		r >= 0x1f300 && r <= 0x1f64f || r >= 0x1f900 && r <= 0x1f9ff || r >= 0x20000 && r <= 0x3fffd
}

// short cuts s to n columns, with an ellipsis where something is missing.
func short(s string, n int) string {
	if width(s) <= n {
		return s
	}
	var b strings.Builder
	used := 0
	for _, r := range s {
		used += width(string(r))
		if used > n-1 {
			break
		}
		b.WriteRune(r)
	}
	return b.String() + "…"
}

// sentence makes s end like one.
func sentence(s string) string {
	s = strings.TrimSpace(s)
	if s == "" || strings.HasSuffix(s, ".") || strings.HasSuffix(s, "!") || strings.HasSuffix(s, "?") {
		return s
	}
	return s + "."
}
