package chaos

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/certmesh/certmesh/e2e/chaos/history"
	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// settle waits until nothing is left to be done. That it takes too long is a failure, and what is left is judged.
func (s *trial) settle() {
	s.T.Helper()
	began := time.Now()
	s.OK(s.supervise())
	for _, m := range s.Nodes {
		s.Until(m.ID+" to be ready", func() error {
			if err := s.supervise(); err != nil {
				return estate.Stop(err)
			}
			return m.Ready(s.Ctx)
		})
	}
	ready := time.Since(began)
	_, err := s.Leader(s.Ctx, nil)
	s.OK(err)
	ctx, cancel := context.WithTimeout(s.Ctx, rest)
	defer cancel()
	err = estate.Wait(ctx, "all to be at rest", s.atRest)
	s.T.Logf("ready after %s, at rest after %s", ready.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if err != nil {
		s.T.Error(err)
		s.showOpen()
	}
	// Revocations reach the CRL by the leader, which is told at once.
	err = estate.Wait(ctx, "the CRL to have all that was revoked", func(ctx context.Context) error {
		var revoked int
		if err := s.row(ctx, "SELECT COUNT(*) FROM version WHERE revoked_at IS NOT NULL", &revoked); err != nil {
			return err
		}
		for _, m := range s.Nodes {
			l, err := crlOf(ctx, m, s.issuer)
			if err != nil {
				return err
			}
			if len(l.RevokedCertificateEntries) != revoked {
				return fmt.Errorf("%d are revoked, CRL %s of %s has %d", revoked, l.Number, m.ID, len(l.RevokedCertificateEntries))
			}
		}
		return nil
	})
	if err != nil {
		s.T.Error(err)
	}
}

// atRest reports what is still to be done.
func (s *trial) atRest(ctx context.Context) error {
	for _, q := range []struct{ what, query string }{
		{"jobs are open", "SELECT COUNT(*) FROM job WHERE finished_at IS NULL"},
		{"leaves are not issued", "SELECT COUNT(*) FROM leaf WHERE current_generation = 0 AND NOT revoked"},
		{"placements do not hold what is wanted", `SELECT COUNT(*) FROM placement JOIN leaf ON leaf.certificate_id = placement.certificate_id AND
 leaf.agent_id = placement.agent_id WHERE placement.installed_generation <> leaf.current_generation AND NOT leaf.revoked`},
		{"agents are not online", "SELECT COUNT(*) FROM agent WHERE state <> 'Online'"},
	} {
		var n int
		if err := s.row(ctx, q.query, &n); err != nil {
			return err
		}
		if n > 0 {
			return fmt.Errorf("%d %s", n, q.what)
		}
	}
	return nil
}

// showOpen logs the jobs that are open and the placements that lag.
func (s *trial) showOpen() {
	s.T.Helper()
	for _, query := range []string{
		`SELECT job.*, agent.state AS agent_state, agent_session.epoch, agent_session.holder FROM job LEFT JOIN agent ON agent.id = job.agent_id
 LEFT JOIN agent_session ON agent_session.agent_id = job.agent_id WHERE finished_at IS NULL LIMIT 20`,
		`SELECT placement.*, leaf.current_generation FROM placement JOIN leaf ON leaf.certificate_id = placement.certificate_id AND
 leaf.agent_id = placement.agent_id WHERE placement.installed_generation <> leaf.current_generation AND NOT leaf.revoked LIMIT 20`,
		"SELECT * FROM agent JOIN agent_session ON agent_session.agent_id = agent.id",
	} {
		all, err := ask(s.Ctx, s.Database.DSN, query, pgx.RowToMap)
		s.T.Logf("%v %v", all, err)
	}
}

func (s *trial) row(ctx context.Context, query string, into ...any) error {
	c, err := pgx.Connect(ctx, s.Database.DSN)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }() // it was only read
	return c.QueryRow(ctx, query).Scan(into...)
}

func ask[T any](ctx context.Context, dsn, query string, to pgx.RowToFunc[T]) ([]T, error) {
	c, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }() // it was only read
	rows, err := c.Query(ctx, query)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, to)
}

// table reads a table into records by position.
func table[T any](s *trial, query string) []T {
	s.T.Helper()
	all, err := ask(s.Ctx, s.Database.DSN, query, pgx.RowToStructByPos[T])
	if err != nil {
		s.T.Fatalf("%s: %v", query, err)
	}
	return all
}

