package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/certmesh/certmesh/e2e/bench/streams"
	"github.com/certmesh/certmesh/e2e/estate"
)

// failover kills the leader so many times and measures how long after the signal another node led, by its own log, and had
// taken all fenced duties, by the database. Each killed node comes back before the next dies.
func (s *scene) failover(ctx context.Context, kills int) ([]figure, error) {
	var leads, taken []time.Duration
	for range kills {
		a, b, err := s.killLeader(ctx)
		if err != nil {
			return nil, err
		}
		leads, taken = append(leads, a), append(taken, b)
	}
	return []figure{{"leads-p50-ms", ms(quantile(leads, 0.5))}, {"leads-max-ms", ms(quantile(leads, 1))},
		{"duties-p50-ms", ms(quantile(taken, 0.5))}, {"duties-max-ms", ms(quantile(taken, 1))}, {"kills", float64(kills)}}, nil
}

func (s *scene) killLeader(ctx context.Context) (leads, taken time.Duration, err error) {
	if err := s.whole(ctx); err != nil {
		return 0, 0, err
	}
	dead, err := s.leader(ctx)
	if err != nil {
		return 0, 0, err
	}
	logs, runs := map[*estate.ClusterNode]int{}, map[*estate.ClusterNode]map[string]float64{}
	for _, m := range s.others(dead) {
		logs[m] = len(m.Process.Log())
		if runs[m], err = streams.Metrics(ctx, m.Estate); err != nil {
			return 0, 0, err
		}
	}
	var fenced int
	if err := s.db.QueryRowContext(ctx, "SELECT count(*) FROM duty_fence").Scan(&fenced); err != nil {
		return 0, 0, err
	}
	died := time.Now()
	dead.Process.Kill()
	for {
		var n int
		err := s.db.QueryRowContext(ctx, "SELECT count(*) FROM duty_fence WHERE holder <> $1 AND taken_at >= $2", dead.ID, died.UnixMicro()).Scan(&n)
		if err != nil {
			return 0, 0, fmt.Errorf("duties of %s were not taken: %w", dead.ID, err)
		}
		if n == fenced && fenced > 0 {
			break
		}
		pause(ctx, grain)
	}
	taken = time.Since(died)
	heir, at, err := firstLead(logs)
	if err != nil {
		return 0, 0, err
	}
	// To have taken a duty is not to have done it.
	err = s.until(ctx, "the duties to run", func(ctx context.Context) error {
		v, err := streams.Metrics(ctx, heir.Estate)
		if err != nil {
			return err
		}
		rows, err := s.db.QueryContext(ctx, "SELECT duty FROM duty_fence")
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }() // Err says what matters
		for rows.Next() {
			var duty string
			if err := rows.Scan(&duty); err != nil {
				return err
			}
			key := fmt.Sprintf("certmesh_duty_runs_total{duty=%q,outcome=\"ok\"}", duty)
			if v[key] <= runs[heir][key] {
				return fmt.Errorf("%s has not run on %s", duty, heir.ID)
			}
		}
		return rows.Err()
	})
	if err != nil {
		return 0, 0, err
	}
	return at.Sub(died), taken, s.StartNode(ctx, dead)
}

// firstLead finds who says first that it leads in what was logged since.
func firstLead(logs map[*estate.ClusterNode]int) (heir *estate.ClusterNode, at time.Time, err error) {
	for m, from := range logs {
		text, err := os.ReadFile(m.Process.LogPath)
		if err != nil {
			return nil, at, err
		}
		for line := range bytes.Lines(text[from:]) {
			var l struct {
				Time time.Time `json:"time"`
				Msg  string    `json:"msg"`
			}
			if json.Unmarshal(line, &l) == nil && l.Msg == "this node leads" && (heir == nil || l.Time.Before(at)) {
				heir, at = m, l.Time
			}
		}
	}
	if heir == nil {
		return nil, at, fmt.Errorf("no node has said that it leads")
	}
	return heir, at, nil
}
