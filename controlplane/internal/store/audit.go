package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

const auditColumns = `audit.id, audit.at, audit.actor, audit.action, audit.resource, audit.outcome, audit.request_id,
 audit.remote_addr, audit.detail`

func scanAudit(scan scanner) (domain.AuditEvent, error) {
	var e domain.AuditEvent
	var at int64
	var detail string
	if err := scan(&e.ID, &at, &e.Actor, &e.Action, &e.Resource, &e.Outcome, &e.RequestID, &e.RemoteAddr, &detail); err != nil {
		return domain.AuditEvent{}, err
	}
	e.At = fromMicro(at)
	return e, fromJSON(detail, &e.Detail)
}

// AuditEvents lists the trail, the newest first, of one resource ("certificate/cert_…") or of all.
func (s *Store) AuditEvents(ctx context.Context, resource string, p domain.PageRequest) ([]domain.AuditEvent, string, error) {
	size, after, err := pageAfter(p, id.Audit+"_")
	if err != nil {
		return nil, "", err
	}
	if err := checkTexts("resource", resource); err != nil {
		return nil, "", err
	}
	var all []domain.AuditEvent
	err = s.read(ctx, "audit.list", func(t *tx) error {
		var err error
		all, err = readPage(t, pageQuery{columns: auditColumns, from: "audit", lead: pins("audit.resource", resource), key: "audit.id", newest: true},
			size, position(after), scanAudit)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(e domain.AuditEvent) string { return e.ID })
	return all, next, nil
}

// Audit records what changed no other row: refusals, mostly. The ids are the store's, and an empty Outcome means "ok".
func (s *Store) Audit(ctx context.Context, events []domain.AuditEvent) error {
	// The ids are made here, not in the transaction: by them a second run after a commit without an answer adds nothing.
	ids := make([]string, len(events))
	for i, e := range events {
		if e.Action == "" || e.Resource == "" || e.Actor == "" || e.At.IsZero() {
			return fault.New(fault.Internal, "an audit event lacks its actor, action, resource or time")
		}
		if err := checkTexts("actor", e.Actor, "action", e.Action, "resource", e.Resource, "request_id", e.RequestID, "remote_addr", e.RemoteAddr); err != nil {
			return err
		}
		ids[i] = s.newID(id.Audit)
	}
	if len(events) == 0 {
		return nil
	}
	return s.settled(ctx, "audit.record", func(t *tx) error {
		ids := ids
		return chunks(events, func(some []domain.AuditEvent) error {
			v := t.values("id text, at int, actor text, action text, resource text, outcome text, request_id text, remote_addr text, detail text")
			for i, e := range some {
				detail, err := jsonText(e.Detail)
				if err != nil {
					return err
				}
				if e.Outcome == "" {
					e.Outcome = "ok"
				}
				v.add(ids[i], micro(e.At), e.Actor, e.Action, e.Resource, e.Outcome, e.RequestID, e.RemoteAddr, detail)
			}
			ids = ids[len(some):]
			_, err := t.exec(v.with()+`
INSERT INTO audit (id, at, actor, action, resource, outcome, request_id, remote_addr, detail)
SELECT id, at, actor, action, resource, outcome, request_id, remote_addr, detail FROM v WHERE id IS NOT NULL
ON CONFLICT (id) DO NOTHING`, v.args...)
			return err
		})
	})
}
