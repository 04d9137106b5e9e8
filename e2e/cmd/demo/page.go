package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/certmesh/certmesh/e2e/estate"
)

// page is what the demonstration prints: one line a step, its time at the left so that the sentences may be long.
type page struct {
	w    io.Writer
	step string
}

func newPage(w io.Writer) *page { return &page{w: w} }

func (p *page) line(format string, args ...any) {
	fmt.Fprintf(p.w, strings.TrimRight("  "+format, " ")+"\n", args...)
}

func (p *page) gap() { fmt.Fprintln(p.w) }

func (p *page) title(s string) { fmt.Fprintf(p.w, "\n  %s\n\n", s) }

// begin remembers the step; a page is read when the step is done, and on a terminal nobody waits long.
func (p *page) begin(step string) { p.step = step }

func (p *page) end(what string, d time.Duration) {
	fmt.Fprintf(p.w, "  %8s  %-14s %s\n", took(d), p.step, what)
}

// fail says which step failed, why, and what the processes said last.
func (p *page) fail(step string, err error, logs string) {
	fmt.Fprintf(p.w, "  %8s  %-14s %v\n", "failed", step, err)
	if logs != "" {
		fmt.Fprintf(p.w, "\n%s", logs)
	}
}

// table prints rows with aligned columns.
func (p *page) table(rows [][]string) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, c := range r {
			b.WriteString(c + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+3))
		}
		p.line("%s", strings.TrimRight(b.String(), " "))
	}
}

// took is a duration with as many digits as a person reads.
func took(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	default:
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
}

// short keeps both ends of a long number or id.
func short(s string) string {
	if len(s) <= 16 {
		return s
	}
	return s[:8] + "…" + s[len(s)-4:]
}

func name(c *x509.Certificate) string {
	return fmt.Sprintf("serial %s, SHA-256 %s, signed by %s", short(estate.Serial(c)), short(estate.Fingerprint(c)), c.Issuer.CommonName)
}

// keyOf is the SHA-256 of the public key.
func keyOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

func until(c *x509.Certificate) string { return c.NotAfter.Local().Format("2 Jan 2006 15:04") }
