package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// A pause, a resume and a rollback take the row first: to `pausing` or `resuming`, with an operation id and
// a lease, so that of any number of callers one does it and requests into the sandbox know to wait. What
// comes of it the host alone knows, so whoever ends the operation, also a replica that took it over, writes
// what the host says.

// PauseOptions say what a pause keeps and when it answers.
type PauseOptions struct {
	Memory  bool
	Durable bool   // only when the state survives a power cut
	IdleSec uint32 // if not 0: only if it was idle for so long, else KindConflict

	OperationID string // of a request that may be repeated; "" makes one
}

// Pause pauses a running sandbox. One that fails leaves it running.
func (f *Fleet) Pause(ctx context.Context, by Actor, teamID, id string, o PauseOptions) (db.GetSandboxRow, error) {
	c := change{by: by, teamID: teamID, id: id, op: o.OperationID, action: "sandbox.pause", from: wrenn.SandboxRunning, via: wrenn.SandboxPausing}
	return f.change(ctx, c, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).PauseSandbox(ctx, connect.NewRequest(&agentv1.PauseSandboxRequest{
			Id: id, OperationId: op, DiskOnly: !o.Memory, IdleSec: o.IdleSec, Durable: o.Durable,
		}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
}

// ResumeOptions say what a resume goes on with.
type ResumeOptions struct {
	DiskOnly bool // give saved memory up and boot

	OperationID string // of a request that may be repeated; "" makes one
}

// Resume lets a paused sandbox run again. One that fails leaves it paused.
func (f *Fleet) Resume(ctx context.Context, by Actor, teamID, id string, o ResumeOptions) (db.GetSandboxRow, error) {
	c := change{
		by: by, teamID: teamID, id: id, op: o.OperationID, action: "sandbox.resume", from: wrenn.SandboxPaused, via: wrenn.SandboxResuming,
		replaces: o.DiskOnly, // by nothing, which has no needs
	}
	return f.change(ctx, c, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).ResumeSandbox(ctx, connect.NewRequest(&agentv1.ResumeSandboxRequest{Id: id, OperationId: op, DiskOnly: o.DiskOnly}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
}

// change is what is to become of a sandbox.
type change struct {
	by         Actor
	teamID, id string
	op         string
	action     string // in the audit log
	from, via  wrenn.SandboxState

	replaces bool                                  // the saved state by another, which has these needs
	needs    json.RawMessage                       // then
	also     func(context.Context, store.Tx) error // in the transaction that takes the row; may be nil
}

type ask = func(context.Context, agents.Target, string) (*agentv1.Sandbox, error)

// change has a sandbox's host do one thing to it, writes what the host says came of it, and returns that.
func (f *Fleet) change(ctx context.Context, c change, do ask) (now db.GetSandboxRow, err error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.CreateLimit)
	defer cancel()
	c.op = cmp.Or(c.op, wrenn.NewID(wrenn.PrefixOperation))
	row, err := f.beginChange(ctx, c)
	if err != nil {
		return now, err
	}
	if row.ID == "" {
		return f.Get(ctx, c.teamID, c.id)
	}
	stop := f.keepLease(ctx, row)
	var told *agentv1.Sandbox
	o := slow{row.TeamID, row.HostID, row.ID, strings.TrimPrefix(c.action, "sandbox."), row.OperationID}
	err = f.askShowing(ctx, o, func(ctx context.Context, t agents.Target) error {
		told, err = do(ctx, t, row.OperationID)
		return err
	})
	if err == nil {
		now, err = f.writeChange(ctx, row, told)
		f.fault(o.name, pointWritten)
		stop()
		if store.IsNotFound(err) {
			return f.Get(ctx, row.TeamID, row.ID)
		}
		return now, err
	}
	stop()
	f.log.Info("a change of a sandbox failed", "sandbox_id", row.ID, "action", c.action, "error", err)
	settling, done := context.WithTimeout(context.WithoutCancel(ctx), f.times.Lease)
	defer done()
	if settled := f.settleChange(settling, row); settled != nil {
		f.log.Info("what became of it is found out later", "sandbox_id", row.ID, "error", settled)
		if err := f.store.ReleaseWork(settling, db.ReleaseWorkParams{ID: row.ID, OperationID: row.OperationID, Delay: f.times.ReconcileEvery}); err != nil {
			f.log.Warn("put off an operation", "sandbox_id", row.ID, "error", err)
		}
	}
	return now, err
}

// beginChange takes the row, and what a resume needs of the host, in one transaction. It gives no row if the
// operation was done by an attempt before; one that was cut off is taken up again.
func (f *Fleet) beginChange(ctx context.Context, c change) (row db.Sandbox, err error) {
	if c.from == wrenn.SandboxRunning && c.also == nil { // it runs, as far as is known: nothing else has to be decided
		if row, err = c.begin(ctx, f.store.Team(c.teamID), f.times.Lease); !store.IsNotFound(err) {
			return row, err
		}
	}
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		now, err := tx.Team(c.teamID).GetSandbox(ctx, c.id)
		if store.IsNotFound(err) {
			return notFound("sandbox")
		}
		if err != nil {
			return err
		}
		if now.Sandbox.OperationID == c.op {
			if now.Sandbox.Status != string(c.via) {
				return nil
			}
			c.from, c.also = c.via, nil
		}
		if now.Sandbox.Status != string(c.from) {
			return wrongState(now.Sandbox, c.from)
		}
		if !now.HostOnline {
			return hostAway(now.Sandbox.HostID)
		}
		if c.replaces {
			now.Sandbox.Needs = c.needs
		}
		if c.from == wrenn.SandboxPaused && c.via == wrenn.SandboxResuming {
			if err := f.reserveAgain(ctx, tx, now.Sandbox); err != nil {
				return err
			}
		}
		row, err = c.begin(ctx, tx.Team(c.teamID), f.times.Lease)
		if store.IsNotFound(err) { // somebody was quicker
			return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is changing; try again").With("status", string(c.via))
		}
		if err != nil || c.also == nil {
			return err
		}
		return c.also(ctx, tx)
	})
	return row, err
}

func (c change) begin(ctx context.Context, team store.Team, lease time.Duration) (db.Sandbox, error) {
	return team.BeginChange(ctx, db.BeginChangeParams{
		ID: c.id, Status: string(c.via), FormerStatus: string(c.from), OperationID: c.op, Lease: lease,
		ActorType: c.by.Type, ActorID: c.by.ID, RequestID: c.by.RequestID, Action: c.action,
	})
}

// reserveAgain checks that a paused sandbox's host has room for it to run: paused it takes disk only. The
// host's row is locked from here to the end of the transaction.
func (f *Fleet) reserveAgain(ctx context.Context, tx store.Tx, row db.Sandbox) error {
	if _, err := lockHost(ctx, tx, nil, row.HostID); err != nil {
		return err
	}
	needs, err := readNeeds(row.Needs)
	if err != nil {
		return err
	}
	req := Request{Resources: Resources{VCPUs: int64(row.VCPUs), MemoryMB: int64(row.MemoryMB)}, Template: row.Template, Needs: needs, Resume: true}
	hosts, err := f.placementHosts(ctx, tx.Team(row.TeamID), &row.HostID, req)
	if err != nil {
		return err
	}
	if len(hosts) == 0 {
		return hostAway(row.HostID)
	}
	if _, refusal := Place(req, hosts); refusal != nil {
		f.stats.PlacementFailures.Add(1)
		return refusal
	}
	return nil
}

// writeChange writes what the host says of a sandbox whose row waits for it, and returns what then is known. IsNotFound
// says that it does not wait any more: the host's own report was quicker, or it is being deleted.
func (f *Fleet) writeChange(ctx context.Context, row db.Sandbox, told *agentv1.Sandbox) (now db.GetSandboxRow, err error) {
	o := observe(told)
	if o.State == wrenn.SandboxRunning || o.LastActiveAt.IsZero() {
		o.LastActiveAt = time.Now() // a resume is an activity
	}
	err = f.persist(ctx, func(ctx context.Context) error {
		settled, err := f.store.SettleChange(ctx, db.SettleChangeParams{
			ID: row.ID, OperationID: row.OperationID, Status: string(o.State), Reason: ptrOrNil(o.Reason), Revision: int64(o.Revision),
			LastActiveAt: &o.LastActiveAt, DurableAt: o.DurableAt, Needs: o.Needs,
		})
		now = db.GetSandboxRow{Sandbox: db.Sandbox(settled), HostOnline: true} // it has just answered
		return err
	})
	return now, err
}

// settleChange finds out what became of a change whose answer was not heard.
func (f *Fleet) settleChange(ctx context.Context, row db.Sandbox) error {
	now, err := f.askSandbox(ctx, row, 0)
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		now, err = lostSandbox(row), nil
	}
	if err != nil {
		return err
	}
	if s := protoStates[now.GetState()]; s != wrenn.SandboxRunning && s != wrenn.SandboxPaused {
		return wrenn.Errorf(wrenn.KindConflict, "the host is still at it")
	}
	_, err = f.writeChange(ctx, row, now)
	return ignoreNotFound(err)
}

