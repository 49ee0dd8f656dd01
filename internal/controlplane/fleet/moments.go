package fleet

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// MomentRow is the row of a checkpoint or snapshot as it was before its host was asked.
type MomentRow struct {
	ID        string
	SandboxID string // of a checkpoint
	Status    string
	Deleted   bool // kept as the proof that it was ours and is not wanted
	Missing   bool // known to be missing on its host
	Due       bool // nobody works on it any more
	InUse     bool // sandboxes made from it are left
}

// MomentAction is what is to be done about one saved moment.
type MomentAction string

const (
	MomentFinish MomentAction = "finish" // it was saved, though nobody heard
	MomentDrop   MomentAction = "drop"   // it was not
	MomentRemove MomentAction = "remove" // have the host remove it, and end its row
	MomentLost   MomentAction = "lost"   // its host does not have it: say so, change nothing
	MomentFound  MomentAction = "found"  // it has it again
	MomentAdopt  MomentAction = "adopt"  // it has one of a sandbox of ours that has no row
)

// Presence is what a host has of a moment.
type Presence int

// A host has nothing of it, is at saving it, or has it.
const (
	Absent Presence = iota
	Saving
	Present
)

// JudgeMoment says what to do about a saved moment, "" for nothing: row is nil if there is none. What is being
// saved is judged when that has ended. It is a pure function. A snapshot without a row is left alone: it may be a
// fork's, or of a database that was restored.
func JudgeMoment(row *MomentRow, presence Presence, checkpoint bool) MomentAction {
	has := presence == Present
	switch {
	case presence == Saving:
		return ""
	case row == nil:
		if has && checkpoint {
			return MomentAdopt
		}
		return ""
	case row.Deleted:
		if has {
			return MomentRemove
		}
		return ""
	case row.Status == momentSaving && row.Due && has:
		return MomentFinish
	case row.Status == momentSaving && row.Due:
		return MomentDrop
	case row.Status == momentDeleting && row.Due && !row.InUse:
		return MomentRemove
	case row.Status == momentReady && !has && !row.Missing:
		return MomentLost
	case row.Status == momentReady && has && row.Missing:
		return MomentFound
	}
	return ""
}

// compareMoments compares the rows of saved moments with what hosts have, and finds out what became of
// saves and deletes that were cut off; one replica runs it.
func (f *Fleet) compareMoments(ctx context.Context) {
	notBefore := map[string]time.Time{}
	every(ctx, f.times.ReconcileEvery, func(ctx context.Context) {
		hosts, err := f.store.HostsWithMoments(ctx, db.HostsWithMomentsParams{MaxAge: f.times.ReconcileAge, MaxRows: compareBatch})
		if err != nil && ctx.Err() == nil {
			f.log.Warn("look for saved moments to compare", "error", err)
		}
		for _, id := range hosts {
			if time.Now().Before(notBefore[id]) {
				continue
			}
			delete(notBefore, id)
			if err := f.compareMomentsOf(ctx, id); err != nil && ctx.Err() == nil {
				notBefore[id] = time.Now().Add(hostBackoff)
				f.log.Warn("a host's saved moments could not be compared with the rows", "host_id", id, "error", err)
			}
		}
	})
}

// compareMomentsOf reads the rows before it asks the host: what is missing then was there to be told, and
// what has no row by then is adopted only if it still has none.
func (f *Fleet) compareMomentsOf(ctx context.Context, hostID string) error {
	ctx, cancel := context.WithTimeout(ctx, compareLimit)
	defer cancel()
	rows, err := f.momentRows(ctx, hostID)
	if err != nil {
		return err
	}
	var moments []*agentv1.ListMomentsResponse_Moment
	err = f.ask(ctx, hostID, 0, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).ListMoments(ctx, connect.NewRequest(&agentv1.ListMomentsRequest{}))
		if err == nil {
			moments = res.Msg.GetMoments()
		}
		return err
	})
	if wrenn.KindOf(err) == wrenn.KindNotImplemented { // an older agent
		return f.store.MarkMomentsCompared(ctx, hostID)
	}
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	slices.SortFunc(moments, func(a, b *agentv1.ListMomentsResponse_Moment) int { // parents first
		return a.GetCheckpoint().GetCreatedAt().AsTime().Compare(b.GetCheckpoint().GetCreatedAt().AsTime())
	})
	for _, m := range moments {
		id := m.GetCheckpoint().GetId()
		seen[id] = true
		presence := Present
		if m.GetSaving() {
			presence = Saving
		}
		if err := f.actOnMoment(ctx, hostID, JudgeMoment(rows[id], presence, m.GetSandboxId() != ""), rows[id], m); err != nil {
			return err
		}
	}
	for id, row := range rows {
		if seen[id] {
			continue
		}
		if err := f.actOnMoment(ctx, hostID, JudgeMoment(row, Absent, row.SandboxID != ""), row, nil); err != nil {
			return err
		}
	}
	return f.store.MarkMomentsCompared(ctx, hostID)
}

