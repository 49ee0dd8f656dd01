package fleet

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// maxSnapshots bounds those of one team.
const maxSnapshots = 1000

// maxDependentsShown bounds the ids in the error of a delete.
const maxDependentsShown = 100

// SnapshotSpec is a snapshot to be made.
type SnapshotSpec struct {
	ID        string
	SandboxID string
	Name      string // "": the id
	Overwrite bool   // in place of one of that name
}

// SaveSnapshot makes a template of its team out of a sandbox's moment; the sandbox goes on as it was.
// Repeating it with the same id gives the first one's result.
func (f *Fleet) SaveSnapshot(ctx context.Context, by Actor, teamID string, spec SnapshotSpec) (db.Snapshot, error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.CreateLimit)
	defer cancel()
	hostID, err := f.beginSnapshot(ctx, by, teamID, spec)
	if err != nil {
		return db.Snapshot{}, err
	}
	defer f.keepRenewing(ctx, func(ctx context.Context) error {
		return f.store.PutOffSnapshot(ctx, db.PutOffSnapshotParams{ID: spec.ID, Delay: f.times.Lease})
	})()
	var saved *agentv1.Checkpoint
	req := &agentv1.SaveSnapshotRequest{Id: spec.SandboxID, OperationId: wrenn.NewID(wrenn.PrefixOperation), SnapshotId: spec.ID}
	err = f.askShowing(ctx, slow{teamID, hostID, spec.SandboxID, "snapshot", req.OperationId}, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).SaveSnapshot(ctx, connect.NewRequest(req))
		if err == nil {
			saved = res.Msg.GetSnapshot()
		}
		return err
	})
	if err != nil {
		f.retire(ctx, hostID, spec.ID, err)
		return db.Snapshot{}, err
	}
	if err := f.finishSnapshot(ctx, saved, spec.Overwrite); err != nil {
		f.retire(ctx, hostID, spec.ID, err)
		return db.Snapshot{}, err
	}
	f.fault("snapshot", pointWritten)
	return f.store.Team(teamID).GetSnapshot(ctx, spec.ID)
}

// beginSnapshot writes the row of a snapshot that is about to be saved. Its name becomes its own when it is.
func (f *Fleet) beginSnapshot(ctx context.Context, by Actor, teamID string, spec SnapshotSpec) (hostID string, err error) {
	if spec.Name == "" {
		spec.Name = spec.ID
	}
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		team := tx.Team(teamID)
		sb, err := team.GetSandbox(ctx, spec.SandboxID)
		if store.IsNotFound(err) {
			return notFound("sandbox")
		}
		if err != nil {
			return err
		}
		s := sb.Sandbox
		hostID = s.HostID
		if row, err := team.GetSnapshot(ctx, spec.ID); err == nil {
			if row.DeletedAt != nil || row.Status == momentDeleting {
				return wrenn.Errorf(wrenn.KindConflict, "the first request did not come to an end, and what it made is deleted; use a new Idempotency-Key")
			}
			return nil // a repeated request
		} else if !store.IsNotFound(err) {
			return err
		}
		if !momentous(s.Status) {
			return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", s.Status).With("status", s.Status)
		}
		if !sb.HostOnline {
			return hostAway(hostID)
		}
		if err := checkSnapshotName(ctx, team, spec); err != nil {
			return err
		}
		if err := team.InsertSnapshot(ctx, db.InsertSnapshotParams{
			ID: spec.ID, Name: spec.Name, HostID: s.HostID, SandboxID: s.ID, Template: s.Template, DefaultUser: s.DefaultUser,
			VCPUs: s.VCPUs, MemoryMB: s.MemoryMB, DiskMB: s.DiskMB, Lease: f.times.Lease, CreatedBy: by.ID,
		}); err != nil {
			return err
		}
		if err := audit(ctx, tx, by, &teamID, "snapshot.create", spec.ID, map[string]any{"sandbox_id": s.ID, "name": spec.Name}); err != nil {
			return err
		}
		return event(ctx, tx, "snapshot.saving", &teamID, spec.ID, map[string]any{"sandbox_id": s.ID, "name": spec.Name})
	})
	return hostID, err
}

// checkSnapshotName refuses names that are taken: a snapshot never hides an image.
func checkSnapshotName(ctx context.Context, team store.Team, spec SnapshotSpec) error {
	if n, err := team.SnapshotCount(ctx); err != nil {
		return err
	} else if n >= maxSnapshots {
		return wrenn.Errorf(wrenn.KindConflict, "the team has %d snapshots, which is the most; delete one", n)
	}
	if _, err := team.GetTemplate(ctx, spec.Name); err == nil {
		return wrenn.Errorf(wrenn.KindAlreadyExists, "%q is the name of a template; choose another", spec.Name).With("field", "name")
	} else if !store.IsNotFound(err) {
		return err
	}
	if spec.Overwrite {
		return nil
	}
	if _, err := team.SnapshotByName(ctx, spec.Name); err == nil {
		return nameTaken(spec.Name)
	} else if !store.IsNotFound(err) {
		return err
	}
	return nil
}

func nameTaken(name string) error {
	return wrenn.Errorf(wrenn.KindAlreadyExists, "the team has a snapshot %q; choose another name, or overwrite it", name).With("field", "name")
}

