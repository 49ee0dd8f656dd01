package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Spec is what a sandbox shall be.
type Spec struct {
	ID         string
	Template   string
	Name       *string
	VCPUs      int32
	MemoryMB   int32
	DiskMB     int32 // 0: the template's
	TimeoutSec int32
	OnTimeout  wrenn.OnTimeout
	Env        map[string]string
	Metadata   map[string]string
	User       string // "": the template's
	AutoResume bool

	From     string // a checkpoint to begin with, instead of a template
	DiskOnly bool   // leave the memory of the checkpoint or snapshot, and boot its disk
}

// Create makes a sandbox for a team and returns when it runs. The row that reserves its resources is
// committed before the host is asked, so whatever dies on the way, somebody finishes or clears it. Once
// the row is there, a caller that goes away changes nothing.
//
// If a sandbox of that id is there already (a repeated request), Create waits for what becomes of it.
func (f *Fleet) Create(ctx context.Context, by Actor, teamID string, spec Spec) (db.GetSandboxRow, error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx = context.WithoutCancel(ctx)
	if row, err := f.store.Team(teamID).GetSandbox(ctx, spec.ID); err == nil {
		return f.awaitCreate(ctx, row)
	} else if !store.IsNotFound(err) {
		return db.GetSandboxRow{}, err
	}
	row, err := f.reserve(ctx, by, teamID, spec)
	if err != nil {
		return db.GetSandboxRow{}, err
	}
	if err := f.finishCreate(ctx, row); err != nil {
		return db.GetSandboxRow{}, err
	}
	return f.Get(ctx, teamID, row.ID)
}

// awaitCreate waits until another attempt has brought the sandbox out of `creating`.
func (f *Fleet) awaitCreate(ctx context.Context, row db.GetSandboxRow) (db.GetSandboxRow, error) {
	ctx, cancel := context.WithTimeout(ctx, f.times.CreateLimit)
	defer cancel()
	for row.Sandbox.Status == string(wrenn.SandboxCreating) {
		select {
		case <-ctx.Done():
			return row, wrenn.Errorf(wrenn.KindConflict, "the sandbox is still being created; ask for it with GET /v1/sandboxes/%s", row.Sandbox.ID)
		case <-time.After(200 * time.Millisecond):
		}
		var err error
		if row, err = f.Get(ctx, row.Sandbox.TeamID, row.Sandbox.ID); wrenn.KindOf(err) == wrenn.KindNotFound {
			return row, deletedMeanwhile()
		} else if err != nil {
			return row, err
		}
	}
	if row.Sandbox.Status == string(wrenn.SandboxDeleting) {
		return row, deletedMeanwhile()
	}
	if row.Sandbox.Status == string(wrenn.SandboxError) {
		return row, wrenn.Errorf(wrenn.KindAgentError, "the sandbox could not be created: %s", deref(row.Sandbox.Reason)).With("sandbox_id", row.Sandbox.ID)
	}
	return row, nil
}

// reserve picks a host and writes the row, in one transaction that holds the host's row locked, so that two
// replicas cannot both take its last room.
func (f *Fleet) reserve(ctx context.Context, by Actor, teamID string, spec Spec) (db.Sandbox, error) {
	org, err := f.origin(ctx, teamID, spec)
	if err != nil {
		return db.Sandbox{}, err
	}
	p, req, err := f.insertParams(by, spec, org)
	if err != nil {
		return db.Sandbox{}, err
	}
	candidates, err := f.placementHosts(ctx, f.store.Team(teamID), org.hostID, req)
	if err != nil {
		return db.Sandbox{}, err
	}
	if len(candidates) == 0 && org.hostID != nil {
		return db.Sandbox{}, org.away()
	}
	for {
		hostID, refusal := Place(req, candidates)
		if hostID == "" {
			f.stats.PlacementFailures.Add(1)
			return db.Sandbox{}, org.explain(refusal)
		}
		row, now, err := f.reserveOn(ctx, teamID, hostID, req, p)
		if row.ID != "" || err != nil {
			return row, err
		}
		candidates = append(without(candidates, hostID), now...) // as it is now, it does not fit any more
	}
}

