package store

import (
	"context"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
)

// Team is what one team can see: the only way to the queries of queries/team.sql, each of which it binds
// to the team, whatever the caller filled in.
type Team struct {
	q  *db.Queries
	id string
}

// Team narrows the store to one team.
func (s *Store) Team(id string) Team { return Team{s.Queries, id} }

// Team narrows the transaction to one team.
func (t Tx) Team(id string) Team { return Team{t.Queries, id} }

// ID is the team's id.
func (t Team) ID() string { return t.id }

func (t Team) InsertAPIKey(ctx context.Context, p db.InsertAPIKeyParams) (db.ApiKey, error) {
	p.TeamID = t.id
	return t.q.InsertAPIKey(ctx, p)
}

func (t Team) ListAPIKeys(ctx context.Context, p db.ListAPIKeysParams) ([]db.ApiKey, error) {
	p.TeamID = t.id
	return t.q.ListAPIKeys(ctx, p)
}

// DeleteAPIKey tells whether there was such a key.
func (t Team) DeleteAPIKey(ctx context.Context, id string) (bool, error) {
	n, err := t.q.DeleteAPIKey(ctx, db.DeleteAPIKeyParams{TeamID: t.id, ID: id})
	return n > 0, err
}

func (t Team) ListTemplates(ctx context.Context) ([]db.Template, error) {
	return t.q.ListTemplates(ctx, t.id)
}

func (t Team) GetTemplate(ctx context.Context, name string) (db.Template, error) {
	return t.q.GetTemplate(ctx, db.GetTemplateParams{TeamID: t.id, Name: name})
}

// PlacementHosts are the online hosts the team may use; hostID, if not nil, narrows to one.
func (t Team) PlacementHosts(ctx context.Context, template string, hostID *string) ([]db.PlacementHostsRow, error) {
	return t.q.PlacementHosts(ctx, db.PlacementHostsParams{TeamID: t.id, Template: template, HostID: hostID})
}

func (t Team) InsertSandbox(ctx context.Context, p db.InsertSandboxParams) (db.Sandbox, error) {
	p.TeamID = t.id
	return t.q.InsertSandbox(ctx, p)
}

func (t Team) GetSandbox(ctx context.Context, id string) (db.GetSandboxRow, error) {
	return t.q.GetSandbox(ctx, db.GetSandboxParams{TeamID: t.id, ID: id})
}

func (t Team) SandboxRoute(ctx context.Context, id string) (db.SandboxRouteRow, error) {
	return t.q.SandboxRoute(ctx, db.SandboxRouteParams{TeamID: t.id, ID: id})
}

func (t Team) ListSandboxes(ctx context.Context, p db.ListSandboxesParams) ([]db.ListSandboxesRow, error) {
	p.TeamID = t.id
	return t.q.ListSandboxes(ctx, p)
}

// TouchSandbox counts as activity; it tells whether the sandbox runs.
func (t Team) TouchSandbox(ctx context.Context, id string) (bool, error) {
	n, err := t.q.TouchSandbox(ctx, db.TouchSandboxParams{TeamID: t.id, ID: id})
	return n > 0, err
}

func (t Team) SetSandboxTimeout(ctx context.Context, p db.SetSandboxTimeoutParams) (bool, error) {
	p.TeamID = t.id
	n, err := t.q.SetSandboxTimeout(ctx, p)
	return n > 0, err
}

func (t Team) BeginDelete(ctx context.Context, p db.BeginDeleteParams) (db.Sandbox, error) {
	p.TeamID = t.id
	return t.q.BeginDelete(ctx, p)
}
