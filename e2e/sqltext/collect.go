package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
)

// kind says where a text comes from, and so what may be asked of it.
type kind string

const (
	// migration is one statement of migrations/cockroach: complete, must parse.
	migration kind = "migration"
	// sqliteMigration is one of migrations/sqlite: another dialect, never parsed by CockroachDB's grammar.
	sqliteMigration kind = "sqlite migration"
	// constantText is a whole constant in the store's source: must parse.
	constantText kind = "constant"
	// fragment is a constant that is continued at run time: only the deny list applies, the dump has the whole.
	fragment kind = "fragment"
	// executed comes from the dump: complete, must parse.
	executed kind = "executed"
)

// text is one statement or a part of one.
type text struct {
	Source string `json:"source"`
	Kind   kind   `json:"kind"`
	SQL    string `json:"sql"`
	// Forbidden holds a sentence for every rule that the text breaks.
	Forbidden []string `json:"forbidden,omitempty"`
}

// statement recognises the beginning of a statement in a Go string. The house writes SQL's words in capitals, which
// tells them from messages.
var statement = regexp.MustCompile(`^\s*(SELECT|INSERT|UPDATE|DELETE|WITH|UPSERT)\s`)

// verb recognises a formatting verb: the text is completed at run time.
var verb = regexp.MustCompile(`%(\[\d+\])?[sdvqt]`)

// collect returns the texts below root, in a fixed order. Folders that do not exist hold none.
func collect(root string) ([]text, error) {
	var all []text
	for _, folder := range []struct {
		path string
		kind kind
	}{{"migrations/cockroach", migration}, {"migrations/sqlite", sqliteMigration}} {
		texts, err := migrations(root, folder.path, folder.kind)
		if err != nil {
			return nil, err
		}
		all = append(all, texts...)
	}
	texts, err := source(root, "controlplane/internal/store")
	return append(all, texts...), err
}

func migrations(root, folder string, k kind) ([]text, error) {
	files, err := filepath.Glob(filepath.Join(root, filepath.FromSlash(folder), "*.sql"))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", folder, err)
	}
	var all []text
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read a migration: %w", err)
		}
		for _, s := range split(string(content)) {
			all = append(all, text{Source: fmt.Sprintf("%s/%s:%d", folder, filepath.Base(name), s.line), Kind: k, SQL: s.sql})
		}
	}
	return all, nil
}

// source collects from the Go files below folder, tests excluded: they may say forbidden things on purpose.
func source(root, folder string) ([]text, error) {
	var all []text
	base := filepath.Join(root, filepath.FromSlash(folder))
	err := filepath.WalkDir(base, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && name == base {
			return fs.SkipAll
		}
		if err != nil || !entry.IsDir() {
			return err
		}
		relative, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		texts, err := goTexts(name, filepath.ToSlash(relative))
		all = append(all, texts...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("collect the store's statements: %w", err)
	}
	return all, nil
}

// goTexts collects from one package. Constants are followed by name within the package.
func goTexts(folder, shown string) ([]text, error) {
	names, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", folder, err)
	}
	set := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, fmt.Errorf("parse the store's source: %w", err)
		}
		files = append(files, file)
	}
	f := folding{constants: map[string]ast.Expr{}}
	for _, file := range files {
		f.declare(file)
	}
	var all []text
	for _, file := range files {
		for _, found := range f.texts(file) {
			at := set.Position(found.pos)
			k := constantText
			if !found.whole {
				k = fragment
			}
			all = append(all, text{Source: fmt.Sprintf("%s:%d", path.Join(shown, filepath.Base(at.Filename)), at.Line), Kind: k, SQL: found.sql})
		}
	}
	return all, nil
}

type foundText struct {
	pos   token.Pos
	sql   string
	whole bool
}

// folding evaluates the string constants of one package.
type folding struct{ constants map[string]ast.Expr }

func (f folding) declare(file *ast.File) {
	for _, declaration := range file.Decls {
		general, ok := declaration.(*ast.GenDecl)
		if !ok || general.Tok != token.CONST {
			continue
		}
		for _, spec := range general.Specs {
			values := spec.(*ast.ValueSpec)
			for i, name := range values.Names {
				if i < len(values.Values) {
					f.constants[name.Name] = values.Values[i]
				}
			}
		}
	}
}

// texts walks a file for the outermost string expressions that begin like a statement.
func (f folding) texts(file *ast.File) []foundText {
	var all []foundText
	continued := map[ast.Expr]bool{}
	ast.Inspect(file, func(node ast.Node) bool {
		if call, ok := node.(*ast.CallExpr); ok {
			// What is written to a builder or formatted is a part of something.
			if selector, ok := call.Fun.(*ast.SelectorExpr); ok &&
				(strings.HasPrefix(selector.Sel.Name, "Write") || strings.HasPrefix(selector.Sel.Name, "Sprint")) {
				for _, argument := range call.Args {
					continued[argument] = true
				}
			}
			return true
		}
		expression, ok := node.(ast.Expr)
		if !ok {
			return true
		}
		switch expression.(type) {
		case *ast.BasicLit, *ast.BinaryExpr:
		default:
			return true
		}
		sql, whole, isText := f.fold(expression, 0)
		if !isText {
			return true
		}
		if statement.MatchString(sql) {
			whole = whole && !continued[expression] && !verb.MatchString(sql)
			all = append(all, foundText{expression.Pos(), sql, whole})
		}
		return false
	})
	return all
}

// maxDepth bounds how far constants are followed; the compiler refuses cycles, a broken tree may hold one.
const maxDepth = 20

// fold evaluates a string expression. whole is false if a part is only known at run time.
func (f folding) fold(expression ast.Expr, depth int) (sql string, whole, isText bool) {
	if depth > maxDepth {
		return "", false, false
	}
	switch e := expression.(type) {
	case *ast.ParenExpr:
		return f.fold(e.X, depth+1)
	case *ast.BasicLit:
		if e.Kind != token.STRING {
			return "", false, false
		}
		return constant.StringVal(constant.MakeFromLiteral(e.Value, token.STRING, 0)), true, true
	case *ast.Ident:
		if value, ok := f.constants[e.Name]; ok {
			return f.fold(value, depth+1)
		}
		return "", false, false
	case *ast.BinaryExpr:
		if e.Op != token.ADD {
			return "", false, false
		}
		left, leftWhole, leftText := f.fold(e.X, depth+1)
		right, rightWhole, rightText := f.fold(e.Y, depth+1)
		return left + right, leftWhole && rightWhole && leftText && rightText, leftText || rightText
	default:
		return "", false, false
	}
}