// reserveOn writes the row if the host still has room; else it gives the host as it is now, or nothing if
// it is gone or offline.
func (f *Fleet) reserveOn(ctx context.Context, teamID, hostID string, req Request, p db.InsertSandboxParams) (row db.Sandbox, now []Candidate, err error) {
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		if _, err := lockHost(ctx, tx, nil, hostID); err != nil {
			if wrenn.KindOf(err) == wrenn.KindNotFound {
				return nil
			}
			return err
		}
		now, err = f.placementHosts(ctx, tx.Team(teamID), &hostID, req)
		if err != nil {
			return err
		}
		if id, _ := Place(req, now); id == "" {
			return nil
		}
		if p.FromSnapshot != nil {
			snap, err := tx.SnapshotByID(ctx, *p.FromSnapshot)
			if err != nil || snap.DeletedAt != nil || snap.Status != momentReady {
				return wrenn.Wrap(err, wrenn.KindNotFound, "the snapshot was deleted meanwhile")
			}
		}
		p.HostID = hostID
		if row, err = tx.Team(teamID).InsertSandbox(ctx, p); store.IsNotFound(err) {
			return wrenn.Errorf(wrenn.KindConflict, "this create was repeated while it was under way, or its sandbox was deleted since")
		} else if err != nil {
			return err
		}
		return event(ctx, tx, "sandbox.creating", &teamID, row.ID, map[string]any{"host_id": hostID, "template": row.Template})
	})
	return row, now, err
}

func (f *Fleet) insertParams(by Actor, spec Spec, org origin) (db.InsertSandboxParams, Request, error) {
	size, err := org.size(spec)
	if err != nil {
		return db.InsertSandboxParams{}, Request{}, err
	}
	metadata, err := json.Marshal(nonNil(spec.Metadata))
	if err != nil {
		return db.InsertSandboxParams{}, Request{}, err
	}
	env, err := json.Marshal(nonNil(spec.Env))
	if err != nil {
		return db.InsertSandboxParams{}, Request{}, err
	}
	p := db.InsertSandboxParams{
		ID: spec.ID, Name: spec.Name, Template: org.template, DefaultUser: cmp.Or(spec.User, org.user),
		VCPUs: int32(size.VCPUs), MemoryMB: int32(size.MemoryMB), DiskMB: int32(size.DiskMB),
		TimeoutSec: spec.TimeoutSec, OnTimeout: string(spec.OnTimeout), AutoResume: spec.AutoResume, Metadata: metadata, CreateEnv: env,
		FromSandbox: org.sandbox, FromCheckpoint: org.checkpoint, FromSnapshot: org.snapshot, DiskOnly: spec.DiskOnly,
		OperationID: wrenn.NewID(wrenn.PrefixOperation), Lease: f.times.Lease, CreatedBy: by.ID,
	}
	req := Request{Resources: size, Template: org.template, Needs: org.needs, Saved: org.hostID != nil}
	if spec.DiskOnly {
		if !req.Saved {
			return p, req, wrenn.Errorf(wrenn.KindInvalidRequest, "disk_only is for a sandbox that is made from a snapshot or checkpoint").With("field", "disk_only")
		}
		req.Needs = Needs{}
	}
	return p, req, nil
}

// placementHosts are the online hosts of a team as Place sees them; hostID, if not nil, narrows to one.
func (f *Fleet) placementHosts(ctx context.Context, team store.Team, hostID *string, req Request) ([]Candidate, error) {
	rows, err := team.PlacementHosts(ctx, req.Template, hostID)
	if err != nil {
		return nil, err
	}
	out := f.candidates(rows)
	for i := range out {
		out[i].HasTemplate = out[i].HasTemplate || req.Saved || req.Resume
	}
	return out, nil
}

// candidates turns rows into what Place sees.
func (f *Fleet) candidates(rows []db.PlacementHostsRow) []Candidate {
	out := make([]Candidate, 0, len(rows))
	for _, r := range rows {
		h := r.Host
		out = append(out, Candidate{
			ID: h.ID, Own: h.TeamID != nil, Draining: h.Draining, HasTemplate: r.HasTemplate, Has: hostHas(h), Capacity: f.capacity(h),
			Reserved:  Resources{r.ReservedVCPUs, r.ReservedMemoryMB, r.ReservedDiskMB},
			Sandboxes: r.ReservedCount, Limit: int64(h.SandboxesLimit),
			FreeMemoryMB: or(h.FreeMemoryMB, -1), FreeDiskMB: or(h.FreeDiskMB, -1),
		})
	}
	return out
}

