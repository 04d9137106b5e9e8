package deptest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
)

// module is the product's import path.
const module = "github.com/certmesh/certmesh"

// pkg is one package as `go list -json` shows it.
type pkg struct {
	ImportPath   string
	Name         string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

// graph is every package that the product's packages need, tests left out.
type graph map[string]pkg

var loadGraph = sync.OnceValues(func() (graph, error) {
	var stdout, stderr bytes.Buffer
	command := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Name,Standard,Imports,TestImports,XTestImports,Deps", "./...")
	command.Dir = "../.."
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.String())
	}
	g := graph{}
	decoder := json.NewDecoder(&stdout)
	for {
		var p pkg
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return g, nil
		} else if err != nil {
			return nil, fmt.Errorf("decode the answer of go list: %w", err)
		}
		g[p.ImportPath] = p
	}
})

func load(t *testing.T) graph {
	t.Helper()
	g, err := loadGraph()
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// folder returns where a package of ours is, below the root; ok is false for anyone else's.
func folder(importPath string) (string, bool) {
	if importPath == module {
		return ".", true
	}
	if below, ok := strings.CutPrefix(importPath, module+"/"); ok {
		return below, true
	}
	return "", false
}

// below reports whether a folder is one of parents or inside one.
func below(folder string, parents ...string) bool {
	return slices.ContainsFunc(parents, func(parent string) bool {
		return folder == parent || strings.HasPrefix(folder, parent+"/")
	})
}

// ours returns the folders of our packages, sorted.
func (g graph) ours() []string {
	var all []string
	for importPath := range g {
		if f, ok := folder(importPath); ok {
			all = append(all, f)
		}
	}
	slices.Sort(all)
	return all
}

// at returns the package in a folder of ours.
func (g graph) at(folder string) pkg {
	if folder == "." {
		return g[module]
	}
	return g[module+"/"+folder]
}

// chain returns a shortest way of imports from one package to another, for the message.
func (g graph) chain(from, to string) string {
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		if queue[0] == to {
			var way []string
			for at := to; at != ""; at = before[at] {
				way = append(way, at)
			}
			slices.Reverse(way)
			return strings.Join(way, " → ")
		}
		for _, next := range g[queue[0]].Imports {
			if _, seen := before[next]; !seen {
				before[next] = queue[0]
				queue = append(queue, next)
			}
		}
	}
	return from + " → … → " + to
}
