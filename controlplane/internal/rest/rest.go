// Package rest serves what is not gRPC on the api listener: liveness, readiness and metrics.
package rest

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config is what the handlers ask.
type Config struct {
	// Ping says whether the store answers.
	Ping func(context.Context) error
	// Draining says whether this node is stopping.
	Draining func() bool
	Metrics  prometheus.Gatherer
}

// readyTimeout is the ceiling of one readiness check.
const readyTimeout = 2 * time.Second

// Handler returns the routes:
//
//	GET /health    200 while the process lives; never asks the store
//	GET /ready     200, or 503 with the reason: the store does not answer, or the node is stopping
//	GET /metrics   Prometheus text
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, "ok")
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
		if c.Draining() {
			answer(w, http.StatusServiceUnavailable, "draining")
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
		defer cancel()
		if err := c.Ping(ctx); err != nil {
			answer(w, http.StatusServiceUnavailable, "store_unavailable")
			return
		}
		answer(w, http.StatusOK, "ready")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func answer(w http.ResponseWriter, code int, status string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(map[string]string{"status": status})
}
