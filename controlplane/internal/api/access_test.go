package api

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestEveryMethodWorks(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		r := newRig(t).estate(t)
		if _, err := m.call(r.as(t, authz.Admin), t, r.conn, good); err != nil {
			t.Error(err)
		}
	})
}

// TestEveryMethodRefusesStrangers: no way of not having a good key leads in, and nothing is changed.
func TestEveryMethodRefusesStrangers(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	admin := r.keys[authz.Admin]
	wrong := admin[:len(admin)-4] + "AAAA"
	credentials := []struct{ name, authorization, says string }{
		{"none", "", "an API key is needed"},
		{"empty", "Bearer ", "not known"},
		{"no scheme", admin, "must be: Bearer"},
		{"another scheme", "Basic " + admin, "must be: Bearer"},
		{"wrong secret", "Bearer " + wrong, "not known"},
		{"half a key", "Bearer " + admin[:20], "not known"},
		{"join token", "Bearer " + strings.Replace(admin, "cmk1", "cmjt1", 1), "not known"},
		{"SQL", "Bearer cmk1.' OR 1=1 --." + strings.Repeat("a", 43), "not known"},
		{"long", "Bearer " + strings.Repeat("a", 4096), "not known"},
		{"expired", "Bearer " + r.addKey(t, "old", authz.Admin, start.Add(time.Nanosecond*1000), false), ""},
		{"revoked", "Bearer " + r.addKey(t, "gone", authz.Admin, time.Time{}, true), "revoked"},
	}
	r.clock.Advance(time.Minute)
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		for _, c := range credentials {
			_, err := m.call(r.with(t, c.authorization), t, r.conn, good)
			wantCode(t, err, codes.Unauthenticated, c.says)
			if infoOf(err).GetMetadata()["class"] != string(fault.Unauthorized) {
				t.Errorf("%s: %v", c.name, infoOf(err))
			}
		}
		two := metadata.AppendToOutgoingContext(r.as(t, authz.Admin), "authorization", "Bearer "+admin)
		_, err := m.call(two, t, r.conn, good)
		wantCode(t, err, codes.Unauthenticated)
	})
	t.Cleanup(func() {
		for _, e := range r.store.trail() {
			if e.Outcome == "ok" {
				t.Errorf("something was changed: %+v", e)
			}
		}
	})
}

// TestEveryMethodAsksForItsPermission: a role gets in exactly where the table says so.
func TestEveryMethodAsksForItsPermission(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, m method, good proto.Message) {
		need, ok := authz.PermissionOf(m.name)
		if !ok {
			t.Fatal("no permission")
		}
		for _, role := range []authz.Role{authz.Viewer, authz.Operator, authz.Approver, authz.Admin} {
			r := newRig(t).estate(t)
			_, err := m.call(r.as(t, role), t, r.conn, good)
			if role.May(need) {
				if err != nil {
					t.Errorf("%s: %v", role, err)
				}
				continue
			}
			wantCode(t, err, codes.PermissionDenied, string(role), string(need), "higher role")
			trail := r.store.trail()
			if len(trail) != 1 || trail[0].Action != "api.denied" || trail[0].Actor != "operator:"+string(role) || trail[0].Outcome != string(fault.Forbidden) ||
				!strings.HasPrefix(trail[0].Resource, "rpc/") || !strings.HasSuffix(trail[0].Resource, string(m.Name())) {
				t.Errorf("%s: trail %+v", role, trail)
			}
		}
		r := newRig(t).estate(t)
		key := r.addKey(t, "odd", authz.Admin, time.Time{}, false)
		r.store.keys[len(r.store.keys)-1].Role = "root"
		_, err := m.call(r.with(t, "Bearer "+key), t, r.conn, good)
		wantCode(t, err, codes.PermissionDenied)
	})
}

// TestHolderOfADeadKeyIsNamed: who shows the right secret of a key that is no longer good is known to the trail.
func TestHolderOfADeadKeyIsNamed(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	key := r.addKey(t, "leaver", authz.Admin, time.Time{}, true)
	_, err := r.system().GetStatus(r.with(t, "Bearer "+key), nil)
	wantCode(t, err, codes.Unauthenticated, "revoked")
	trail := r.store.trail()
	if len(trail) != 1 || trail[0].Actor != "operator:leaver" {
		t.Errorf("trail %+v", trail)
	}
}

// TestDenialsAreBounded: neither strangers nor a script with a key can fill the disk with audit rows, and the first do
// not crowd out the second.
func TestDenialsAreBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	count := func(actor string) int {
		n := 0
		for _, e := range r.store.trail() {
			if e.Actor == actor {
				n++
			}
		}
		return n
	}
	for range 55 {
		_, err := r.system().GetStatus(r.with(t, ""), nil)
		wantCode(t, err, codes.Unauthenticated)
	}
	if n := count(authz.Anonymous); n != 50 {
		t.Errorf("%d rows of strangers, want 50", n)
	}
	r.refused.AllowN(r.clock.Now(), 490)
	ctx := r.as(t, authz.Viewer)
	for range 15 {
		_, err := r.jobs().CancelJob(ctx, nil)
		wantCode(t, err, codes.PermissionDenied)
	}
	if n := count("operator:viewer"); n != 10 {
		t.Errorf("%d rows of a viewer, want 10", n)
	}
	if lines := strings.Count(r.log.String(), `"msg":"api call"`); lines != 70 {
		t.Errorf("%d lines in the log, want all 70", lines)
	}
	r.clock.Advance(time.Second)
	for range 15 {
		_, err := r.system().GetStatus(r.with(t, ""), nil)
		wantCode(t, err, codes.Unauthenticated)
	}
	if n := count(authz.Anonymous); n != 60 {
		t.Errorf("%d rows of strangers after a second, want 60", n)
	}
}

func TestUnknownMethodIsRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	err := r.conn.Invoke(r.as(t, authz.Admin), "/certmesh.operator.v1.SystemService/Nothing", goodRequests["/certmesh.operator.v1.SystemService/GetStatus"], nil)
	wantCode(t, err, codes.Unimplemented)
	// A method that is served but has no row in the table of permissions.
	c := &call{method: "/certmesh.operator.v1.SystemService/New"}
	if err := r.admit(r.as(t, authz.Admin), c); !fault.Is(err, fault.Unsupported) {
		t.Error(err)
	}
}
