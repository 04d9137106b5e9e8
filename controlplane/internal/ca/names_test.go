package ca

import (
	"strconv"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestNamesAreCanonicalOrRefused(t *testing.T) {
	t.Parallel()
	got, err := CheckNames(domain.Names{CommonName: "Web.Example.Test", DNS: []string{"A.example.test", "a.EXAMPLE.test"}, IP: []string{"2001:DB8:0::1", "::ffff:192.0.2.1"}})
	if err != nil || strings.Join(got.DNS, " ") != "a.example.test web.example.test" || strings.Join(got.IP, " ") != "2001:db8::1 192.0.2.1" {
		t.Errorf("%+v, %v", got, err)
	}
	for name, n := range map[string]domain.Names{
		"nothing": {}, "only a description": {CommonName: "Anna Example"}, "inner wildcard": {DNS: []string{"a.*.test"}}, "bare wildcard": {DNS: []string{"*"}},
		"partial wildcard": {DNS: []string{"w*.test"}}, "trailing dot": {DNS: []string{"a.test."}}, "address": {DNS: []string{"192.0.2.1"}}, "number": {DNS: []string{"a.1"}},
		"underscore": {DNS: []string{"a_b.test"}}, "unicode": {DNS: []string{"bücher.test"}}, "newline": {DNS: []string{"a\nb"}}, "long label": {DNS: []string{strings.Repeat("a", 64) + ".test"}},
		"long name": {DNS: []string{strings.Repeat("a.", 130) + "test"}}, "zone": {IP: []string{"fe80::1%eth0"}}, "unspecified": {IP: []string{"0.0.0.0"}}, "mask": {IP: []string{"10.0.0.0/8"}},
		"no at": {Email: []string{"anna"}}, "quoted": {Email: []string{`"a b"@x.test`}}, "relative": {URI: []string{"/x"}}, "no host": {URI: []string{"https:///x"}},
		"password": {URI: []string{"https://u:p@x.test/"}}, "control in the common name": {CommonName: "a\x00b", DNS: []string{"a.test"}}, "long common name": {CommonName: strings.Repeat("x", 65), DNS: []string{"a.test"}},
		"too many": {DNS: manyNames(101)},
	} {
		if out, err := CheckNames(n); !fault.Is(err, fault.Invalid) || !strings.HasPrefix(fieldOf(err), "names") {
			t.Errorf("%s: %+v, %v", name, out, err)
		}
	}
}

func manyNames(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = "n" + strconv.Itoa(i) + ".example.test"
	}
	return out
}