func (f *Fleet) capacity(h db.Host) Resources {
	c := Resources{
		VCPUs:    int64(float64(or(h.CPUCores, 0)) * f.policy.CPUOvercommit),
		MemoryMB: max(0, or(h.MemoryMB, 0)-f.policy.MemoryReserveMB),
		DiskMB:   or(h.DiskGB, 0) * 1024,
	}
	if h.CapacityVCPUs != nil {
		c.VCPUs = int64(*h.CapacityVCPUs)
	}
	if h.CapacityMemoryMB != nil {
		c.MemoryMB = *h.CapacityMemoryMB
	}
	if h.CapacityDiskMB != nil {
		c.DiskMB = *h.CapacityDiskMB
	}
	c.DiskMB = int64(float64(c.DiskMB) * f.policy.DiskOvercommit)
	return c
}

// Get gives a sandbox of a team.
func (f *Fleet) Get(ctx context.Context, teamID, id string) (db.GetSandboxRow, error) {
	row, err := f.store.Team(teamID).GetSandbox(ctx, id)
	if store.IsNotFound(err) {
		return row, notFound("sandbox")
	}
	return row, err
}

// Delete ends a sandbox. It tells whether nothing of it is left; if not, its host cannot be reached, the
// sandbox stays `deleting`, and a loop finishes that as soon as the host is back.
func (f *Fleet) Delete(ctx context.Context, by Actor, teamID, id string) (gone bool, err error) {
	return f.delete(ctx, by, teamID, id, nil)
}

// delete is Delete; with kill, only if the intent of that operation still stands.
func (f *Fleet) delete(ctx context.Context, by Actor, teamID, id string, kill *string) (gone bool, err error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx = context.WithoutCancel(ctx)
	var row db.Sandbox
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		row, err = tx.Team(teamID).BeginDelete(ctx, db.BeginDeleteParams{
			ID: id, OperationID: wrenn.NewID(wrenn.PrefixOperation), Lease: f.times.Lease, KillOperationID: kill,
		})
		if err != nil {
			return err
		}
		if err := audit(ctx, tx, by, &teamID, "sandbox.delete", id, nil); err != nil {
			return err
		}
		return event(ctx, tx, "sandbox.deleting", &teamID, id, nil)
	})
	if store.IsNotFound(err) {
		_, err := f.Get(ctx, teamID, id) // if it is there, somebody else is at it
		return false, err
	} else if err != nil {
		return false, err
	}
	err = f.finishDelete(ctx, row, f.times.RetryFor/2)
	if wrenn.KindOf(err) == wrenn.KindHostUnavailable {
		f.log.Warn("delete waits for the host", "sandbox_id", id, "host_id", row.HostID, "error", err)
		return false, f.store.ReleaseWork(ctx, db.ReleaseWorkParams{ID: id, OperationID: row.OperationID, Delay: f.times.ReconcileEvery})
	}
	return err == nil, err
}

// Touch counts as activity of a running sandbox, for its row and for its host.
func (f *Fleet) Touch(ctx context.Context, teamID, id string) error {
	touched, err := f.store.Team(teamID).TouchSandbox(ctx, id)
	if err != nil {
		return err
	}
	row, err := f.Get(ctx, teamID, id)
	if err != nil {
		return err
	}
	if !touched {
		return notRunning(wrenn.SandboxState(row.Sandbox.Status))
	}
	err = f.ask(ctx, row.Sandbox.HostID, 0, func(ctx context.Context, t agents.Target) error {
		_, err := f.agents.Service(t).PingSandbox(ctx, connect.NewRequest(&agentv1.PingSandboxRequest{Id: id}))
		return err
	})
	switch wrenn.KindOf(err) {
	case wrenn.KindHostUnavailable, wrenn.KindNotImplemented: // what does not answer is not paused either; an older agent knows no ping
		return nil
	}
	return err
}

// SetTimeout sets the idle timeout of a sandbox; onTimeout may be nil.
func (f *Fleet) SetTimeout(ctx context.Context, teamID, id string, timeoutSec int32, onTimeout *string) error {
	ok, err := f.store.Team(teamID).SetSandboxTimeout(ctx, db.SetSandboxTimeoutParams{ID: id, TimeoutSec: timeoutSec, OnTimeout: onTimeout})
	if err != nil || ok {
		return err
	}
	if _, err := f.Get(ctx, teamID, id); err != nil {
		return err
	}
	return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is being deleted")
}

func notRunning(s wrenn.SandboxState) error {
	return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not running", s).With("status", string(s))
}

func without(hosts []Candidate, id string) []Candidate {
	out := make([]Candidate, 0, len(hosts))
	for _, h := range hosts {
		if h.ID != id {
			out = append(out, h)
		}
	}
	return out
}

func or[T int32 | int64](p *T, otherwise int64) int64 {
	if p == nil {
		return otherwise
	}
	return int64(*p)
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func nonNil(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}
