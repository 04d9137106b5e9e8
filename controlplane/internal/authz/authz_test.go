package authz

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func TestEveryMethodHasARow(t *testing.T) {
	t.Parallel()
	found := map[string]bool{}
	services := operatorpb.File_operator_v1_operator_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			name := "/" + string(s.FullName()) + "/" + string(s.Methods().Get(j).Name())
			found[name] = true
			if _, ok := PermissionOf(name); !ok {
				t.Errorf("%s has no row in the table of permissions: decide who may call it", name)
			}
		}
	}
	for name := range methods {
		if !found[name] {
			t.Errorf("%s has a row, but the API has no such method", name)
		}
	}
}

func TestRolesInclude(t *testing.T) {
	t.Parallel()
	for method, p := range methods {
		if Viewer.May(p) && !Operator.May(p) || Operator.May(p) && !Admin.May(p) {
			t.Errorf("%s: a lower role may what a higher one may not", method)
		}
		if !Admin.May(p) {
			t.Errorf("%s: no role may call it", method)
		}
		if Role("stranger").May(p) || Role("").May(p) {
			t.Errorf("%s: an unknown role may call it", method)
		}
	}
	if _, ok := PermissionOf("/certmesh.operator.v1.CertificatesService/Nothing"); ok {
		t.Error("an unknown method has a permission")
	}
}

type oneKey struct {
	key domain.APIKey
	err error
}

func (k oneKey) APIKeyByHash(_ context.Context, hash []byte) (domain.APIKey, error) {
	if k.err != nil {
		return domain.APIKey{}, k.err
	}
	if string(hash) != string(k.key.Hash) {
		return domain.APIKey{}, fault.New(fault.NotFound, "no such key")
	}
	return k.key, nil
}

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 9, 0, 0, 0, time.UTC)
	key, stored, err := NewKey("ci", Operator, now.Add(time.Hour), now)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(key, string(stored.Hash)) || len(stored.Hash) != 32 {
		t.Fatal("what is stored is not a hash")
	}
	_, other, err := NewKey("other", Viewer, time.Time{}, now)
	if err != nil {
		t.Fatal(err)
	}
	revoked := stored
	revoked.RevokedAt = now
	swapped := stored
	swapped.ID = other.ID
	tests := []struct {
		name string
		keys oneKey
		key  string
		at   time.Time
		want fault.Class
		says string
	}{
		{"good", oneKey{key: stored}, key, now, "", ""},
		{"empty", oneKey{key: stored}, "", now, fault.Unauthorized, "not known"},
		{"garbage", oneKey{key: stored}, "cmk1..", now, fault.Unauthorized, "not known"},
		{"a join token", oneKey{key: stored}, strings.Replace(key, "cmk1", "cmjt1", 1), now, fault.Unauthorized, "not known"},
		{"wrong secret", oneKey{key: stored}, key[:len(key)-1] + "!", now, fault.Unauthorized, "not known"},
		{"right secret, another id", oneKey{key: swapped}, key, now, fault.Unauthorized, "not known"},
		{"expired", oneKey{key: stored}, key, now.Add(time.Hour), fault.Unauthorized, "expired"},
		{"revoked", oneKey{key: revoked}, key, now, fault.Unauthorized, "revoked"},
		{"store down", oneKey{err: fault.New(fault.Retryable, "the store does not answer")}, key, now, fault.Retryable, "store"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, err := Authenticate(t.Context(), tt.keys, tt.key, tt.at)
			if got := fault.ClassOf(err); got != tt.want {
				t.Fatalf("class %q, want %q (%v)", got, tt.want, err)
			}
			if err != nil {
				if !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%q does not say %q", err, tt.says)
				}
				return
			}
			if p.Actor() != "operator:ci" || p.Role != Operator {
				t.Errorf("principal %+v", p)
			}
		})
	}
}

func TestNewKeyRefuses(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "-x", "a b", "a\nb", strings.Repeat("a", 65)} {
		if _, _, err := NewKey(name, Admin, time.Time{}, time.Time{}); !fault.Is(err, fault.Invalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, _, err := NewKey("x", "root", time.Time{}, time.Time{}); !fault.Is(err, fault.Invalid) {
		t.Errorf("role: %v", err)
	}
}

func TestJoinToken(t *testing.T) {
	t.Parallel()
	secret := NewSecret()
	token := JoinTokenString("jt_1", secret, strings.Repeat("ab", 32))
	id, got, fp, err := ParseJoinToken(token)
	if err != nil || id != "jt_1" || got != secret || fp != strings.Repeat("ab", 32) {
		t.Fatalf("%q %q %q %v", id, got, fp, err)
	}
	for _, bad := range []string{"", "cmjt1", token + ".x", token[:len(token)-1], "cmk1" + token[5:], "cmjt1.." + secret + "." + fp} {
		if _, _, _, err := ParseJoinToken(bad); !fault.Is(err, fault.Unauthorized) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
