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

// The statuses of a saved moment's row. `saving` and `deleting` belong to an operation until its lease ends; then
// compareMoments finds out what became of it.
const (
	momentSaving   = "saving"
	momentReady    = "ready"
	momentDeleting = "deleting"
)

// maxCheckpoints bounds those of one sandbox.
const maxCheckpoints = 1000

// CheckpointSpec is a checkpoint to be made.
type CheckpointSpec struct {
	ID        string
	SandboxID string
	Name      *string
}

// Checkpoint saves the moment of a running or paused sandbox. Repeating it with the same id gives the first one's result.
func (f *Fleet) Checkpoint(ctx context.Context, by Actor, teamID string, spec CheckpointSpec) (db.Checkpoint, error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.CreateLimit)
	defer cancel()
	hostID, err := f.beginCheckpoint(ctx, by, teamID, spec)
	if err != nil {
		return db.Checkpoint{}, err
	}
	defer f.keepCheckpoint(ctx, spec.ID)()
	var saved *agentv1.Checkpoint
	req := &agentv1.CheckpointSandboxRequest{Id: spec.SandboxID, OperationId: wrenn.NewID(wrenn.PrefixOperation), CheckpointId: spec.ID}
	err = f.askShowing(ctx, slow{teamID, hostID, spec.SandboxID, "checkpoint", req.OperationId}, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).CheckpointSandbox(ctx, connect.NewRequest(req))
		if err == nil {
			saved = res.Msg.GetCheckpoint()
		}
		return err
	})
	if err != nil {
		f.settleCheckpoint(ctx, hostID, spec.SandboxID, spec.ID, err)
		return db.Checkpoint{}, err
	}
	if err := f.finishCheckpoint(ctx, spec.SandboxID, saved); err != nil {
		return db.Checkpoint{}, err
	}
	f.fault("checkpoint", pointWritten)
	row, err := f.store.Team(teamID).GetCheckpoint(ctx, spec.ID)
	return row.Checkpoint, err
}

// beginCheckpoint writes the row of a checkpoint that is about to be saved.
func (f *Fleet) beginCheckpoint(ctx context.Context, by Actor, teamID string, spec CheckpointSpec) (hostID string, err error) {
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		team := tx.Team(teamID)
		sb, err := team.GetSandbox(ctx, spec.SandboxID)
		if store.IsNotFound(err) {
			return notFound("sandbox")
		}
		if err != nil {
			return err
		}
		hostID = sb.Sandbox.HostID
		if row, err := team.GetCheckpoint(ctx, spec.ID); err == nil {
			if row.Checkpoint.DeletedAt != nil || row.Checkpoint.Status == momentDeleting {
				return wrenn.Errorf(wrenn.KindConflict, "the first request did not come to an end, and what it made is deleted; use a new Idempotency-Key")
			}
			return nil // a repeated request: saving again gives the first one's moment
		} else if !store.IsNotFound(err) {
			return err
		}
		if s := sb.Sandbox.Status; !momentous(s) {
			return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", s).With("status", s)
		}
		if !sb.HostOnline {
			return hostAway(hostID)
		}
		return f.insertCheckpoint(ctx, tx, by, teamID, spec)
	})
	return hostID, err
}

func (f *Fleet) insertCheckpoint(ctx context.Context, tx store.Tx, by Actor, teamID string, spec CheckpointSpec) error {
	ok, err := tx.Team(teamID).InsertCheckpoint(ctx, db.InsertCheckpointParams{
		ID: spec.ID, SandboxID: spec.SandboxID, Name: spec.Name, Lease: f.times.Lease, CreatedBy: by.ID, Most: maxCheckpoints,
	})
	if err != nil {
		return err
	}
	if !ok {
		return wrenn.Errorf(wrenn.KindAlreadyExists, "the sandbox has a checkpoint of that name, or %d of them, which is the most; choose another name or delete one", maxCheckpoints).With("field", "name")
	}
	if err := audit(ctx, tx, by, &teamID, "checkpoint.create", spec.ID, map[string]any{"sandbox_id": spec.SandboxID}); err != nil {
		return err
	}
	return event(ctx, tx, "checkpoint.saving", &teamID, spec.SandboxID, map[string]any{"checkpoint_id": spec.ID})
}

