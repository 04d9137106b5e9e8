package api

import (
	"context"
	"encoding/json"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a targets) ListTargets(ctx context.Context, r *operatorpb.ListTargetsRequest) (*operatorpb.ListTargetsResponse, error) {
	all, next, err := a.Store.Targets(ctx, r.GetAgentId(), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListTargetsResponse{Targets: each(all, targetPB), NextCursor: next}, nil
}

func (a targets) GetTarget(ctx context.Context, r *operatorpb.GetTargetRequest) (*operatorpb.GetTargetResponse, error) {
	t, err := a.Store.Target(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &operatorpb.GetTargetResponse{Target: targetPB(t)}, nil
}

func (a targets) CreateTarget(ctx context.Context, r *operatorpb.CreateTargetRequest) (*operatorpb.CreateTargetResponse, error) {
	var wrong violations
	agent, err := found(&wrong, "agent", "agent", r.GetAgent(), "certmesh agents list", func(k string) (domain.Agent, error) { return a.Store.Agent(ctx, k) })
	if err != nil {
		return nil, err
	}
	settings := r.GetSettingsJson()
	if settings == "" {
		settings = "{}"
	}
	for _, p := range a.CheckTarget(r.GetKind(), json.RawMessage(settings)) {
		wrong.add(settingsField(p.Field), "%s", p.Message)
	}
	if agent.State == domain.AgentRetired {
		wrong.add("agent", "agent %q is retired; choose another", agent.Name)
	}
	// An unknown kind has been reported above.
	if agent.ID != "" && len(wrong) == 0 && !canServe(agent, r.GetKind()) {
		wrong.add("kind", "agent %s cannot serve targets of kind %s; it announces %s", agent.Name, r.GetKind(), announced(agent))
	}
	if err := wrong.err(); err != nil {
		return nil, err
	}
	op := a.op(ctx)
	t := domain.Target{
		ID: newID(id.Target), Name: r.GetName(), AgentID: agent.ID, Kind: r.GetKind(), Settings: []byte(settings),
		VerifyAddress: r.GetVerifyAddress(), ServerName: r.GetServerName(), Enabled: true, CreatedAt: op.At, Revision: 1,
	}
	if err := a.Store.CreateTarget(ctx, t, op); err != nil {
		return nil, renamed(err, targetField)
	}
	a.Sessions.PushState(agent.ID)
	a.Hub.Publish(hub.Notice{Kind: hub.Targets, ID: t.ID})
	return &operatorpb.CreateTargetResponse{Target: targetPB(t)}, nil
}

// settingsField is the request's path to a setting that CheckTarget names.
func settingsField(field string) string {
	switch field {
	case "kind":
		return "kind"
	case "":
		return "settings_json"
	}
	return "settings_json." + field
}

// targetField translates the store's fields of a target to the request's.
func targetField(field string) string {
	switch field {
	case "agent_id":
		return "agent"
	case "settings":
		return "settings_json"
	}
	return field
}
