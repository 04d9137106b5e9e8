package target

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

// maxSettings bounds the settings of one target, in bytes.
const maxSettings = 64 << 10

// Define makes a Kind out of a settings struct and what it does with it.
//
// S has exported fields of type string, bool, int or []string (or embedded structs of such) with the tags
//
//	json:"name"      the key; no other spelling of it is accepted
//	doc:"…"          one sentence for help, forms and the reference page
//	default:"…"      the value of a key that is absent or null; a []string default is JSON
//
// check reports every problem of settings that could be decoded, touching neither network nor disk; it may be nil. open
// is called with settings that passed. Define panics when S is not such a struct: that is a defect of the program.
func Define[S any](name string, version int, facts Facts, check func(S) []Problem, open func(context.Context, Env, S) (Target, error)) Kind {
	fields := settingsOf(reflect.TypeFor[S](), nil)
	decode := func(raw json.RawMessage) (S, []Problem) {
		var s S
		problems, damaged := fill(reflect.ValueOf(&s).Elem(), fields, raw)
		if !damaged && check != nil {
			problems = append(problems, check(s)...)
		}
		return s, problems
	}
	k := Kind{Name: name, Version: version, Facts: facts}
	k.Check = func(raw json.RawMessage) []Problem {
		_, ps := decode(raw)
		return ps
	}
	k.Open = func(ctx context.Context, env Env, raw json.RawMessage) (Target, error) {
		s, ps := decode(raw)
		if len(ps) > 0 {
			e := fault.InvalidField(ps[0].Field, "%s", ps[0].Message)
			for _, p := range ps[1:] {
				e.Message += "; " + p.Field + ": " + p.Message
			}
			return nil, e
		}
		return open(ctx, env, s)
	}
	for _, f := range fields {
		k.Schema = append(k.Schema, SettingDoc{Name: f.name, Type: typeWord(f.typ), Default: f.def, Doc: f.doc})
	}
	return k
}

// DecodeSettings decodes raw as the Kind made by Define does, without check: strictly and with defaults.
func DecodeSettings[S any](raw json.RawMessage) (S, []Problem) {
	var s S
	ps, _ := fill(reflect.ValueOf(&s).Elem(), settingsOf(reflect.TypeFor[S](), nil), raw)
	return s, ps
}

type setting struct {
	name, def, doc string
	typ            reflect.Type
	index          []int
}

var (
	stringType = reflect.TypeFor[string]()
	boolType   = reflect.TypeFor[bool]()
	intType    = reflect.TypeFor[int]()
	listType   = reflect.TypeFor[[]string]()
)

func typeWord(t reflect.Type) string {
	switch t {
	case boolType:
		return "boolean"
	case intType:
		return "integer"
	case listType:
		return "list of strings"
	default:
		return "string"
	}
}

