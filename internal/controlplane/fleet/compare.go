package fleet

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	workBatch    = 32
	compareBatch = 64
	compareLimit = 20 * time.Second
	compareAtOne = 8 // hosts at once
	hostBackoff  = 15 * time.Second
)

// missingReason is shown while a host does not report a sandbox that it should have.
const missingReason = "its host does not report this sandbox; the state shown is the last that was known"

// reconcile takes over operations whose replica died and compares rows with hosts; one replica runs it.
func (f *Fleet) reconcile(ctx context.Context) {
	notBefore := map[string]time.Time{} // hosts that did not answer
	every(ctx, f.times.ReconcileEvery, func(ctx context.Context) {
		if err := f.takeOverAll(ctx); err != nil && ctx.Err() == nil {
			f.log.Warn("take operations over", "error", err)
		}
		if err := f.compareAll(ctx, notBefore); err != nil && ctx.Err() == nil {
			f.log.Warn("compare hosts", "error", err)
		}
	})
}

func (f *Fleet) takeOverAll(ctx context.Context) error {
	rows, err := f.store.TakeWork(ctx, db.TakeWorkParams{Lease: f.times.Lease, MaxRows: workBatch})
	if err != nil {
		return err
	}
	for _, row := range rows {
		f.work.Go(func() { f.takeOver(ctx, row) })
	}
	return nil
}

func (f *Fleet) compareAll(ctx context.Context, notBefore map[string]time.Time) error {
	hosts, err := f.store.HostsToReconcile(ctx, db.HostsToReconcileParams{MaxAge: f.times.ReconcileAge, MaxRows: compareBatch})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	slots := make(chan struct{}, compareAtOne)
	for _, h := range hosts {
		mu.Lock()
		wait := time.Now().Before(notBefore[h.ID])
		mu.Unlock()
		if wait {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := f.compare(ctx, h)
			mu.Lock()
			defer mu.Unlock()
			delete(notBefore, h.ID)
			if err != nil && ctx.Err() == nil {
				notBefore[h.ID] = time.Now().Add(hostBackoff)
				f.log.Warn("a host could not be compared with its rows", "host_id", h.ID, "error", err)
			}
		})
	}
	wg.Wait()
	return nil
}

// compare asks one host what it has and does what Reconcile says about it. Rows are read before and
// after the host is asked: what a sandbox's absence means depends on the first, what its presence means on the second.
func (f *Fleet) compare(ctx context.Context, h db.HostsToReconcileRow) error {
	ctx, cancel := context.WithTimeout(ctx, compareLimit)
	defer cancel()
	before, err := f.store.SandboxesOfHost(ctx, db.SandboxesOfHostParams{HostID: h.ID, Reported: []string{}})
	if err != nil {
		return err
	}
	target := agents.Target{HostID: h.ID, Address: deref(h.Address), Fingerprint: h.CertFingerprint, Next: h.NextCertFingerprint}
	res, err := f.agents.Service(target).ListSandboxes(ctx, connect.NewRequest(&agentv1.ListSandboxesRequest{}))
	if err != nil {
		return rpc.FromConnect(err)
	}
	observed := make([]Observed, 0, len(res.Msg.GetSandboxes()))
	ids := make([]string, 0, len(res.Msg.GetSandboxes()))
	for _, s := range res.Msg.GetSandboxes() {
		observed = append(observed, observe(s))
		ids = append(ids, s.GetId())
	}
	after, err := f.store.SandboxesOfHost(ctx, db.SandboxesOfHostParams{HostID: h.ID, Reported: ids})
	if err != nil {
		return err
	}
	for _, a := range Reconcile(h.ID, desire(before, after), observed) {
		if err := f.act(ctx, h.ID, target, a); err != nil {
			return err
		}
	}
	return f.store.MarkReconciled(ctx, db.MarkReconciledParams{
		ID: h.ID, Revision: int64(res.Msg.GetStateRevision()), SeenRevision: h.StateRevision,
	})
}