// keepCheckpoint renews the lease of a checkpoint that is being saved until stop is called.
func (f *Fleet) keepCheckpoint(ctx context.Context, id string) (stop func()) {
	return f.keepRenewing(ctx, func(ctx context.Context) error {
		return f.store.PutOffCheckpoint(ctx, db.PutOffCheckpointParams{ID: id, Delay: f.times.Lease})
	})
}

// finishCheckpoint writes what a host saved.
func (f *Fleet) finishCheckpoint(ctx context.Context, sandboxID string, c *agentv1.Checkpoint) error {
	return f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		row, err := tx.FinishCheckpoint(ctx, db.FinishCheckpointParams{
			ID: c.GetId(), ParentID: c.GetParentId(), HasMemory: c.GetHasMemory(), SizeBytes: int64(c.GetSizeBytes()), OwnBytes: int64(c.GetOwnBytes()),
			Needs: needsOf(c.GetNeeds()), CreatedAt: c.GetCreatedAt().AsTime(),
		})
		if err != nil {
			return ignoreNotFound(err) // somebody else was quicker
		}
		return event(ctx, tx, "checkpoint.ready", &row.TeamID, sandboxID, map[string]any{"checkpoint_id": row.ID})
	})
}

// settleCheckpoint finds out what became of a save that ended with cause. Where the host did not or does not
// answer, and so may still be at it, the row waits for compareMoments.
func (f *Fleet) settleCheckpoint(ctx context.Context, hostID, sandboxID, id string, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.Lease)
	defer cancel()
	saved, err := f.askCheckpoints(ctx, hostID, sandboxID)
	if err == nil {
		if c := saved[id]; c != nil {
			err = f.finishCheckpoint(ctx, sandboxID, c)
		} else if wrenn.KindOf(cause) != wrenn.KindHostUnavailable {
			_, err = f.store.DropCheckpoint(ctx, db.DropCheckpointParams{ID: id, Now: true})
		}
	}
	if err != nil {
		f.log.Info("what became of a checkpoint is found out later", "checkpoint_id", id, "error", err)
	}
}

// askCheckpoints asks a host for a sandbox's checkpoints, by id, with their sizes.
func (f *Fleet) askCheckpoints(ctx context.Context, hostID, sandboxID string) (map[string]*agentv1.Checkpoint, error) {
	byID := map[string]*agentv1.Checkpoint{}
	err := f.ask(ctx, hostID, 0, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).ListCheckpoints(ctx, connect.NewRequest(&agentv1.ListCheckpointsRequest{Id: sandboxID}))
		for _, c := range res.Msg.GetCheckpoints() {
			byID[c.GetId()] = c
		}
		return err
	})
	return byID, err
}

// sizesLimit bounds how long a list waits for a host to say how large things are now.
const sizesLimit = 3 * time.Second

// Checkpoints lists a sandbox's checkpoints, oldest first, with the sizes they have now; those last told if its host
// does not answer.
func (f *Fleet) Checkpoints(ctx context.Context, teamID, sandboxID string) ([]db.Checkpoint, error) {
	sb, err := f.Get(ctx, teamID, sandboxID)
	if err != nil {
		return nil, err
	}
	rows, err := f.store.Team(teamID).ListCheckpoints(ctx, sandboxID)
	if err != nil || len(rows) == 0 || !sb.HostOnline {
		return rows, err
	}
	limited, cancel := context.WithTimeout(ctx, sizesLimit)
	defer cancel()
	now, err := f.askCheckpoints(limited, sb.Sandbox.HostID, sandboxID)
	if err != nil {
		f.log.Info("a host does not say how large checkpoints are", "sandbox_id", sandboxID, "error", err)
		return rows, nil
	}
	for i := range rows {
		if c := now[rows[i].ID]; c != nil {
			rows[i].SizeBytes, rows[i].OwnBytes = int64(c.GetSizeBytes()), int64(c.GetOwnBytes())
		}
	}
	return rows, nil
}