// state reads what the checker compares the history with.
func (s *trial) state() history.State {
	s.T.Helper()
	out := history.State{Now: time.Now(),
		Certificates: table[history.Certificate](s, "SELECT id, name, status, COALESCE(request_id, '') FROM certificate"),
		Leaves:       table[history.Leaf](s, "SELECT certificate_id, agent_id, serial, last_error, generation, current_generation FROM leaf"),
		Placements:   table[history.Placement](s, "SELECT certificate_id, target_id, agent_id, installed_generation FROM placement"),
		Versions: table[history.Version](s, `SELECT issuer_id, serial, certificate_id, agent_id, generation, revoked_at IS NOT NULL,
 to_timestamp(not_after / 1000000) FROM version`),
		Jobs: table[history.Job](s, `SELECT id, kind, state, certificate_id, agent_id, request_id, error, generation, attempt, tries,
 to_timestamp(run_at / 1000000), finished_at IS NOT NULL FROM job`),
		Agents: table[history.Agent](s, `SELECT agent.id, name, state, COALESCE(holder, '') FROM agent LEFT JOIN agent_session ON agent_session.agent_id = agent.id`),
		Duties: table[history.Duty](s, "SELECT duty, holder, epoch FROM duty_fence"),
		Nodes:  s.ids(nil),
	}
	type row struct {
		At                                          time.Time
		Actor, Action, Resource, Outcome, RequestID string
		Detail                                      string
	}
	for _, r := range table[row](s, "SELECT to_timestamp(at / 1000000), actor, action, resource, outcome, request_id, detail FROM audit ORDER BY at, id") {
		a := history.Audit{At: r.At, Actor: r.Actor, Action: r.Action, Resource: r.Resource, Outcome: r.Outcome, RequestID: r.RequestID}
		if r.Detail != "" {
			s.OK(json.Unmarshal([]byte(r.Detail), &a.Detail))
		}
		out.Audit = append(out.Audit, a)
	}
	for id, path := range s.paths {
		out.Files = append(out.Files, file(id, path))
	}
	l, err := crlOf(s.Ctx, s.Nodes[0], s.issuer)
	s.OK(err)
	list := history.List{IssuerID: s.issuer, Number: l.Number.Int64()}
	for _, e := range l.RevokedCertificateEntries {
		list.Serials = append(list.Serials, e.SerialNumber.Text(16))
	}
	out.CRLs = []history.List{list}
	s.look(&out)
	return out
}

// look asks each node for all certificates.
func (s *trial) look(out *history.State) {
	s.T.Helper()
	u := s.newUser(clients)
	defer u.close()
	for i, m := range s.Nodes {
		for _, c := range out.Certificates {
			r, err := u.nodes[i].Certificates.GetCertificate(s.Ctx, &operatorpb.GetCertificateRequest{Id: c.ID})
			s.OK(err)
			a := seen(r.GetCertificate())
			out.Seen = append(out.Seen, history.Seen{Node: m.ID, CertificateID: c.ID, Status: a.Status, Generations: a.Generations})
		}
	}
}

// file is what lies at a target.
func file(id, path string) history.File {
	f := history.File{TargetID: id}
	pair, err := tls.LoadX509KeyPair(path, path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		f.Problem = err.Error()
	default:
		f.Serial = estate.Serial(pair.Leaf)
	}
	return f
}

// keep saves history and state of a failed run, which is judged again by history.Load and history.Check.
func (s *trial) keep(end history.State) {
	s.T.Helper()
	dir, err := os.MkdirTemp("", "certmesh-chaos-")
	s.OK(err)
	b, err := json.Marshal(end)
	s.OK(err)
	s.OK(os.WriteFile(filepath.Join(dir, "state.json"), b, 0o600))
	logs, err := filepath.Glob(s.Path("*.log"))
	s.OK(err)
	for _, path := range slices.Concat(logs, []string{s.Path("history.jsonl")}) {
		b, err := os.ReadFile(path)
		s.OK(err)
		s.OK(os.WriteFile(filepath.Join(dir, filepath.Base(path)), b, 0o600))
	}
	s.T.Logf("history, state and logs are kept in %s", dir)
}
