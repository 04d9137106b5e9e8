package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Counts returns the sizes of the estate, each counted in an index: nothing is read row by row to be counted.
func (s *Store) Counts(ctx context.Context) (domain.Counts, error) {
	var c domain.Counts
	err := s.read(ctx, "counts", func(t *tx) error {
		c = domain.Counts{Certificates: map[domain.CertificateStatus]int64{}, Agents: map[domain.AgentState]int64{},
			OpenJobs: map[domain.JobState]int64{}}
		if err := countBy(t, "SELECT status, COUNT(*) FROM certificate GROUP BY status", c.Certificates); err != nil {
			return err
		}
		if err := countBy(t, "SELECT state, COUNT(*) FROM agent GROUP BY state", c.Agents); err != nil {
			return err
		}
		// By the states, which are few and indexed: by finished_at SQLite reads all history, in the order of its states.
		open, states := inList(1, domain.OpenJobStates)
		if err := countBy(t, "SELECT state, COUNT(*) FROM job WHERE state IN "+open+" GROUP BY state", c.OpenJobs, states...); err != nil {
			return err
		}
		// A placement that does not hold what is wanted is due, or its deployment is open: never both.
		due, err := t.count("SELECT COUNT(*) FROM placement WHERE due_at IS NOT NULL")
		if err != nil {
			return err
		}
		in, args := inList(2, domain.OpenJobStates)
		deploying, err := t.count("SELECT COUNT(*) FROM job WHERE kind = $1 AND state IN "+in, append([]any{string(domain.JobDeployment)}, args...)...)
		c.PlacementsLagging = due + deploying
		return err
	})
	return c, err
}

func countBy[K ~string](t *tx, query string, into map[K]int64, args ...any) error {
	return t.each(query, args, func(scan func(...any) error) error {
		var k K
		var n int64
		if err := scan(&k, &n); err != nil {
			return err
		}
		into[k] = n
		return nil
	})
}
