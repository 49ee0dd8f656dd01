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

// expireOne pauses an idle sandbox, and deletes it then if that is what its owner chose: only a host that
// agreed to pause it can tell that it was idle.
func (f *Fleet) expireOne(ctx context.Context, row db.Sandbox) error {
	kill := row.OnTimeout == string(wrenn.OnTimeoutKill)
	err := f.change(ctx, systemActor(), row.TeamID, row.ID, "sandbox.pause", wrenn.SandboxRunning, func(ctx context.Context, t agents.Target, op string) (*agentv1.Sandbox, error) {
		res, err := f.agents.Service(t).PauseSandbox(ctx, connect.NewRequest(&agentv1.PauseSandboxRequest{
			Id: row.ID, OperationId: op, DiskOnly: kill, IdleSec: uint32(row.TimeoutSec),
		}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetSandbox(), nil
	})
	if wrenn.KindOf(err) == wrenn.KindConflict { // it is in use
		return f.store.ApplyActivity(ctx, db.ApplyActivityParams{ID: row.ID, HostID: row.HostID, LastActiveAt: time.Now()})
	}
	if err != nil || !kill {
		return err
	}
	_, err = f.Delete(ctx, systemActor(), row.TeamID, row.ID)
	return err
}