// DeleteCheckpoint deletes a checkpoint; those that descend from it stay whole and become children of its parent.
func (f *Fleet) DeleteCheckpoint(ctx context.Context, by Actor, teamID, sandboxID, id string) error {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.DeleteLimit)
	defer cancel()
	sb, err := f.Get(ctx, teamID, sandboxID)
	if err != nil {
		return err
	}
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		if !sb.HostOnline {
			return hostAway(sb.Sandbox.HostID)
		}
		_, err := tx.Team(teamID).BeginDeleteCheckpoint(ctx, db.BeginDeleteCheckpointParams{SandboxID: sandboxID, ID: id, Lease: f.times.Lease})
		if store.IsNotFound(err) {
			return notFound("checkpoint")
		}
		if err != nil {
			return err
		}
		return audit(ctx, tx, by, &teamID, "checkpoint.delete", id, map[string]any{"sandbox_id": sandboxID})
	})
	if err != nil {
		return err
	}
	err = f.removeCheckpoint(ctx, sb.Sandbox.HostID, sandboxID, id, f.times.RetryFor)
	if err != nil {
		if put := f.store.PutOffCheckpoint(context.WithoutCancel(ctx), db.PutOffCheckpointParams{ID: id, Delay: f.times.ReconcileEvery}); put != nil {
			f.log.Warn("put off a delete", "checkpoint_id", id, "error", put)
		}
	}
	return err
}

// removeCheckpoint has the host remove a checkpoint and ends its row, if that is `deleting`.
func (f *Fleet) removeCheckpoint(ctx context.Context, hostID, sandboxID, id string, retryFor time.Duration) error {
	req := &agentv1.DeleteCheckpointRequest{Id: sandboxID, OperationId: wrenn.NewID(wrenn.PrefixOperation), CheckpointId: id}
	f.fault("delete_checkpoint", pointBegun)
	err := f.ask(f.faultWhenSent(ctx, "delete_checkpoint"), hostID, retryFor, func(ctx context.Context, t agents.Target) error {
		_, err := f.agents.Service(t).DeleteCheckpoint(ctx, connect.NewRequest(req))
		return err
	})
	if err != nil {
		return err
	}
	f.fault("delete_checkpoint", pointAsked)
	return f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		row, err := tx.FinishDeleteCheckpoint(ctx, id)
		if err != nil {
			return ignoreNotFound(err)
		}
		if err := tx.ReparentCheckpoints(ctx, id); err != nil {
			return err
		}
		return event(ctx, tx, "checkpoint.deleted", &row.TeamID, sandboxID, map[string]any{"checkpoint_id": id})
	})
}

// RollbackSpec says what a sandbox is taken back to.
type RollbackSpec struct {
	SandboxID, CheckpointID string
	KeepAs                  string // the state left behind becomes this checkpoint; "" discards it
	OperationID             string // of a request that may be repeated; "" makes one
}

// Rollback takes a running or paused sandbox back to one of its checkpoints, in place; it then runs.
func (f *Fleet) Rollback(ctx context.Context, by Actor, teamID string, spec RollbackSpec) error {
	sb, err := f.Get(ctx, teamID, spec.SandboxID)
	if err != nil {
		return err
	}
	target, err := f.store.Team(teamID).GetCheckpoint(ctx, spec.CheckpointID)
	if store.IsNotFound(err) || err == nil && (target.Checkpoint.SandboxID != spec.SandboxID || target.Checkpoint.DeletedAt != nil || target.Checkpoint.Status != momentReady) {
		return notFound("checkpoint")
	}
	if err != nil {
		return err
	}
	from := wrenn.SandboxState(sb.Sandbox.Status)
	if !momentous(sb.Sandbox.Status) && sb.Sandbox.OperationID != spec.OperationID {
		return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", from).With("status", string(from))
	}
	c := change{by: by, teamID: teamID, id: spec.SandboxID, op: spec.OperationID, action: "sandbox.rollback", from: from, via: wrenn.SandboxResuming, needs: target.Checkpoint.Needs, replaces: true}
	if spec.KeepAs != "" {
		c.also = func(ctx context.Context, tx store.Tx) error {
			if _, err := tx.Team(teamID).GetCheckpoint(ctx, spec.KeepAs); !store.IsNotFound(err) {
				return err // of an attempt before
			}
			return f.insertCheckpoint(ctx, tx, by, teamID, CheckpointSpec{ID: spec.KeepAs, SandboxID: spec.SandboxID})
		}
	}
	if spec.KeepAs != "" {
		defer f.keepCheckpoint(context.WithoutCancel(ctx), spec.KeepAs)()
	}
	_, err = f.change(ctx, c, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).RollbackSandbox(ctx, connect.NewRequest(&agentv1.RollbackSandboxRequest{
			Id: spec.SandboxID, OperationId: op, CheckpointId: spec.CheckpointID, KeepAs: spec.KeepAs,
		}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
	if spec.KeepAs != "" {
		f.settleCheckpoint(ctx, sb.Sandbox.HostID, spec.SandboxID, spec.KeepAs, err)
	}
	return err
}
