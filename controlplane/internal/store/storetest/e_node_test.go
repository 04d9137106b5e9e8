package storetest_test

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func hashOf(s string) []byte { return bytes.Repeat([]byte(s), 32)[:32] }

func TestNodesEnrol(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		start := func(id, hash, instance, token, secret string) (domain.Node, error) {
			x := domain.NodeStart{ID: id, SecretHash: hash, Instance: instance, TokenID: token, At: w.Now()}
			if token != "" {
				x.TokenHash = hashOf(secret)
			}
			return w.S.StartNode(ctx, x)
		}
		token := func(id, secret string) string {
			w.must(w.S.CreateClusterToken(ctx, domain.ClusterToken{ID: id, Hash: hashOf(secret), ExpiresAt: w.Now().Add(time.Hour), CreatedBy: "console"}, w.Op()))
			return id
		}
		first, err := start("n1", "key1", "i1", "", "")
		w.must(err)
		if first.Epoch != 1 || first.SecretHash != "key1" {
			t.Fatalf("%+v", first)
		}
		w.must(w.S.CheckNode(ctx, "n1", 1))
		w.Pass(time.Second)

		// A restart shows its secret; the former process is not the node any more.
		again, err := start("n1", "key1", "i2", "", "")
		w.must(err)
		if again.Epoch != 2 || !again.EnrolledAt.Equal(first.EnrolledAt) {
			t.Fatalf("%+v", again)
		}
		refused(t, w.S.CheckNode(ctx, "n1", 1), fault.Conflict, "another process runs as node")
		w.must(w.S.CheckNode(ctx, "n1", 2))
		_, err = start("n1", "stolen", "i3", "", "")
		refused(t, err, fault.Conflict, "another data directory", "cluster remove n1")
		w.must(w.S.CheckNode(ctx, "n1", 2))

		// Others need a token, which serves once.
		_, err = start("n2", "key2", "i1", "", "")
		refused(t, err, fault.Unauthorized, "n1", "cluster token create")
		one := token("ct_1", "a")
		for _, bad := range [][2]string{{"ct_none", "a"}, {one, "b"}, {"bad\x00", "a"}} {
			_, err = start("n2", "key2", "i1", bad[0], bad[1])
			refused(t, err, fault.Unauthorized, "not known here")
		}
		_, err = start("n2", "key2", "i1", one, "a")
		w.must(err)
		_, err = start("n3", "key3", "i1", one, "a")
		refused(t, err, fault.Unauthorized, "used up")
		w.Pass(time.Second)
		_, err = start("n2", "key2", "i2", "", "") // enrolled: the token is not asked for again
		w.must(err)
		late := token("ct_2", "c")
		w.Pass(time.Hour)
		_, err = start("n3", "key3", "i1", late, "c")
		refused(t, err, fault.Unauthorized, "expired")

		// Removed is removed, until somebody enrols it anew, with another secret if need be.
		w.must(w.S.RemoveNode(ctx, "n2", w.Op()))
		w.must(w.S.RemoveNode(ctx, "n2", w.Op()))
		refused(t, w.S.RemoveNode(ctx, "n9", w.Op()), fault.NotFound, "cluster status")
		refused(t, w.S.CheckNode(ctx, "n2", 2), fault.Forbidden, "was removed")
		refused(t, w.S.CheckNode(ctx, "n9", 2), fault.NotFound)
		_, err = start("n2", "key2", "i3", "", "")
		refused(t, err, fault.Unauthorized, "cluster token create")
		_, err = start("n2", "key2b", "i3", token("ct_3", "d"), "d")
		w.must(err)
		w.must(w.S.CheckNode(ctx, "n2", 3))
		all, err := w.S.Nodes(ctx)
		w.must(err)
		if len(all) != 2 || all[1].SecretHash != "key2b" || all[1].Epoch != 3 || !all[1].RemovedAt.IsZero() {
			t.Fatalf("%+v", all)
		}
		// The last one of a cluster that is no more begins anew without a token.
		w.must(w.S.RemoveNode(ctx, "n1", w.Op()))
		w.must(w.S.RemoveNode(ctx, "n2", w.Op()))
		_, err = start("n1", "key1b", "i4", "", "")
		w.must(err)
		same(t, "trail", w.actions("node/n1"), []string{"node.enrolled", "node.started", "node.removed", "node.enrolled"})
	})
}

// TestFirstNodesAtOnce: of many that find an empty store one is the first.
func TestFirstNodesAtOnce(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			wg.Go(func() {
				id := string(rune('a' + i))
				_, errs[i] = w.S.StartNode(t.Context(), domain.NodeStart{ID: id, SecretHash: id, Instance: id, At: w.Now()})
			})
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				refused(t, err, fault.Unauthorized, "cluster token create")
			}
		}
		if won != 1 {
			t.Errorf("%d first nodes", won)
		}
	})
}
