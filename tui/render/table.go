package render

import (
	"slices"
	"strings"
)

// Page is what a command shows to a person: paragraphs, lists of facts and tables, in order.
type Page struct {
	// Colour puts a few states in colour.
	Colour bool
	b      strings.Builder
}

// String is the text so far.
func (p *Page) String() string { return p.b.String() }

// gap separates blocks by an empty line.
func (p *Page) gap() {
	if p.b.Len() > 0 {
		p.b.WriteByte('\n')
	}
}

// Say adds a paragraph of one line.
func (p *Page) Say(line string) {
	p.gap()
	p.b.WriteString(Clean(line))
	p.b.WriteByte('\n')
}

// Line adds a line to the paragraph before it.
func (p *Page) Line(line string) {
	p.b.WriteString(Clean(line))
	p.b.WriteByte('\n')
}

// Fact is a name with its value; one without a value is left out.
type Fact struct{ Name, Value string }

// Facts adds aligned names and values.
func (p *Page) Facts(facts ...Fact) {
	p.gap()
	facts = slices.DeleteFunc(facts, func(f Fact) bool { return f.Value == "" })
	w := 0
	for _, f := range facts {
		w = max(w, width(f.Name))
	}
	for _, f := range facts {
		value := Clean(f.Value)
		p.b.WriteString(f.Name + strings.Repeat(" ", w-width(f.Name)+2) + p.paint(value, value) + "\n")
	}
}

// Table adds rows under headings, in columns as wide as they need to be. Columns that are empty in every row are left
// out, so that a list without errors has no column for them; the first always stays.
func (p *Page) Table(header []string, rows [][]string) {
	p.gap()
	clean := make([][]string, len(rows))
	widths := make([]int, len(header))
	for i, row := range rows {
		clean[i] = make([]string, len(header))
		for j := range header {
			clean[i][j] = Clean(row[j])
			widths[j] = max(widths[j], width(clean[i][j]))
		}
	}
	last := 0
	for j := range header {
		if widths[j] == 0 && j > 0 && len(rows) > 0 {
			continue
		}
		last = j
		widths[j] = max(widths[j], width(header[j]))
	}
	write := func(row []string, paint bool) {
		end := last
		for end > 0 && row[end] == "" {
			end--
		}
		for j, cell := range row {
			if widths[j] == 0 {
				continue
			}
			text := cell
			if paint {
				text = p.paint(cell, cell)
			}
			p.b.WriteString(text)
			if j >= end {
				break
			}
			p.b.WriteString(strings.Repeat(" ", widths[j]-width(cell)+2))
		}
		p.b.WriteByte('\n')
	}
	write(header, false)
	for _, row := range clean {
		write(row, true)
	}
}

const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
	plain  = "\x1b[0m"
)

// tones are the words that are worth a colour.
var tones = map[string]string{
	"Active": green, "Online": green, "Served": green, "Completed": green,
	"Expiring": yellow, "RenewalInProgress": yellow, "Stale": yellow, "Quarantined": yellow,
	"Expired": red, "Failed": red, "Revoked": red, "Offline": red,
}

func (p *Page) paint(word, text string) string {
	if tone := tones[word]; p.Colour && tone != "" {
		return tone + text + plain
	}
	return text
}
