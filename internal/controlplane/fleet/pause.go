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

// Pausing and resuming are the host's doing from the first step to the last, journaled there. The row only
// follows: with the answer, or with the host's next report if nobody is left to hear the answer. So no
// row waits for an operation that nobody performs.

// Pause pauses a running sandbox, with or without its memory. One that fails leaves it running.
func (f *Fleet) Pause(ctx context.Context, by Actor, teamID, id string, memory bool) error {
	return f.change(ctx, by, teamID, id, "sandbox.pause", wrenn.SandboxRunning, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).PauseSandbox(ctx, connect.NewRequest(&agentv1.PauseSandboxRequest{Id: id, OperationId: op, DiskOnly: !memory}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
}

// Resume lets a paused sandbox run again. One that fails leaves it paused.
func (f *Fleet) Resume(ctx context.Context, by Actor, teamID, id string) error {
	return f.change(ctx, by, teamID, id, "sandbox.resume", wrenn.SandboxPaused, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).ResumeSandbox(ctx, connect.NewRequest(&agentv1.ResumeSandboxRequest{Id: id, OperationId: op}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
}

// change has a sandbox's host do one thing to it and writes what the host says came of it.
func (f *Fleet) change(ctx context.Context, by Actor, teamID, id, action string, from wrenn.SandboxState, do func(context.Context, agents.Target, string) (*agentv1.Sandbox, error)) error {
	f.work.Add(1)
	defer f.work.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.CreateLimit)
	defer cancel()
	row, err := f.Get(ctx, teamID, id)
	if err != nil {
		return err
	}
	if row.Sandbox.Status != string(from) {
		return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not %s", row.Sandbox.Status, from).With("status", row.Sandbox.Status)
	}
	op := wrenn.NewID(wrenn.PrefixOperation)
	var now *agentv1.Sandbox
	err = f.ask(ctx, row.Sandbox.HostID, f.times.RetryFor, func(ctx context.Context, t agents.Target) error {
		now, err = do(ctx, t, op)
		return err
	})
	if err != nil {
		return err
	}
	o := observe(now)
	if o.LastActiveAt.IsZero() || o.State == wrenn.SandboxRunning {
		o.LastActiveAt = time.Now() // a resume is an activity
	}
	return f.persist(ctx, func(ctx context.Context, tx store.Tx) error {
		if err := audit(ctx, tx, by, &teamID, action, id, nil); err != nil {
			return err
		}
		// The host's report of a step in between may have been written meanwhile; only the revision decides.
		latest, err := tx.SandboxByID(ctx, id)
		if err != nil {
			return ignoreNotFound(err)
		}
		_, err = tx.ApplyReport(ctx, db.ApplyReportParams{
			ID: id, HostID: row.Sandbox.HostID, FormerStatus: latest.Status, Status: string(o.State), Revision: int64(o.Revision), LastActiveAt: &o.LastActiveAt,
		})
		if err != nil {
			return ignoreNotFound(err) // the host's report of this very state was quicker
		}
		return event(ctx, tx, "sandbox."+string(o.State), &teamID, id, nil)
	})
}
