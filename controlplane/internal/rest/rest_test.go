package rest

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func get(t *testing.T, h http.Handler, method, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
	return w
}

func TestHealthReadyAndMetrics(t *testing.T) {
	t.Parallel()
	metrics := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "certmesh_test_total", Help: "x"})
	metrics.MustRegister(counter)
	counter.Inc()
	var down, draining atomic.Bool
	var pings atomic.Int64
	h := Handler(Config{Metrics: metrics, Draining: draining.Load, Ping: func(ctx context.Context) error {
		pings.Add(1)
		if _, ok := ctx.Deadline(); !ok {
			t.Error("a ping may wait for ever")
		}
		if down.Load() {
			return errors.New("password=hunter2: connection refused")
		}
		return nil
	}})
	check := func(path string, code int, says string) {
		t.Helper()
		w := get(t, h, http.MethodGet, path)
		if w.Code != code || !strings.Contains(w.Body.String(), says) || strings.Contains(w.Body.String(), "hunter2") {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
	check("/health", 200, `{"status":"ok"}`)
	check("/ready", 200, `{"status":"ready"}`)
	check("/metrics", 200, "certmesh_test_total 1")

	down.Store(true)
	before := pings.Load()
	check("/health", 200, "ok") // alive although it can do nothing: a restart would not help
	if pings.Load() != before {
		t.Error("/health asks the store")
	}
	check("/ready", 503, "store_unavailable")
	check("/metrics", 200, "certmesh_test_total")

	down.Store(false)
	draining.Store(true)
	check("/ready", 503, "draining")
	check("/health", 200, "ok")

	if w := get(t, h, http.MethodGet, "/ready"); w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("headers %v", w.Header())
	}
	for path, method := range map[string]string{"/health": http.MethodPost, "/ready": http.MethodDelete, "/metrics": http.MethodPut} {
		if w := get(t, h, method, path); w.Code != http.StatusMethodNotAllowed {
			t.Errorf("%s %s: %d", method, path, w.Code)
		}
	}
	check("/", 404, "")
	check("/debug/pprof/", 404, "")
}
