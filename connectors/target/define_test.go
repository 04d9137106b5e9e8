package target_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

type inner struct {
	Name string `json:"name" default:"x" doc:"A name."`
}

type settings struct {
	inner2
	Count int      `json:"count" default:"3" doc:"A number."`
	On    bool     `json:"on" default:"true" doc:"A switch."`
	List  []string `json:"list" default:"[\"a\",\"b\"]" doc:"A list."`
	Path  string   `json:"some_path" doc:"A path."`
}

type inner2 struct{ Inner }

// Inner is embedded twice over.
type Inner = inner

func kind(seen *settings) target.Kind {
	return target.Define("test", 7, target.Facts{Undo: true}, func(s settings) []target.Problem {
		*seen = s
		if s.Count > 100 {
			return []target.Problem{{Field: "count", Message: "is too much"}}
		}
		return nil
	}, func(_ context.Context, _ target.Env, s settings) (target.Target, error) {
		*seen = s
		return nil, nil
	})
}

func TestDefine(t *testing.T) {
	t.Parallel()
	var s settings
	k := kind(&s)
	if k.Name != "test" || k.Version != 7 || !k.Facts.Undo {
		t.Errorf("%+v", k)
	}
	if got := fmt.Sprint(k.Schema); got != "[{name string x A name.} {count integer 3 A number.} {on boolean true A switch.} {list list of strings [\"a\",\"b\"] A list.} {some_path string  A path.}]" {
		t.Error(got)
	}
	want := func(doc, text string) {
		t.Helper()
		s = settings{}
		if ps := k.Check(json.RawMessage(doc)); len(ps) > 0 {
			t.Errorf("%s: %v", doc, ps)
		}
		if got := strings.TrimSuffix(fmt.Sprintln(s.Name, s.Count, s.On, s.List, s.Path), "\n"); got != text {
			t.Errorf("%s: %s, want %s", doc, got, text)
		}
		first := s
		if _, err := k.Open(t.Context(), target.Env{}, json.RawMessage(doc)); err != nil || fmt.Sprint(first) != fmt.Sprint(s) {
			t.Errorf("%s: opened with %v, %v", doc, s, err)
		}
	}
	for _, none := range []string{"", " ", "null", "{}", ` { } `, `{"count":null,"list":null}`} {
		want(none, "x 3 true [a b] ")
	}
	want(`{"name":"","count":0,"on":false,"list":[],"some_path":"/p"}`, " 0 false [] /p")
	want(`{"list":["c"],"name":"é"}`, "é 3 true [c] ")
	// Defaults are not shared between calls.
	s.List[0] = "changed"
	want(`{}`, "x 3 true [a b] ")
}

func TestDefineProblems(t *testing.T) {
	t.Parallel()
	var s settings
	k := kind(&s)
	for doc, want := range map[string][]string{
		`{"nope":1}`:                     {"nope: is not a setting of this kind; it knows name, count, on, list, some_path"},
		`{"Count":1}`:                    {"Count: is not a setting of this kind; did you mean count?"},
		`{"some-path":"x"}`:              {"some-path: is not a setting of this kind; did you mean some_path?"},
		`{"count":"1"}`:                  {"count: must be an integer"},
		`{"count":1.5}`:                  {"count: must be an integer"},
		`{"count":99999999999999999999}`: {"count: must be an integer"},
		`{"on":"yes"}`:                   {"on: must be a boolean"},
		`{"name":1}`:                     {"name: must be a string"},
		`{"list":"a b"}`:                 {`list: must be a list of strings, such as ["systemctl", "reload", "haproxy"]`},
		`{"list":["a",null]}`:            {"list: must be a list of strings; it contains null"},
		`{"list":[["a"]]}`:               {`list: must be a list of strings, such as ["systemctl", "reload", "haproxy"]`},
		`{"count":1,"count":2}`:          {"count: is given twice; give it once"},
		`{"count":200,"x":1,"y":2}`:      {"x: is not", "y: is not", "count: is too much"},
		`{"count":"a","on":3,"z":1}`:     {"count: must be an integer", "on: must be a boolean", "z: is not"},
		`{"count":1}{}`:                  {": something follows"},
		`[]`:                             {": the settings must be one JSON object"},
		`{"count":1`:                     {": the settings are not valid JSON"},
		`{"a\u0000\u001b[31mb":1}`:       {"a[31mb: is not a setting"},
	} {
		ps := k.Check(json.RawMessage(doc))
		var got []string
		for _, p := range ps {
			got = append(got, p.Field+": "+p.Message)
		}
		if len(got) != len(want) || slices.ContainsFunc(want, func(w string) bool {
			return !slices.ContainsFunc(got, func(g string) bool { return strings.HasPrefix(g, w) })
		}) {
			t.Errorf("%s: %q\nwant %q", doc, got, want)
		}
		_, err := k.Open(t.Context(), target.Env{}, json.RawMessage(doc))
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: opened: %v", doc, err)
		}
		for _, p := range ps {
			if err != nil && !strings.Contains(err.Error(), p.Message) {
				t.Errorf("%s: the error keeps %q to itself: %v", doc, p.Message, err)
			}
		}
	}
}

func panics[S any](t *testing.T) {
	t.Helper()
	defer func() {
		if recover() == nil {
			var s S
			t.Errorf("%T is accepted", s)
		}
	}()
	target.Define("test", 1, target.Facts{}, nil, func(context.Context, target.Env, S) (target.Target, error) { return nil, nil })
}

// TestDefineDefects: a settings struct that cannot work is found when the program starts, not when someone uses it.
func TestDefineDefects(t *testing.T) {
	t.Parallel()
	panics[string](t)
	panics[struct {
		A string `json:"a"`
	}](t)
	panics[struct {
		A string `doc:"A."`
	}](t)
	panics[struct {
		a string `doc:"A."` // that is what is tested
	}](t)
	panics[struct {
		A float64 `json:"a" doc:"A."`
	}](t)
	panics[struct {
		A int `json:"a" default:"x" doc:"A."`
	}](t)
	panics[struct {
		A []string `json:"a" default:"x" doc:"A."`
	}](t)
	panics[struct {
		Inner
		Name string `json:"name" doc:"It again."`
	}](t)
}
