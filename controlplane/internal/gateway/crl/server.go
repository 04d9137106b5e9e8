package crl

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// fresh is how long an answer is served from memory before the store is asked again: short enough that a revocation is
// seen within two seconds of its CRL, long enough that a busy CA does not hammer the store.
const fresh = time.Second

// maxCached bounds the copies kept; beyond it the store is asked each time.
const maxCached = 4096

// Server serves CRLs and CA certificates over plain HTTP (RFC 5280 section 8, RFC 8615):
//
//	GET /.well-known/pki/crl/{issuer}/{shard}   application/pkix-crl
//	GET /.well-known/pki/crl/{issuer}           the same, shard 0
//	GET /.well-known/pki/ca/{issuer}            application/pkix-cert
type Server struct {
	store Store
	now   func() time.Time
	log   *slog.Logger

	mu     sync.Mutex
	copies map[string]copied
}

type copied struct {
	body          []byte
	since         time.Time // Last-Modified
	until         time.Time // nextUpdate, zero for certificates
	read          time.Time
	etag, content string
}

// NewServer returns a Server that reads from store.
func NewServer(store Store, now func() time.Time, log *slog.Logger) *Server {
	return &Server{store: store, now: now, log: log, copies: map[string]copied{}}
}

// Handler returns the routes.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/pki/crl/{issuer}/{shard}", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, "crl/"+r.PathValue("issuer")+"/"+r.PathValue("shard"), s.loadCRL)
	})
	mux.HandleFunc("GET /.well-known/pki/crl/{issuer}", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, "crl/"+r.PathValue("issuer")+"/"+strconv.Itoa(Shard), s.loadCRL)
	})
	mux.HandleFunc("GET /.well-known/pki/ca/{issuer}", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, "ca/"+r.PathValue("issuer"), s.loadCA)
	})
	return mux
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, key string, load func(context.Context, string) (copied, error)) {
	c, err := s.get(r.Context(), key, load)
	switch {
	case fault.Is(err, fault.NotFound), fault.Is(err, fault.Invalid):
		http.Error(w, "no such issuer or CRL", http.StatusNotFound)
		return
	case err != nil:
		s.log.Error("cannot serve revocation data", "key", key, "error", err)
		w.Header().Set("Retry-After", "5")
		http.Error(w, "revocation data is not available at the moment; try again", http.StatusServiceUnavailable)
		return
	}
	age := 0
	if !c.until.IsZero() {
		age = min(max(int(c.until.Sub(s.now()).Seconds()), 0), 300)
	}
	h := w.Header()
	h.Set("Content-Type", c.content)
	h.Set("Cache-Control", "public, max-age="+strconv.Itoa(age))
	h.Set("ETag", c.etag)
	h.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", c.since, strings.NewReader(string(c.body)))
}

// get answers from memory while fresh, then from the store; when the store cannot answer, from the last good copy.
func (s *Server) get(ctx context.Context, key string, load func(context.Context, string) (copied, error)) (copied, error) {
	now := s.now()
	s.mu.Lock()
	c, ok := s.copies[key]
	s.mu.Unlock()
	if ok && now.Sub(c.read) < fresh {
		return c, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	got, err := load(ctx, key)
	if err != nil {
		if ok && !fault.Is(err, fault.NotFound) {
			s.log.Warn("serving the last good copy of revocation data", "key", key, "error", err)
			return c, nil
		}
		return copied{}, err
	}
	sum := sha256.Sum256(got.body)
	got.etag, got.read = `"`+hex.EncodeToString(sum[:16])+`"`, now
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.copies) < maxCached || ok {
		s.copies[key] = got
	}
	return got, nil
}

func (s *Server) loadCRL(ctx context.Context, key string) (copied, error) {
	parts := strings.Split(key, "/")
	shard, err := strconv.Atoi(parts[2])
	if err != nil || shard < 0 {
		return copied{}, fault.New(fault.NotFound, "no such CRL")
	}
	c, err := s.store.CRL(ctx, parts[1], shard)
	if err != nil {
		return copied{}, err
	}
	return copied{body: c.DER, since: c.ThisUpdate, until: c.NextUpdate, content: "application/pkix-crl"}, nil
}

func (s *Server) loadCA(ctx context.Context, key string) (copied, error) {
	ca, err := s.store.CA(ctx, strings.TrimPrefix(key, "ca/"))
	if err != nil {
		return copied{}, err
	}
	return copied{body: ca.Chain[0], since: ca.CreatedAt, content: "application/pkix-cert"}, nil
}
