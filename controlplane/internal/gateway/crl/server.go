package crl

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

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
	copies map[resource]copied
	loads  singleflight.Group
}

type copied struct {
	body          []byte
	until         time.Time // nextUpdate, zero for certificates
	read          time.Time
	etag, content string
}

// NewServer returns a Server that reads from store.
func NewServer(store Store, now func() time.Time, log *slog.Logger) *Server {
	return &Server{store: store, now: now, log: log, copies: map[resource]copied{}}
}

// Handler returns the routes.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/pki/crl/{issuer}/{shard}", func(w http.ResponseWriter, r *http.Request) {
		shard, err := strconv.Atoi(r.PathValue("shard"))
		if err != nil || shard < 0 || strconv.Itoa(shard) != r.PathValue("shard") {
			// One spelling a CRL, so that nobody fills the memory with copies of one.
			notFound(w)
			return
		}
		s.serve(w, r, resource{issuer: r.PathValue("issuer"), shard: shard}, s.loadCRL)
	})
	mux.HandleFunc("GET /.well-known/pki/crl/{issuer}", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, resource{issuer: r.PathValue("issuer"), shard: Shard}, s.loadCRL)
	})
	mux.HandleFunc("GET /.well-known/pki/ca/{issuer}", func(w http.ResponseWriter, r *http.Request) {
		s.serve(w, r, resource{issuer: r.PathValue("issuer"), shard: ofCA}, s.loadCA)
	})
	return mux
}

// resource is what a URL names; shard is ofCA for a CA's certificate.
type resource struct {
	issuer string
	shard  int
}

const ofCA = -1

func (r resource) String() string { return r.issuer + "/" + strconv.Itoa(r.shard) }

func notFound(w http.ResponseWriter) { http.Error(w, "no such issuer or CRL", http.StatusNotFound) }

func (s *Server) serve(w http.ResponseWriter, r *http.Request, key resource, load loader) {
	c, err := s.get(r.Context(), key, load)
	switch {
	case fault.Is(err, fault.NotFound), fault.Is(err, fault.Invalid):
		notFound(w)
		return
	case err != nil:
		s.log.Error("cannot serve revocation data", "issuer", key.issuer, "shard", key.shard, "error", err)
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
	// No Last-Modified: two CRLs of one second would be one to whoever asks by time.
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(c.body))
}

type loader func(context.Context, resource) (copied, error)

// get answers from memory while fresh, then from the store, which is asked once however many wait; when the store cannot
// answer, from the last good copy.
func (s *Server) get(ctx context.Context, key resource, load loader) (copied, error) {
	now := s.now()
	s.mu.Lock()
	c, ok := s.copies[key]
	s.mu.Unlock()
	if ok && now.Sub(c.read) < fresh {
		return c, nil
	}
	// What one client's request began serves all: it does not end with that client.
	got, err, _ := s.loads.Do(key.String(), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		return s.load(ctx, key, now, load)
	})
	if err != nil {
		if ok && !fault.Is(err, fault.NotFound) {
			s.log.Warn("serving the last good copy of revocation data", "issuer", key.issuer, "shard", key.shard, "error", err)
			return c, nil
		}
		return copied{}, err
	}
	c, ok = got.(copied)
	if !ok {
		return copied{}, fault.New(fault.Internal, "not a copy")
	}
	return c, nil
}

func (s *Server) load(ctx context.Context, key resource, now time.Time, load loader) (copied, error) {
	got, err := load(ctx, key)
	if err != nil {
		return copied{}, err
	}
	sum := sha256.Sum256(got.body)
	got.etag, got.read = `"`+hex.EncodeToString(sum[:16])+`"`, now
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.copies[key]; ok || len(s.copies) < maxCached {
		s.copies[key] = got
	}
	return got, nil
}

func (s *Server) loadCRL(ctx context.Context, key resource) (copied, error) {
	c, err := s.store.CRL(ctx, key.issuer, key.shard)
	if err != nil {
		return copied{}, err
	}
	return copied{body: c.DER, until: c.NextUpdate, content: "application/pkix-crl"}, nil
}

func (s *Server) loadCA(ctx context.Context, key resource) (copied, error) {
	ca, err := s.store.CA(ctx, key.issuer)
	if err != nil {
		return copied{}, err
	}
	if len(ca.Chain) == 0 {
		return copied{}, fault.New(fault.Internal, "CA %s has no certificate", key.issuer)
	}
	return copied{body: ca.Chain[0], content: "application/pkix-cert"}, nil
}