// askSandbox asks a row's host for the sandbox.
func (f *Fleet) askSandbox(ctx context.Context, row db.Sandbox, retryFor time.Duration) (now *agentv1.Sandbox, err error) {
	err = f.ask(ctx, row.HostID, retryFor, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).GetSandbox(ctx, connect.NewRequest(&agentv1.GetSandboxRequest{Id: row.ID}))
		if err == nil {
			now = res.Msg.GetSandbox()
		}
		return err
	})
	return now, err
}

// lostSandbox is what is written of a sandbox that its host does not have: what it was before. The host's
// next comparison says that it is missing.
func lostSandbox(row db.Sandbox) *agentv1.Sandbox {
	state := agentv1.SandboxState_SANDBOX_STATE_PAUSED
	if row.Status == string(wrenn.SandboxPausing) {
		state = agentv1.SandboxState_SANDBOX_STATE_RUNNING
	}
	return &agentv1.Sandbox{Id: row.ID, State: state, Revision: uint64(row.Revision)}
}

const wakeEvery = 50 * time.Millisecond

// Wake brings a sandbox to run for a request into it, and waits for a change that is under way. However many
// ask, on however many replicas, it is resumed once. One that is paused without auto_resume stays so.
func (f *Fleet) Wake(ctx context.Context, by Actor, teamID, id string) error {
	mine := &wake{done: make(chan struct{})}
	if other, found := f.wakes.LoadOrStore(id, mine); found {
		w := other.(*wake)
		select {
		case <-w.done:
			return w.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.work.Add(1)
	defer f.work.Done()
	mine.err = f.wake(context.WithoutCancel(ctx), by, teamID, id)
	f.wakes.Delete(id)
	close(mine.done)
	return mine.err
}

// wake is one waking of a sandbox, which others may wait for.
type wake struct {
	done chan struct{}
	err  error
}

func (f *Fleet) wake(ctx context.Context, by Actor, teamID, id string) error {
	ctx, cancel := context.WithTimeout(ctx, f.times.CreateLimit)
	defer cancel()
	for {
		row, err := f.Get(ctx, teamID, id)
		if err != nil {
			return err
		}
		switch state := wrenn.SandboxState(row.Sandbox.Status); {
		case state == wrenn.SandboxPaused && row.Sandbox.AutoResume:
			if _, err = f.Resume(ctx, by, teamID, id, ResumeOptions{}); wrenn.KindOf(err) != wrenn.KindInvalidState {
				return err
			}
			if now, again := f.Get(ctx, teamID, id); again == nil && now.Sandbox.Status == string(wrenn.SandboxPaused) {
				return err // not because somebody else was quicker
			}
		case state != wrenn.SandboxPausing && state != wrenn.SandboxResuming:
			return nil
		}
		select {
		case <-ctx.Done():
			return wrenn.Errorf(wrenn.KindUnavailable, "the sandbox is still changing its state; try again")
		case <-time.After(wakeEvery):
		}
	}
}

func wrongState(row db.Sandbox, want wrenn.SandboxState) error {
	return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not %s", row.Status, want).With("status", row.Status)
}

func hostAway(hostID string) error {
	return wrenn.Errorf(wrenn.KindHostUnavailable, "the sandbox's host cannot be reached now; the sandbox itself is not lost; try again").With("host_id", hostID)
}

func ptrOrNil(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}
