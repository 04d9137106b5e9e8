package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
)

// maxLine bounds one statement of a dump, in bytes: bulk statements have 100 rows of placeholders.
const maxLine = 4 << 20

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sqltext:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("sqltext", flag.ContinueOnError)
	root := flags.String("root", ".", "the repository's root")
	dump := flags.String("dump", "", "file of statements that the store's suite executed")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("parse the command line: %w", err)
	}
	texts, err := collect(*root)
	if err != nil {
		return err
	}
	if *dump != "" {
		executed, err := readDump(*dump)
		if err != nil {
			return err
		}
		texts = append(texts, executed...)
	}
	encoder := json.NewEncoder(out)
	for _, t := range texts {
		t.Forbidden = forbidden(t.SQL)
		if err := encoder.Encode(t); err != nil {
			return fmt.Errorf("print a statement: %w", err)
		}
	}
	return nil
}

// readDump reads one JSON string a line, dropping repetitions.
func readDump(name string) ([]text, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open the dump of executed statements: %w", err)
	}
	defer func() { _ = file.Close() }() // only read
	var texts []text
	seen := map[string]bool{}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, maxLine)
	for number := 1; lines.Scan(); number++ {
		var sql string
		if err := json.Unmarshal(lines.Bytes(), &sql); err != nil {
			return nil, fmt.Errorf("%s:%d: want one JSON string: %w", name, number, err)
		}
		if !seen[sql] {
			seen[sql] = true
			texts = append(texts, text{Source: fmt.Sprintf("executed (dump line %d)", number), Kind: executed, SQL: sql})
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return texts, nil
}
