package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// An operation is a row in `creating` or `deleting` with an id and a lease. Whoever holds the lease asks
// the agent, which is idempotent by that id, and writes what came of it. A lease that is not renewed means
// that its replica died: the leader takes the row over and asks again.

// finishCreate has the host make the sandbox of a row in `creating` and writes the outcome.
func (f *Fleet) finishCreate(ctx context.Context, row db.Sandbox) error {
	stop := f.keepLease(ctx, row)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, f.times.CreateLimit)
	defer cancel()
	req, err := createRequest(row)
	if err != nil {
		return err
	}
	var made *agentv1.Sandbox
	err = f.askShowing(ctx, slow{row.TeamID, row.HostID, row.ID, "create", row.OperationID}, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).CreateSandbox(ctx, connect.NewRequest(req))
		if err == nil {
			made = res.Msg.GetSandbox()
		}
		return err
	})
	if err != nil {
		return f.failCreate(context.WithoutCancel(ctx), row, err)
	}
	err = f.writeCreated(ctx, row, made)
	f.fault("create", pointWritten)
	return err
}

// writeCreated writes that a host has made the sandbox of a row in `creating`.
func (f *Fleet) writeCreated(ctx context.Context, row db.Sandbox, made *agentv1.Sandbox) error {
	f.stats.Created.Add(1)
	if made.GetCold() {
		f.stats.CreatedCold.Add(1)
	}
	started := made.GetStartedAt().AsTime()
	if made.GetStartedAt() == nil {
		started = time.Now()
	}
	var latest db.Sandbox
	err := f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		_, err := tx.FinishCreate(ctx, db.FinishCreateParams{
			ID: row.ID, OperationID: row.OperationID, Revision: int64(made.GetRevision()), StartedAt: &started, Cold: made.GetCold(),
		})
		if store.IsNotFound(err) { // another replica was quicker, or its owner does not want it any more
			latest, err = tx.SandboxByID(ctx, row.ID)
			return err
		} else if err != nil {
			return err
		}
		return event(ctx, tx, "sandbox.running", &row.TeamID, row.ID, map[string]any{"host_id": row.HostID})
	})
	if err != nil || latest.DeletedAt == nil && latest.Status != string(wrenn.SandboxDeleting) {
		return err
	}
	// The host may have been asked to delete it before it was asked to make it.
	if err := f.remove(context.WithoutCancel(ctx), row, 0); err != nil {
		f.log.Info("a sandbox that was deleted while it was created is removed when its host is compared", "sandbox_id", row.ID, "error", err)
	}
	return deletedMeanwhile()
}

func deletedMeanwhile() error {
	return wrenn.Errorf(wrenn.KindConflict, "the sandbox was deleted while it was being created")
}

// failCreate writes that a create failed and has the host remove what may be left of it.
func (f *Fleet) failCreate(ctx context.Context, row db.Sandbox, cause error) error {
	f.stats.CreateFailures.Add(1)
	pub := wrenn.Public(cause)
	f.log.Warn("create failed", "sandbox_id", row.ID, "host_id", row.HostID, "error", cause)
	var failed bool
	err := f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		_, err := tx.FailCreate(ctx, db.FailCreateParams{ID: row.ID, OperationID: row.OperationID, Reason: &pub.Message, Lease: f.times.Lease})
		if err != nil {
			return ignoreNotFound(err)
		}
		failed = true
		return event(ctx, tx, "sandbox.error", &row.TeamID, row.ID, map[string]any{"reason": pub.Message})
	})
	if err != nil {
		return err
	}
	if failed {
		if err := f.cleanUp(ctx, row, 0); err != nil {
			f.log.Info("clean-up of a failed create waits for the host", "sandbox_id", row.ID, "host_id", row.HostID, "error", err)
		}
	}
	return pub.With("sandbox_id", row.ID)
}

// cleanUp has the host remove what may be left of a failed create.
func (f *Fleet) cleanUp(ctx context.Context, row db.Sandbox, retryFor time.Duration) error {
	if err := f.remove(ctx, row, retryFor); err != nil {
		return err
	}
	return f.store.FinishCleanup(ctx, row.ID)
}

// finishDelete has the host remove the sandbox of a row in `deleting` and ends the row.
func (f *Fleet) finishDelete(ctx context.Context, row db.Sandbox, retryFor time.Duration) error {
	stop := f.keepLease(ctx, row)
	defer stop()
	f.fault("delete", pointBegun)
	if err := f.remove(f.faultWhenSent(ctx, "delete"), row, retryFor); err != nil {
		return err
	}
	f.fault("delete", pointAsked)
	f.stats.Deleted.Add(1)
	err := f.persistTx(ctx, func(ctx context.Context, tx store.Tx) error {
		if _, err := tx.FinishDelete(ctx, row.ID); err != nil {
			return ignoreNotFound(err)
		}
		if err := tx.DropCheckpointsOf(ctx, row.ID); err != nil { // they lay with it
			return err
		}
		return event(ctx, tx, "sandbox.deleted", &row.TeamID, row.ID, nil)
	})
	f.fault("delete", pointWritten)
	return err
}

func (f *Fleet) remove(ctx context.Context, row db.Sandbox, retryFor time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, f.times.DeleteLimit)
	defer cancel()
	return f.ask(ctx, row.HostID, retryFor, func(ctx context.Context, t agents.Target) error {
		_, err := f.agents.Service(t).DeleteSandbox(ctx, connect.NewRequest(&agentv1.DeleteSandboxRequest{Id: row.ID, OperationId: row.OperationID}))
		return err
	})
}