// finishSnapshot writes what a host saved and gives it its name. The one that had the name before is found no more, and
// goes when no sandbox made from it is left.
func (f *Fleet) finishSnapshot(ctx context.Context, c *agentv1.Checkpoint, overwrite bool) error {
	return f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		row, err := tx.SnapshotByID(ctx, c.GetId())
		if err != nil || row.Status != momentSaving || row.DeletedAt != nil {
			return ignoreNotFound(err) // somebody else was quicker
		}
		old, err := tx.Team(row.TeamID).LockSnapshotByName(ctx, row.Name)
		switch {
		case store.IsNotFound(err):
		case err != nil:
			return err
		case !overwrite:
			return nameTaken(row.Name)
		default:
			if _, err := tx.RetireSnapshot(ctx, db.RetireSnapshotParams{ID: old.ID}); err != nil {
				return err
			}
		}
		_, err = tx.FinishSnapshot(ctx, db.FinishSnapshotParams{
			ID: row.ID, HasMemory: c.GetHasMemory(), SizeBytes: int64(c.GetSizeBytes()), OwnBytes: int64(c.GetOwnBytes()), Needs: needsOf(c.GetNeeds()), CreatedAt: c.GetCreatedAt().AsTime(),
		})
		if store.IsUniqueViolation(err) { // another took the name at this very moment
			return nameTaken(row.Name)
		}
		if err != nil {
			return ignoreNotFound(err)
		}
		return event(ctx, tx, "snapshot.ready", &row.TeamID, row.ID, map[string]any{"sandbox_id": row.SandboxID, "name": row.Name})
	})
}

// retire gives a snapshot up that could not be saved. What the host may have of it is removed now, or by
// compareMoments where it does not answer.
func (f *Fleet) retire(ctx context.Context, hostID, id string, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.Lease)
	defer cancel()
	_, err := f.store.RetireSnapshot(ctx, db.RetireSnapshotParams{ID: id, Lease: f.times.Lease})
	if err == nil && wrenn.KindOf(cause) != wrenn.KindHostUnavailable {
		err = f.removeSnapshot(ctx, hostID, id, 0)
	}
	if err != nil {
		f.log.Info("a snapshot that was given up is removed later", "snapshot_id", id, "error", err)
	}
}

// DeleteSnapshot deletes a snapshot that no sandbox depends on.
func (f *Fleet) DeleteSnapshot(ctx context.Context, by Actor, teamID, name string) error {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.DeleteLimit)
	defer cancel()
	var row db.Snapshot
	err := f.store.Tx(ctx, func(tx store.Tx) (err error) {
		team := tx.Team(teamID)
		if row, err = team.LockSnapshotByName(ctx, name); store.IsNotFound(err) {
			return f.whyNoSnapshot(ctx, team, name)
		}
		if err != nil {
			return err
		}
		// A create that is about to use it locks the host as well, and then looks whether it is still there.
		if _, err := lockHost(ctx, tx, nil, row.HostID); err != nil {
			return err
		}
		users, err := team.SnapshotDependents(ctx, row.ID, maxDependentsShown)
		if err != nil {
			return err
		}
		if len(users) > 0 {
			return wrenn.Errorf(wrenn.KindInUse, "sandboxes that were made from snapshot %q are still there; delete them first", name).With("sandbox_ids", users)
		}
		if _, err := tx.RetireSnapshot(ctx, db.RetireSnapshotParams{ID: row.ID, Lease: f.times.Lease}); err != nil {
			return err
		}
		return audit(ctx, tx, by, &teamID, "snapshot.delete", row.ID, map[string]any{"name": name})
	})
	if err != nil {
		return err
	}
	if err := f.removeSnapshot(ctx, row.HostID, row.ID, 0); err != nil {
		f.log.Info("a deleted snapshot is removed when its host is back", "snapshot_id", row.ID, "host_id", row.HostID, "error", err)
	}
	return nil
}

func (f *Fleet) whyNoSnapshot(ctx context.Context, team store.Team, name string) error {
	tpl, err := team.GetTemplate(ctx, name)
	switch {
	case store.IsNotFound(err):
		return notFound("snapshot")
	case err != nil:
		return err
	case tpl.TeamID == nil:
		return wrenn.Errorf(wrenn.KindForbidden, "%q is a template of the platform, which only its hosts can remove", name)
	}
	return wrenn.Errorf(wrenn.KindInvalidState, "%q is an image of the team's hosts; remove it there", name)
}

// removeSnapshot has the host remove a snapshot and ends its row, if that is `deleting`.
func (f *Fleet) removeSnapshot(ctx context.Context, hostID, id string, retryFor time.Duration) error {
	f.fault("delete_snapshot", pointBegun)
	err := f.ask(f.faultWhenSent(ctx, "delete_snapshot"), hostID, retryFor, func(ctx context.Context, t agents.Target) error {
		_, err := f.agents.Service(t).DeleteSnapshot(ctx, connect.NewRequest(&agentv1.DeleteSnapshotRequest{SnapshotId: id}))
		return err
	})
	if err != nil {
		return err
	}
	f.fault("delete_snapshot", pointAsked)
	return f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		row, err := tx.FinishDeleteSnapshot(ctx, id)
		if err != nil {
			return ignoreNotFound(err)
		}
		return event(ctx, tx, "snapshot.deleted", &row.TeamID, row.ID, map[string]any{"name": row.Name})
	})
}
