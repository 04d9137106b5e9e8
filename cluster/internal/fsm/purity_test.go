package fsm_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// allowed are the packages whose functions return the same for the same arguments on every node.
var allowed = map[string]bool{
	"bytes": true, "cmp": true, "errors": true, "fmt": true, "slices": true, "strings": true,
	"google.golang.org/protobuf/proto":                 true,
	"github.com/certmesh/certmesh/protocol/cluster/v1": true,
	"github.com/certmesh/certmesh/protocol/fault":      true,
}

// impure returns what in a file could make two nodes differ.
func impure(t *testing.T, name string, source any) []string {
	t.Helper()
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, name, source, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	report := func(at ast.Node, what string) { found = append(found, files.Position(at.Pos()).String()+": "+what) }
	for _, i := range f.Imports {
		if path, _ := strconv.Unquote(i.Path.Value); !allowed[path] {
			report(i, "imports "+path+": no clock, randomness, I/O or log decides here")
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n.(type) {
		case *ast.GoStmt, *ast.SelectStmt, *ast.SendStmt, *ast.ChanType:
			report(n, "goroutines and channels have no order that nodes share")
		case *ast.MapType:
			report(n, "maps are walked in another order on every node: use sorted slices")
		}
		return true
	})
	return found
}

func TestPure(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	looked := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		looked++
		for _, found := range impure(t, name, nil) {
			t.Error(found)
		}
	}
	if looked == 0 {
		t.Error("nothing was looked at")
	}
}

// TestPureCanFail guards the guard.
func TestPureCanFail(t *testing.T) {
	t.Parallel()
	for _, source := range []string{
		`package p; import "time"; var now = time.Now`,
		`package p; import "math/rand/v2"; var n = rand.Int`,
		`package p; import "os"; var e = os.Getenv`,
		`package p; func f() { go f() }`,
		`package p; func f(m map[string]int) { for range m { } }`,
		`package p; func f(c chan int) { c <- 1 }`,
	} {
		if len(impure(t, "x.go", source)) == 0 {
			t.Errorf("passes: %s", source)
		}
	}
}
