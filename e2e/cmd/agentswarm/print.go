package main

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// status is what is printed of the swarm. Times are Unix microseconds, 0: not yet.
type status struct {
	Agents       int   `json:"agents"`
	Healthy      int   `json:"healthy"`
	Joined       int64 `json:"joined"`
	Connected    int64 `json:"connected"`
	Welcomes     int64 `json:"welcomes"`
	Failed       int64 `json:"failed"`
	Bad          int64 `json:"bad"`
	Acknowledged int64 `json:"acknowledged"`
	Done         int64 `json:"done"`
	AllConnected int64 `json:"all_connected_us"`
	LastWelcome  int64 `json:"last_welcome_us"`
	LastLost     int64 `json:"last_lost_us"`
	ElapsedMS    int64 `json:"elapsed_ms"`
	RSS          int64 `json:"rss_bytes"`
	Heap         int64 `json:"heap_bytes"`
	Goroutines   int   `json:"goroutines"`
}

// printer writes lines for people, or JSON objects with an "event".
type printer struct {
	mu   sync.Mutex
	w    io.Writer
	json bool
}

func newPrinter(w io.Writer, asJSON bool) *printer { return &printer{w: w, json: asJSON} }

func (p *printer) status(s status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.json {
		p.encode(struct {
			Event string `json:"event"`
			status
		}{"status", s})
		return
	}
	back := ""
	if s.AllConnected > s.LastLost && s.LastLost > 0 {
		back = fmt.Sprintf(", all back %s after the last was lost", time.Duration(s.AllConnected-s.LastLost)*time.Microsecond)
	}
	p.line("%6.1f s  %d of %d connected, %d joined, %d failed, %d misbehave%s; %d MiB, %d goroutines\n", float64(s.ElapsedMS)/1000,
		s.Connected, s.Healthy, s.Joined, s.Failed, s.Bad, back, s.RSS>>20, s.Goroutines)
}

func (p *printer) event(name string, fields map[string]any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.json {
		fields["event"] = name
		p.encode(fields)
		return
	}
	b, err := json.Marshal(fields)
	if err != nil {
		b = []byte(err.Error())
	}
	p.line("%s %s\n", name, b)
}

// encode and line ignore a reader that is gone: the swarm goes on until it is told to end.
func (p *printer) encode(v any)                    { _ = json.NewEncoder(p.w).Encode(v) }
func (p *printer) line(format string, args ...any) { _, _ = fmt.Fprintf(p.w, format, args...) }
