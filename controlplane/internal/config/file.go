package config

import (
	"errors"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/certmesh/certmesh/protocol/fault"
)

// yamlFile is a configuration file as it is read: by hand, because the decoder's own errors speak of Go's types.
type yamlFile struct {
	name     string
	settings map[string]setting
	// sections hold the names of what is in them, in order; "" is the file itself.
	sections map[string][]string
	set      map[string]bool
	problems []error
}

type setting struct {
	field reflect.StructField
	value reflect.Value
}

// readFile fills c with what the file says and tells which keys it set. A key without a value says nothing. Every problem
// names the key, the file and the line, and what is allowed.
func readFile(name string, text []byte, c *Config) (set map[string]bool, problems []error) {
	var root yaml.Node
	if err := yaml.Unmarshal(text, &root); err != nil {
		what := strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), "yaml: ")), " ")
		return nil, []error{fault.New(fault.Invalid, "%s is not YAML: %s; write sections and settings as in docs/configuration.md", name, what)}
	}
	f := &yamlFile{name: name, settings: map[string]setting{}, sections: map[string][]string{}, set: map[string]bool{}}
	walk(reflect.ValueOf(c).Elem(), "", func(key string, field reflect.StructField, v reflect.Value) {
		f.settings[key] = setting{field, v}
		section, name, _ := strings.Cut(key, ".")
		if f.sections[section] == nil {
			f.sections[""] = append(f.sections[""], section)
		}
		f.sections[section] = append(f.sections[section], name)
	})
	if len(root.Content) > 0 {
		f.section(root.Content[0], "")
	}
	return f.set, f.problems
}

// problem adds one; @ in the format stands for where it is.
func (f *yamlFile) problem(key string, at *yaml.Node, format string, args ...any) {
	where := " (" + f.name + ", line " + strconv.Itoa(at.Line) + ")"
	f.problems = append(f.problems, fault.InvalidField(key, strings.Replace(format, "@", strings.ReplaceAll(where, "%", "%%"), 1), args...))
}

// section reads a mapping: the file's sections (name "") or a section's settings.
func (f *yamlFile) section(n *yaml.Node, name string) {
	if n = plain(n); n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	allowed := strings.Join(f.sections[name], ", ")
	if n.Kind != yaml.MappingNode {
		if name == "" {
			f.problems = append(f.problems, fault.New(fault.Invalid, "%s holds no sections; write some of %s, each with its settings below it", f.name, allowed))
			return
		}
		f.problem(name, n, "is a section@; write its settings below it: %s", allowed)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		at, value := n.Content[i], n.Content[i+1]
		key := at.Value
		if name != "" {
			key = name + "." + key
		}
		switch {
		case seen[key]:
			f.problem(key, at, "is there twice@; keep one")
		case f.known(key):
			f.setting(key, value)
		case name == "" && f.sections[key] != nil:
			f.section(value, key)
		case name == "":
			f.problem(strconv.Quote(key), at, "is no section@; use one of %s", allowed)
		default:
			f.problem(key, at, "is no setting@; %s has %s", name, allowed)
		}
		seen[key] = true
	}
}

func (f *yamlFile) known(key string) bool {
	_, ok := f.settings[key]
	return ok
}

func (f *yamlFile) setting(key string, n *yaml.Node) {
	s := f.settings[key]
	text, err := textIn(plain(n), s.value.Kind() == reflect.Slice)
	if err == nil && text == nil {
		return
	}
	if err == nil {
		err = setValue(s.value, *text)
	}
	if err != nil {
		said := ""
		if text != nil {
			said = strconv.Quote(shown(s.field, *text)) + " "
		}
		f.problem(key, n, "%s%s@", said, err)
		return
	}
	f.set[key] = true
}

// textIn is a value as setValue takes it; nil when nothing is said.
func textIn(n *yaml.Node, list bool) (*string, error) {
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return nil, nil //nolint:nilnil // a key without a value says nothing
	case n.Kind == yaml.ScalarNode:
		return &n.Value, nil
	case n.Kind == yaml.SequenceNode && list:
		items := make([]string, 0, len(n.Content))
		for _, item := range n.Content {
			if item = plain(item); item.Kind != yaml.ScalarNode || strings.Contains(item.Value, ",") {
				return nil, errors.New("holds something else than plain names")
			}
			items = append(items, item.Value)
		}
		all := strings.Join(items, ",")
		return &all, nil
	case list:
		return nil, errors.New("is not a list such as [a, b]")
	default:
		return nil, errors.New("is not a single value")
	}
}

func plain(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}
