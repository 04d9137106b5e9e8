package main

import (
	"io"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/perf/benchfmt"
)

// results are what benchmarks reported: name → unit → values, in the order of their appearance.
type results struct {
	cores  int
	names  []string
	values map[string]map[string][]float64
	units  map[string][]string
	cpu    string
}

func newResults() results {
	return results{cores: runtime.NumCPU(), values: map[string]map[string][]float64{}, units: map[string][]string{}}
}

var processors = regexp.MustCompile(`-\d+$`)

// read adds the results in the text that go test printed.
func (r *results) read(text io.Reader) error {
	in := benchfmt.NewReader(text, "go test")
	for in.Scan() {
		res, ok := in.Result().(*benchfmt.Result)
		if !ok {
			continue // a line of another kind
		}
		if r.cpu == "" {
			r.cpu = res.GetConfig("cpu")
		}
		name := processors.ReplaceAllString(string(res.Name.Full()), "")
		if r.values[name] == nil {
			r.names = append(r.names, name)
			r.values[name] = map[string][]float64{}
		}
		for _, v := range res.Values {
			value, unit := v.Value, v.Unit
			if v.OrigUnit != "" { // benchfmt turns ns into sec
				value, unit = v.OrigValue, v.OrigUnit
			}
			if !slices.Contains(r.units[name], unit) {
				r.units[name] = append(r.units[name], unit)
			}
			r.values[name][unit] = append(r.values[name][unit], value)
		}
	}
	return in.Err()
}

// median of a benchmark's values in a unit.
func (r *results) median(name, unit string) (float64, bool) {
	v := slices.Sorted(slices.Values(r.values[name][unit]))
	if len(v) == 0 {
		return 0, false
	}
	if len(v)%2 == 1 {
		return v[len(v)/2], true
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2, true
}

// more reports whether a greater value of the unit is better: rates are, all else is time, memory or counts.
func more(unit string) bool { return strings.HasSuffix(unit, "/s") }