func settingsOf(t reflect.Type, at []int) []setting {
	if t.Kind() != reflect.Struct {
		panic("target.Define: settings must be a struct, not " + t.String())
	}
	var out []setting
	for i := range t.NumField() {
		f := t.Field(i)
		index := append(append([]int(nil), at...), i)
		if f.Anonymous {
			out = append(out, settingsOf(f.Type, index)...)
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		s := setting{name: name, def: f.Tag.Get("default"), doc: f.Tag.Get("doc"), typ: f.Type, index: index}
		switch {
		case !f.IsExported() || name == "" || s.doc == "":
			panic("target.Define: " + t.String() + "." + f.Name + " must be exported and have the tags json and doc")
		case f.Type != stringType && f.Type != boolType && f.Type != intType && f.Type != listType:
			panic("target.Define: " + t.String() + "." + f.Name + " has an unknown type")
		case s.set(reflect.New(f.Type).Elem()) != nil:
			panic("target.Define: " + t.String() + "." + f.Name + " has a default that does not fit its type")
		}
		for _, o := range out {
			if o.name == name {
				panic("target.Define: two settings are called " + name)
			}
		}
		out = append(out, s)
	}
	return out
}

// set gives v its default.
func (s setting) set(v reflect.Value) error {
	if s.def == "" {
		return nil
	}
	switch s.typ {
	case boolType:
		b, err := strconv.ParseBool(s.def)
		v.SetBool(b)
		return err
	case intType:
		n, err := strconv.Atoi(s.def)
		v.SetInt(int64(n))
		return err
	case listType:
		return json.Unmarshal([]byte(s.def), v.Addr().Interface())
	default:
		v.SetString(s.def)
		return nil
	}
}

// fill decodes raw into v. damaged says that v lacks something that was given, so that further checks would mislead.
func fill(v reflect.Value, fields []setting, raw json.RawMessage) (problems []Problem, damaged bool) {
	for _, f := range fields {
		if err := f.set(v.FieldByIndex(f.index)); err != nil {
			return []Problem{{f.name, "has a default that does not fit its type"}}, true
		}
	}
	if len(raw) > maxSettings {
		return []Problem{{"", fmt.Sprintf("the settings have %d bytes; at most %d are accepted", len(raw), maxSettings)}}, true
	}
	if raw = bytes.TrimSpace(raw); len(raw) == 0 || string(raw) == "null" {
		return nil, false
	}
	seen := map[string]bool{}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return []Problem{{"", "the settings must be one JSON object, such as {\"dir\": \"/etc/ssl/site\"}"}}, true
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return append(problems, notJSON(err)), true
		}
		name, _ := key.(string)
		var val json.RawMessage
		if err := dec.Decode(&val); err != nil {
			return append(problems, notJSON(err)), true
		}
		i := indexOf(fields, name)
		switch {
		case i < 0:
			problems = append(problems, Problem{printable(name, 64), unknown(fields, name)})
		case seen[name]:
			problems, damaged = append(problems, Problem{name, "is given twice; give it once"}), true
		default:
			seen[name] = true
			f := fields[i]
			if string(val) == "null" {
				continue
			}
			if err := decodeValue(v.FieldByIndex(f.index), f.typ, val); err != nil {
				problems, damaged = append(problems, Problem{name, err.Error()}), true
			}
		}
	}
	if _, err := dec.Token(); err != nil {
		return append(problems, notJSON(err)), true
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return append(problems, Problem{"", "something follows the JSON object; give one object"}), true
	}
	return problems, damaged
}

func notJSON(err error) Problem {
	return Problem{"", "the settings are not valid JSON: " + printable(err.Error(), 200)}
}

func indexOf(fields []setting, name string) int {
	for i, f := range fields {
		if f.name == name {
			return i
		}
	}
	return -1
}

// unknown says what is known instead; a key in another case or with dashes is a likely slip.
func unknown(fields []setting, name string) string {
	plain := strings.NewReplacer("-", "_", " ", "_").Replace(strings.ToLower(name))
	var names []string
	for _, f := range fields {
		if f.name == plain {
			return "is not a setting of this kind; did you mean " + f.name + "?"
		}
		names = append(names, f.name)
	}
	return "is not a setting of this kind; it knows " + strings.Join(names, ", ")
}

func decodeValue(v reflect.Value, t reflect.Type, raw json.RawMessage) error {
	if t == listType {
		// A null among the elements would silently become an empty argument.
		var list []*string
		if err := json.Unmarshal(raw, &list); err != nil {
			return errors.New(`must be a list of strings, such as ["systemctl", "reload", "haproxy"]`)
		}
		out := make([]string, len(list))
		for i, p := range list {
			if p == nil {
				return errors.New("must be a list of strings; it contains null")
			}
			out[i] = *p
		}
		v.Set(reflect.ValueOf(out))
		return nil
	}
	if err := json.Unmarshal(raw, v.Addr().Interface()); err != nil {
		article := "a "
		if t == intType {
			article = "an "
		}
		return errors.New("must be " + article + typeWord(t))
	}
	return nil
}
