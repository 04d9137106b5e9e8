package main

import "strings"

// lineOf is a statement and the line on which it begins.
type lineOf struct {
	sql  string
	line int
}

// split cuts a file into statements at the semicolons that are outside strings, quoted names and comments.
func split(file string) []lineOf {
	var all []lineOf
	start := 0
	flush := func(end int) {
		body := file[start:end]
		if strings.TrimSpace(plain(body)) != "" {
			lead := len(body) - len(strings.TrimLeft(body, " \t\r\n"))
			all = append(all, lineOf{strings.TrimSpace(body), 1 + strings.Count(file[:start+lead], "\n")})
		}
		start = end + 1
	}
	for at := 0; at < len(file); {
		if length, _ := opaque(file[at:]); length > 0 {
			at += length
			continue
		}
		if file[at] == ';' {
			flush(at)
		}
		at++
	}
	if start < len(file) {
		flush(len(file))
	}
	return all
}

// plain removes comments, empties strings and quoted names, and makes every space one blank.
func plain(sql string) string {
	var b strings.Builder
	for at := 0; at < len(sql); {
		if length, replacement := opaque(sql[at:]); length > 0 {
			b.WriteString(replacement)
			at += length
			continue
		}
		b.WriteByte(sql[at])
		at++
	}
	return strings.Join(strings.Fields(b.String()), " ")
}

// opaque returns the length of the comment, string, quoted name or dollar-quoted body at the beginning of sql, and what
// to show in its place; 0 if there is none.
func opaque(sql string) (length int, replacement string) {
	until := func(end string, from int) int {
		if i := strings.Index(sql[from:], end); i >= 0 {
			return from + i + len(end)
		}
		return len(sql)
	}
	switch {
	case strings.HasPrefix(sql, "--"):
		return until("\n", 2), " "
	case strings.HasPrefix(sql, "/*"):
		return until("*/", 2), " "
	case strings.HasPrefix(sql, "'"):
		return until("'", 1), "''"
	case strings.HasPrefix(sql, `"`):
		end := until(`"`, 1)
		return end, sql[:end]
	case strings.HasPrefix(sql, "$$"):
		return until("$$", 2), "''"
	default:
		return 0, ""
	}
}