func (f *Fleet) act(ctx context.Context, hostID string, target agents.Target, a Action) error {
	switch a.Kind {
	case ActionApply:
		return f.applyReport(ctx, hostID, a)
	case ActionTouch:
		return f.store.ApplyActivity(ctx, db.ApplyActivityParams{
			ID: a.ID, HostID: hostID, LastActiveAt: a.Observed.LastActiveAt, Revision: int64(a.Observed.Revision), DurableAt: a.Observed.DurableAt,
		})
	case ActionMissing:
		reason := missingReason
		n, err := f.store.MarkMissing(ctx, db.MarkMissingParams{ID: a.ID, HostID: hostID, FormerStatus: string(a.From), Revision: int64(a.Revision), Reason: &reason})
		if n > 0 {
			f.log.Error("a host does not report a sandbox that it should have", "sandbox_id", a.ID, "host_id", hostID)
		}
		return err
	case ActionRemove:
		f.log.Info("a host still has a sandbox that is deleted; removing it", "sandbox_id", a.ID, "host_id", hostID)
		_, err := f.agents.Service(target).DeleteSandbox(ctx, connect.NewRequest(&agentv1.DeleteSandboxRequest{Id: a.ID, OperationId: wrenn.NewID(wrenn.PrefixOperation)}))
		return rpc.FromConnect(err)
	case ActionUnknown:
		f.stats.Unknown.Add(1)
		f.log.Warn("a host reports a sandbox that is not in the database; it is left alone", "sandbox_id", a.ID, "host_id", hostID)
	}
	return nil
}

func (f *Fleet) applyReport(ctx context.Context, hostID string, a Action) error {
	return f.store.Tx(ctx, func(tx store.Tx) error {
		var reason *string
		if a.Observed.Reason != "" {
			reason = &a.Observed.Reason
		}
		row, err := tx.ApplyReport(ctx, db.ApplyReportParams{
			ID: a.ID, HostID: hostID, FormerStatus: string(a.From), Status: string(a.Observed.State), Reason: reason,
			Revision: int64(a.Revision), LastActiveAt: &a.Observed.LastActiveAt, DurableAt: a.Observed.DurableAt, Needs: a.Observed.Needs,
		})
		if err != nil {
			return ignoreNotFound(err) // something newer was written meanwhile
		}
		if a.From == a.Observed.State {
			return nil
		}
		return event(ctx, tx, "sandbox."+row.Status, &row.TeamID, row.ID, map[string]any{"reason": a.Observed.Reason})
	})
}

var protoStates = map[agentv1.SandboxState]wrenn.SandboxState{
	agentv1.SandboxState_SANDBOX_STATE_CREATING: wrenn.SandboxCreating,
	agentv1.SandboxState_SANDBOX_STATE_RUNNING:  wrenn.SandboxRunning,
	agentv1.SandboxState_SANDBOX_STATE_PAUSING:  wrenn.SandboxPausing,
	agentv1.SandboxState_SANDBOX_STATE_PAUSED:   wrenn.SandboxPaused,
	agentv1.SandboxState_SANDBOX_STATE_RESUMING: wrenn.SandboxResuming,
	agentv1.SandboxState_SANDBOX_STATE_DELETING: wrenn.SandboxDeleting,
}

func observe(s *agentv1.Sandbox) Observed {
	o := Observed{ID: s.GetId(), State: protoStates[s.GetState()], Revision: s.GetRevision(), Reason: s.GetReason()}
	if s.GetLastActiveAt() != nil {
		o.LastActiveAt = s.GetLastActiveAt().AsTime()
	}
	if s.GetDurableAt() != nil {
		at := s.GetDurableAt().AsTime()
		o.DurableAt = &at
	}
	o.Needs = needsOf(s.GetNeeds())
	return o
}

func desire(before, after []db.Sandbox) []Desired {
	was := make(map[string]string, len(before))
	for _, s := range before {
		was[s.ID] = s.Status
	}
	out := make([]Desired, 0, len(after))
	for _, s := range after {
		out = append(out, Desired{
			ID: s.ID, HostID: s.HostID, Status: wrenn.SandboxState(s.Status), Revision: uint64(s.Revision),
			Deleted: s.DeletedAt != nil, Missing: s.MissingSince != nil, Settled: was[s.ID] == s.Status,
		})
	}
	return out
}
