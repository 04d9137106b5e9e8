package storetest

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
)

// BenchmarkIssueStore measures the store's part of an issuance with one placement: dispatch, acceptance, intent, version,
// and the same for the deployment up to its result, by 128 workers that share commits. PostgreSQL runs with fsync off.
func BenchmarkIssueStore(b *testing.B) {
	for _, e := range Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			w := NewWorld(b, e)
			a := w.Agent(b, "web1")
			epoch := w.Open(b, a.ID, "n1").Epoch
			jobs := make([]domain.Job, b.N)
			var orders sync.WaitGroup
			slots := make(chan struct{}, 8)
			for i := range jobs {
				orders.Add(1)
				slots <- struct{}{}
				go func() {
					defer func() { <-slots; orders.Done() }()
					_, list, err := w.S.CreateCertificate(b.Context(), w.order(fmt.Sprintf("c%d.test", i), w.Target(b, a.ID, fmt.Sprintf("t%d", i)).ID))
					if err != nil {
						b.Error(err)
						return
					}
					jobs[i] = list[0]
				}()
			}
			orders.Wait()
			if b.Failed() {
				return
			}
			// The servers of tests do not gather statistics by themselves.
			if _, err := w.DB(b).ExecContext(b.Context(), "ANALYZE"); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			var next atomic.Int64
			var wg sync.WaitGroup
			for range 128 {
				wg.Go(func() {
					for i := next.Add(1) - 1; i < int64(b.N) && !b.Failed(); i = next.Add(1) - 1 {
						if err := issueOnce(b, w, jobs[i], epoch); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "issued/s")
		})
	}
}

func issueOnce(b *testing.B, w *World, j domain.Job, epoch domain.Epoch) error {
	ctx, s := b.Context(), w.S
	begin := func(j domain.Job) error {
		if err := s.Dispatch(ctx, []domain.Dispatch{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt, Epoch: epoch, At: w.Now()}})[0]; err != nil {
			return err
		}
		return s.Accept(ctx, []domain.Acceptance{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt + 1, At: w.Now()}})[0]
	}
	if err := begin(j); err != nil {
		return err
	}
	it := w.Intent(j, j.Attempt+1, id.New("key"))
	it.TBS = make([]byte, 700)
	out := s.RecordIntents(ctx, []domain.Intent{it})[0]
	if out.Err != nil {
		return out.Err
	}
	signed := w.Signed(out.Intent)
	signed.Version.DER = make([]byte, 900)
	issued := s.RecordIssued(ctx, []domain.Issued{signed})[0]
	if issued.Err != nil {
		return issued.Err
	}
	for _, d := range issued.Deployments {
		if err := begin(d.Job); err != nil {
			return err
		}
		if err := s.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(d, d.Job.Attempt+1)})[0].Err; err != nil {
			return err
		}
	}
	return nil
}