func (f *Fleet) momentRows(ctx context.Context, hostID string) (map[string]*MomentRow, error) {
	checkpoints, err := f.store.CheckpointsOfHost(ctx, hostID)
	if err != nil {
		return nil, err
	}
	snapshots, err := f.store.SnapshotsOfHost(ctx, hostID)
	if err != nil {
		return nil, err
	}
	rows := make(map[string]*MomentRow, len(checkpoints)+len(snapshots))
	for _, c := range checkpoints {
		rows[c.ID] = &MomentRow{ID: c.ID, SandboxID: c.SandboxID, Status: c.Status, Deleted: c.Deleted, Missing: c.Missing, Due: c.Due}
	}
	for _, s := range snapshots {
		rows[s.ID] = &MomentRow{ID: s.ID, Status: s.Status, Deleted: s.Deleted, Missing: s.Missing, Due: s.Due, InUse: s.InUse}
	}
	return rows, nil
}

// actOnMoment does what was judged; m is nil if the host does not have it, row if there is none.
func (f *Fleet) actOnMoment(ctx context.Context, hostID string, do MomentAction, row *MomentRow, m *agentv1.ListMomentsResponse_Moment) error {
	switch do {
	case MomentAdopt:
		c := m.GetCheckpoint()
		f.log.Warn("a host has a checkpoint that is not in the database; it is adopted", "checkpoint_id", c.GetId(), "sandbox_id", m.GetSandboxId(), "host_id", hostID)
		return f.store.AdoptCheckpoint(ctx, db.AdoptCheckpointParams{
			ID: c.GetId(), SandboxID: m.GetSandboxId(), HostID: hostID, ParentID: c.GetParentId(), HasMemory: c.GetHasMemory(), Needs: needsOf(c.GetNeeds()), CreatedAt: c.GetCreatedAt().AsTime(),
		})
	case MomentLost, MomentFound:
		return f.markMoment(ctx, row, do == MomentLost)
	}
	checkpoint := row != nil && row.SandboxID != ""
	switch {
	case do == MomentFinish && checkpoint:
		return f.finishCheckpoint(ctx, row.SandboxID, m.GetCheckpoint())
	case do == MomentFinish:
		err := f.finishSnapshot(ctx, m.GetCheckpoint(), false)
		if wrenn.KindOf(err) == wrenn.KindAlreadyExists { // its name was given away meanwhile
			_, err = f.store.RetireSnapshot(ctx, db.RetireSnapshotParams{ID: row.ID})
		}
		return err
	case do == MomentDrop && checkpoint:
		_, err := f.store.DropCheckpoint(ctx, db.DropCheckpointParams{ID: row.ID})
		return err
	case do == MomentDrop:
		_, err := f.store.DropSnapshot(ctx, db.DropSnapshotParams{ID: row.ID})
		return err
	case do == MomentRemove && checkpoint:
		return f.removeCheckpoint(ctx, hostID, row.SandboxID, row.ID, 0)
	case do == MomentRemove:
		return f.removeSnapshot(ctx, hostID, row.ID, 0)
	}
	return nil
}

func (f *Fleet) markMoment(ctx context.Context, row *MomentRow, missing bool) (err error) {
	var n int64
	if row.SandboxID != "" {
		n, err = f.store.MarkCheckpoint(ctx, db.MarkCheckpointParams{ID: row.ID, Missing: missing})
	} else {
		n, err = f.store.MarkSnapshot(ctx, db.MarkSnapshotParams{ID: row.ID, Missing: missing})
	}
	if n > 0 && missing {
		f.log.Error("a host does not have a saved moment that it should have", "id", row.ID)
	}
	return err
}