// ask calls an agent. While it cannot be reached (it may be restarting) it is asked again for retryFor:
// all its methods are safe to repeat.
func (f *Fleet) ask(ctx context.Context, hostID string, retryFor time.Duration, call func(context.Context, agents.Target) error) error {
	deadline := time.Now().Add(retryFor)
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		host, err := f.store.GetHost(ctx, db.GetHostParams{ID: hostID})
		if err != nil {
			return err
		}
		if !host.MTLSEnabled || host.Address == nil {
			return wrenn.Errorf(wrenn.KindHostUnavailable, "the sandbox's host has no certificate; delete it and register it again")
		}
		err = rpc.FromConnect(call(ctx, agents.Target{HostID: host.ID, Address: *host.Address, Fingerprint: host.CertFingerprint, Next: host.NextCertFingerprint}))
		if wrenn.KindOf(err) != wrenn.KindHostUnavailable || time.Now().Add(wait).After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// persistTx is persist of a transaction.
func (f *Fleet) persistTx(ctx context.Context, fn func(context.Context, store.Tx) error) error {
	return f.persist(ctx, func(ctx context.Context) error {
		return f.store.Tx(ctx, func(tx store.Tx) error { return fn(ctx, tx) })
	})
}

// persist writes the outcome of something that has happened already, so it does not give up at the first
// failure of the database; if it must, the row's lease runs out and the leader repeats the operation.
func (f *Fleet) persist(ctx context.Context, write func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.times.Lease)
	defer cancel()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := write(ctx)
		if err == nil || !store.IsUnavailable(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// keepLease renews the leases of rows until stop is called.
func (f *Fleet) keepLease(ctx context.Context, rows ...db.Sandbox) (stop func()) {
	return f.keepRenewing(ctx, func(ctx context.Context) (err error) {
		for _, row := range rows {
			_, one := f.store.ExtendWork(ctx, db.ExtendWorkParams{ID: row.ID, OperationID: row.OperationID, Lease: f.times.Lease})
			err = errors.Join(err, one)
		}
		return err
	})
}

// keepRenewing renews leases three times in their life until stop is called.
func (f *Fleet) keepRenewing(ctx context.Context, renew func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(f.times.Lease / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := renew(ctx); err != nil && ctx.Err() == nil {
				f.log.Warn("renew a lease", "error", err)
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func createRequest(row db.Sandbox) (*agentv1.CreateSandboxRequest, error) {
	env := map[string]string{}
	if len(row.CreateEnv) > 0 {
		if err := json.Unmarshal(row.CreateEnv, &env); err != nil {
			return nil, err
		}
	}
	hostname := hostnameOf(row)
	return &agentv1.CreateSandboxRequest{
		Id: row.ID, OperationId: row.OperationID, Template: row.Template, Vcpus: uint32(row.VCPUs),
		MemoryMb: uint64(row.MemoryMB), DiskMb: uint64(row.DiskMB), Env: env, User: row.DefaultUser, Hostname: hostname, Source: sourceOf(row),
	}, nil
}

func hostnameOf(row db.Sandbox) string {
	if row.Name != nil {
		return *row.Name
	}
	return row.ID
}

// sourceOf is the saved moment that a row says the sandbox is made from; nil for a template's image.
func sourceOf(row db.Sandbox) *agentv1.Source {
	switch {
	case row.FromSnapshot != nil:
		return &agentv1.Source{Moment: &agentv1.Source_SnapshotId{SnapshotId: *row.FromSnapshot}, DiskOnly: row.DiskOnly}
	case row.FromCheckpoint != nil:
		return &agentv1.Source{Moment: &agentv1.Source_Checkpoint{Checkpoint: &agentv1.CheckpointRef{SandboxId: deref(row.FromSandbox), CheckpointId: *row.FromCheckpoint}}, DiskOnly: row.DiskOnly}
	}
	return nil
}

func ignoreNotFound(err error) error {
	if store.IsNotFound(err) {
		return nil
	}
	return err
}

// takeOver goes on with one operation whose replica died.
func (f *Fleet) takeOver(ctx context.Context, row db.Sandbox) {
	f.stats.TakenOver.Add(1)
	var err error
	switch {
	case row.Status == string(wrenn.SandboxCreating) && time.Since(row.CreatedAt) > f.times.GiveUpAfter:
		err = f.failCreate(ctx, row, wrenn.Errorf(wrenn.KindHostUnavailable, "the host did not finish the create within %s", f.times.GiveUpAfter))
	case row.Status == string(wrenn.SandboxCreating) && isFork(row):
		err = f.settleFork(ctx, row)
	case row.Status == string(wrenn.SandboxCreating):
		err = f.finishCreate(ctx, row)
	case row.Status == string(wrenn.SandboxPausing), row.Status == string(wrenn.SandboxResuming):
		err = f.settleChange(ctx, row)
	case row.Status == string(wrenn.SandboxDeleting):
		err = f.finishDelete(ctx, row, 0)
	case row.CleanupPending:
		err = f.cleanUp(ctx, row, 0)
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	f.log.Info("an operation taken over did not finish", "sandbox_id", row.ID, "host_id", row.HostID, "status", row.Status, "error", err)
	if err := f.store.ReleaseWork(ctx, db.ReleaseWorkParams{ID: row.ID, OperationID: row.OperationID, Delay: f.times.Lease / 3}); err != nil {
		f.log.Warn("put off an operation", "sandbox_id", row.ID, "error", err)
	}
}
