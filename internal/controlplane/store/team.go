package store

import (
	"context"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
)

// Team is what one team can see: the only way to the queries of queries/team.sql, each of which it binds
// to the team, whatever the caller filled in.
type Team struct {
	q     *db.Queries
	id    string
	store *Store // nil within a transaction
}

// Team narrows the store to one team.
func (s *Store) Team(id string) Team { return Team{s.Queries, id, s} }

// Team narrows the transaction to one team.
func (t Tx) Team(id string) Team { return Team{t.Queries, id, nil} }

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

// FindSandboxes gives a page of those that match. Its statement is planned for what is asked.
func (t Team) FindSandboxes(ctx context.Context, p db.FindSandboxesParams) (rows []db.FindSandboxesRow, err error) {
	p.TeamID = t.id
	err = t.store.Tx(ctx, func(tx Tx) error {
		if err := tx.PlanAnew(ctx); err != nil {
			return err
		}
		rows, err = tx.FindSandboxes(ctx, p)
		return err
	})
	return rows, err
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

// BeginChange takes a sandbox for a pause or resume; IsNotFound says that it is not in the state for it, or its host is
// not online.
func (t Team) BeginChange(ctx context.Context, p db.BeginChangeParams) (db.Sandbox, error) {
	p.TeamID = t.id
	row, err := t.q.BeginChange(ctx, p)
	return db.Sandbox(row), err
}

// InsertCheckpoint tells whether there was room for it and its name was free.
func (t Team) InsertCheckpoint(ctx context.Context, p db.InsertCheckpointParams) (bool, error) {
	p.TeamID = t.id
	n, err := t.q.InsertCheckpoint(ctx, p)
	return n > 0, err
}

// GetCheckpoint gives a checkpoint, also one that is deleted.
func (t Team) GetCheckpoint(ctx context.Context, id string) (db.GetCheckpointRow, error) {
	return t.q.GetCheckpoint(ctx, db.GetCheckpointParams{TeamID: t.id, ID: id})
}

func (t Team) ListCheckpoints(ctx context.Context, sandboxID string) ([]db.Checkpoint, error) {
	return t.q.ListCheckpoints(ctx, db.ListCheckpointsParams{TeamID: t.id, SandboxID: sandboxID})
}

func (t Team) BeginDeleteCheckpoint(ctx context.Context, p db.BeginDeleteCheckpointParams) (db.Checkpoint, error) {
	p.TeamID = t.id
	return t.q.BeginDeleteCheckpoint(ctx, p)
}

func (t Team) InsertSnapshot(ctx context.Context, p db.InsertSnapshotParams) error {
	p.TeamID = t.id
	return t.q.InsertSnapshot(ctx, p)
}

func (t Team) SnapshotCount(ctx context.Context) (int64, error) { return t.q.SnapshotCount(ctx, t.id) }

// GetSnapshot gives a snapshot, also one that is deleted.
func (t Team) GetSnapshot(ctx context.Context, id string) (db.Snapshot, error) {
	return t.q.GetSnapshot(ctx, db.GetSnapshotParams{TeamID: t.id, ID: id})
}

func (t Team) SnapshotByName(ctx context.Context, name string) (db.Snapshot, error) {
	return t.q.SnapshotByName(ctx, db.SnapshotByNameParams{TeamID: t.id, Name: name})
}

// LockSnapshotByName is SnapshotByName in a transaction: nobody else changes it meanwhile.
func (t Team) LockSnapshotByName(ctx context.Context, name string) (db.Snapshot, error) {
	return t.q.LockSnapshotByName(ctx, db.LockSnapshotByNameParams{TeamID: t.id, Name: name})
}

func (t Team) ListSnapshots(ctx context.Context, p db.ListSnapshotsParams) ([]db.ListSnapshotsRow, error) {
	p.TeamID = t.id
	return t.q.ListSnapshots(ctx, p)
}

// SnapshotDependents are ids of sandboxes that were made from a snapshot and are still there.
func (t Team) SnapshotDependents(ctx context.Context, snapshotID string, most int32) ([]string, error) {
	return t.q.SnapshotDependents(ctx, db.SnapshotDependentsParams{TeamID: t.id, FromSnapshot: &snapshotID, MaxRows: most})
}

// EventsAfter are the team's events that come after seq in their order.
func (t Team) EventsAfter(ctx context.Context, seq int64, most int32) ([]db.Event, error) {
	return t.q.EventsAfter(ctx, db.EventsAfterParams{TeamID: &t.id, After: &seq, MaxRows: most})
}
