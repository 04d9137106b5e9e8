package storetest

import (
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// BenchmarkCopy copies an estate of ten thousand certificates with their history from SQLite into each engine and compares
// it; rows a second of both.
func BenchmarkCopy(b *testing.B) {
	const certificates = 10_000
	w := NewWorld(b, Engines(b)[0])
	seedBig(b, w, certificates)
	for _, e := range Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			var rows, copying, comparing float64
			for range b.N {
				b.StopTimer()
				to := e.Open(b)
				b.StartTimer()
				_, err := w.S.CopyTo(b.Context(), to, store.CopyOptions{Op: w.Op(), Said: func(c store.Copied) {
					rows, copying, comparing = rows+float64(c.Rows), copying+c.Copying.Seconds(), comparing+c.Verifying.Seconds()
				}})
				must(b, err)
			}
			b.ReportMetric(rows/copying, "copied/s")
			b.ReportMetric(rows/comparing, "compared/s")
			b.ReportMetric(rows/float64(b.N), "rows")
		})
	}
}
