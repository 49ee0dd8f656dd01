package fleet

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	expireEvery = time.Second
	expireBatch = 64
	expireAtOne = 8 // sandboxes at once

	expireBackoff = 30 * time.Second
)

// expire does to idle sandboxes what their owners chose; one replica runs it. The row only says who may
// be idle: the host refuses a pause while something is active, which the row then learns.
func (f *Fleet) expire(ctx context.Context) {
	var mu sync.Mutex
	notBefore := map[string]time.Time{} // sandboxes whose last attempt failed, such as for a full disk
	every(ctx, expireEvery, func(ctx context.Context) {
		maps.DeleteFunc(notBefore, func(_ string, t time.Time) bool { return time.Now().After(t) })
		rows, err := f.store.ExpiredSandboxes(ctx, db.ExpiredSandboxesParams{NotNow: slices.AppendSeq([]string{}, maps.Keys(notBefore)), MaxRows: expireBatch})
		if err != nil {
			if ctx.Err() == nil {
				f.log.Warn("look for idle sandboxes", "error", err)
			}
			return
		}
		var all sync.WaitGroup
		places := make(chan struct{}, expireAtOne)
		for _, row := range rows {
			places <- struct{}{}
			all.Go(func() {
				defer func() { <-places }()
				if err := f.expireOne(ctx, row); err != nil && ctx.Err() == nil {
					f.log.Warn("an idle sandbox is left as it is for now", "sandbox_id", row.ID, "error", err)
					mu.Lock()
					defer mu.Unlock()
					notBefore[row.ID] = time.Now().Add(expireBackoff)
				}
			})
		}
		all.Wait()
	})
}

// expireOne does to one idle sandbox what its owner chose.
func (f *Fleet) expireOne(ctx context.Context, row db.Sandbox) error {
	if row.OnTimeout == string(wrenn.OnTimeoutKill) {
		return f.kill(ctx, row)
	}
	_, err := f.Pause(ctx, systemActor(), row.TeamID, row.ID, PauseOptions{Memory: true, IdleSec: uint32(row.TimeoutSec)})
	if wrenn.KindOf(err) == wrenn.KindConflict { // it is in use
		return f.store.ApplyActivity(ctx, db.ApplyActivityParams{ID: row.ID, HostID: row.HostID, LastActiveAt: time.Now()})
	}
	return err
}

// kill ends an idle sandbox. Only a host that agreed to pause it can tell that it was idle, so it is paused
// first and then deleted. The intent stands in the row before the first step, and the host knows the pause
// by its operation id: after a crash anywhere the same steps are done again, and a sandbox that somebody
// else paused, or that is used again, is not touched.
func (f *Fleet) kill(ctx context.Context, row db.Sandbox) error {
	row, err := f.store.IntendKill(ctx, db.IntendKillParams{ID: row.ID, OperationID: wrenn.NewID(wrenn.PrefixOperation)})
	if err != nil {
		return ignoreNotFound(err) // it was used, or is to be paused now
	}
	f.work.Add(1)
	defer f.work.Done()
	op := *row.KillOperationID
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.CreateLimit)
	defer cancel()
	err = f.ask(limited, row.HostID, f.times.RetryFor, func(ctx context.Context, t agents.Target) error {
		_, err := f.agents.Service(t).PauseSandbox(ctx, connect.NewRequest(&agentv1.PauseSandboxRequest{
			Id: row.ID, OperationId: op, DiskOnly: true, IdleSec: uint32(row.TimeoutSec),
		}))
		return err
	})
	switch wrenn.KindOf(err) {
	case "":
		_, err = f.delete(ctx, systemActor(), row.TeamID, row.ID, &op)
		return err
	case wrenn.KindConflict: // it is in use
		if err := f.store.ApplyActivity(ctx, db.ApplyActivityParams{ID: row.ID, HostID: row.HostID, LastActiveAt: time.Now()}); err != nil {
			return err
		}
	case wrenn.KindInvalidState: // somebody else paused it
	default:
		return err // the intent stands
	}
	return f.store.DropKill(ctx, db.DropKillParams{ID: row.ID, OperationID: op})
}
