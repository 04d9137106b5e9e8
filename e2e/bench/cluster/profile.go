package cluster

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"github.com/certmesh/certmesh/e2e/estate"
)

// profiles takes CPU profiles of nodes into the folder that CLUSTER_PROFILES names, if any, until it is stopped.
func (s *scene) profiles(ctx context.Context, name string, nodes []*estate.ClusterNode) (stop func()) {
	dir := os.Getenv("CLUSTER_PROFILES")
	if dir == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, m := range nodes {
		wg.Go(func() {
			// In slices, because a profile that is given up is lost.
			for n := 1; ctx.Err() == nil; n++ {
				if fetch(ctx, "http://"+s.debug[m]+"/debug/pprof/profile?seconds=1", filepath.Join(dir, fmt.Sprintf("%s-%s-%d.pb.gz", name, m.ID, n))) != nil {
					return
				}
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

func fetch(ctx context.Context, url, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }() // only read
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}
