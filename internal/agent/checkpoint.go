package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Checkpoint saves the moment of a sandbox beside it. Repeating one gives the first one's result.
func (s *Sandboxes) Checkpoint(ctx context.Context, id, opID, checkpointID string) (*agentv1.Checkpoint, error) {
	if !wrenn.ValidID(wrenn.PrefixCheckpoint, checkpointID) {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "%q is not the id of a checkpoint", checkpointID)
	}
	return s.keepMoment(ctx, id, opID, func(sb *sandbox) string {
		return filepath.Join(sb.dir, checkpointsDir, checkpointID)
	}, func(sb *sandbox) error { return sb.update(func(r *record) { r.Parent = checkpointID }) })
}

// SaveSnapshot saves the moment of a sandbox apart from it.
func (s *Sandboxes) SaveSnapshot(ctx context.Context, id, opID, snapshotID string) (*agentv1.Checkpoint, error) {
	if !wrenn.ValidID(wrenn.PrefixSnapshot, snapshotID) {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "%q is not the id of a snapshot", snapshotID)
	}
	return s.keepMoment(ctx, id, opID, func(*sandbox) string { return filepath.Join(s.snapshots, snapshotID) },
		func(*sandbox) error { return nil })
}

func (s *Sandboxes) keepMoment(ctx context.Context, id, opID string, where func(*sandbox) string, then func(*sandbox) error) (*agentv1.Checkpoint, error) {
	sb, err := s.get(id)
	if err != nil {
		return nil, err
	}
	var mo *moment
	err = sb.do(ctx, opID, func(ctx context.Context) error {
		if mo, err = loadMoment(where(sb)); wrenn.KindOf(err) != wrenn.KindNotFound {
			return err // saved already, or not readable
		}
		if mo, err = s.saveMoment(ctx, sb, where(sb)); err != nil {
			return err
		}
		return then(sb)
	})
	if err != nil {
		return nil, err
	}
	if mo == nil { // this call joined another one
		if mo, err = loadMoment(where(sb)); err != nil {
			return nil, err
		}
	}
	return mo.report()
}

// saveMoment writes the present moment of a sandbox to dir, whole or not at all. A running sandbox
// stops for as long as device state and clones take.
func (s *Sandboxes) saveMoment(ctx context.Context, sb *sandbox, dir string) (mo *moment, err error) {
	defer func() { err = diskFull(err) }()
	rec := sb.snapshot()
	if sb.forgotten() || rec.State != wrenn.SandboxRunning && rec.State != wrenn.SandboxPaused {
		return nil, wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", rec.State).
			With("state", string(rec.State))
	}
	if err := s.needSpace(rec.MemoryMB); err != nil {
		return nil, err
	}
	var u undo.Stack
	defer u.Run(&err)
	scratch := dir + unfinished
	if err := s.discard(scratch); err != nil { // of an agent that died
		return nil, err
	}
	if err := os.MkdirAll(scratch, 0o711); err != nil {
		return nil, err
	}
	u.Push(func() error { return s.discard(scratch) })
	mo = &moment{
		ID: filepath.Base(dir), Parent: rec.Parent, CreatedAt: time.Now().UTC(), VCPUs: rec.VCPUs, MemoryMB: rec.MemoryMB,
		DiskMB: rec.DiskMB, TemplateDigest: rec.TemplateDigest, User: rec.User, dir: scratch,
	}
	if rec.State == wrenn.SandboxPaused {
		err = mo.machine().cloneFrom(ctx, s.store, sb.machine())
	} else {
		err = s.cloneRunning(ctx, sb, mo.machine())
	}
	if err != nil {
		return nil, err
	}
	mo.HasMemory = mo.machine().atRest()
	if err := errors.Join(mo.machine().sync(), mo.save()); err != nil {
		return nil, err
	}
	if err := os.Rename(scratch, dir); err != nil {
		return nil, err
	}
	mo.dir = dir
	return mo, syncDir(filepath.Dir(dir))
}

// cloneRunning takes the moment of a running VM into dst. The VM runs again when it returns, whatever
// happened.
func (s *Sandboxes) cloneRunning(ctx context.Context, sb *sandbox, dst machine) (err error) {
	client, token, rec := sb.guestAndRecord()
	src := sb.machine()
	if err := os.Mkdir(dst.dir(), 0o711); err != nil {
		return err
	}
	// What is dirty is written while the VM still runs: a reflink would have to, while it stands still.
	if err := syncDir(src.disk()); err != nil {
		return err
	}
	going := context.WithoutCancel(ctx)
	s.freezeGuest(ctx, sb)
	defer func() { err = errors.Join(err, client.SyncClock(going, token)) }()
	if err := s.driver.Pause(ctx, *rec.VM); err != nil {
		return err
	}
	defer func() { err = errors.Join(s.driver.Resume(going, *rec.VM), err) }()
	if err := s.store.Clone(ctx, src.disk(), dst.disk()); err != nil {
		return err
	}
	return dst.rest(ctx, s.driver, *rec.VM, rec.VCPUs, rec.AccessToken)
}

// freezeGuest stops user processes, so that a clone runs none before it knows who it is. A guest whose
// root user prevents that hurts only itself.
func (s *Sandboxes) freezeGuest(ctx context.Context, sb *sandbox) {
	client, token, _ := sb.guestAndRecord()
	ctx, cancel := context.WithTimeout(ctx, guestFreezeTimeout)
	defer cancel()
	if err := client.Freeze(ctx, token); err != nil {
		s.log.Warn("a guest did not stop its processes", "sandbox", sb.id, "err", err)
	}
}

// Checkpoints lists a sandbox's checkpoints.
func (s *Sandboxes) Checkpoints(id string) ([]*agentv1.Checkpoint, error) {
	sb, err := s.get(id)
	if err != nil {
		return nil, err
	}
	all, err := listMoments(filepath.Join(sb.dir, checkpointsDir))
	if err != nil {
		return nil, err
	}
	out := make([]*agentv1.Checkpoint, 0, len(all))
	for _, mo := range all {
		c, err := mo.report()
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// DeleteCheckpoint removes a checkpoint. What descends from it shares only blocks with it, and keeps them.
func (s *Sandboxes) DeleteCheckpoint(ctx context.Context, id, opID, checkpointID string) error {
	sb, err := s.get(id)
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return nil
	}
	if !wrenn.ValidID(wrenn.PrefixCheckpoint, checkpointID) {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "%q is not the id of a checkpoint", checkpointID)
	}
	return sb.do(ctx, opID, func(context.Context) error {
		if sb.forgotten() {
			return nil
		}
		return s.discard(filepath.Join(sb.dir, checkpointsDir, checkpointID))
	})
}

// DeleteSnapshot removes a snapshot.
func (s *Sandboxes) DeleteSnapshot(snapshotID string) error {
	if !wrenn.ValidID(wrenn.PrefixSnapshot, snapshotID) {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "%q is not the id of a snapshot", snapshotID)
	}
	return s.discard(filepath.Join(s.snapshots, snapshotID))
}

// Rollback takes a sandbox back to one of its checkpoints, in place, and lets it run. The state left
// behind becomes the checkpoint keepAs, unless that is empty.
func (s *Sandboxes) Rollback(ctx context.Context, req *agentv1.RollbackSandboxRequest) (*agentv1.Sandbox, error) {
	sb, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	if !wrenn.ValidID(wrenn.PrefixCheckpoint, req.CheckpointId) || req.KeepAs != "" && !wrenn.ValidID(wrenn.PrefixCheckpoint, req.KeepAs) {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "the checkpoint has no valid id")
	}
	err = sb.do(ctx, req.OperationId, func(ctx context.Context) error {
		rec := sb.snapshot()
		if rec.OperationID == req.OperationId && rec.State == wrenn.SandboxRunning {
			return nil
		}
		mo, err := loadMoment(filepath.Join(sb.dir, checkpointsDir, req.CheckpointId))
		if err != nil {
			return err
		}
		return s.rollback(ctx, sb, mo, req)
	})
	if err != nil {
		return nil, err
	}
	return sb.report(), nil
}

func (s *Sandboxes) rollback(ctx context.Context, sb *sandbox, mo *moment, req *agentv1.RollbackSandboxRequest) (err error) {
	defer func() { err = diskFull(err) }()
	if err := s.needSpace(mo.MemoryMB); err != nil {
		return err
	}
	if req.KeepAs != "" {
		if _, err := s.saveMomentOnce(ctx, sb, filepath.Join(sb.dir, checkpointsDir, req.KeepAs)); err != nil {
			return err
		}
	}
	next := machine(sb.machine().dir() + unfinished)
	if err := s.discard(next.dir()); err != nil {
		return err
	}
	if err := next.cloneFrom(ctx, s.store, mo.machine()); err != nil {
		return errors.Join(err, s.discard(next.dir()))
	}
	if err := next.sync(); err != nil {
		return err
	}
	// From here the sandbox becomes the checkpoint's: what is cut off is finished by finishSwap.
	if err := s.transition(sb, func(r *record) { r.State, r.OperationID, r.Parent = wrenn.SandboxResuming, req.OperationId, mo.ID }); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error {
		return errors.Join(s.finishSwap(sb), s.transition(sb, func(r *record) { r.toPaused(sb.machine(), sb.machine().atRest()) }))
	})
	if err := s.teardown(ctx, sb); err != nil {
		return err
	}
	if err := errors.Join(s.discard(sb.machine().dir()), s.finishSwap(sb)); err != nil {
		return err
	}
	if err := sb.update(func(r *record) { r.VM, r.Slot = nil, -1 }); err != nil {
		return err
	}
	if err := s.launch(ctx, sb, sb.machine(), &u); err != nil {
		return err
	}
	return s.transition(sb, (*record).toRunning)
}

func (s *Sandboxes) saveMomentOnce(ctx context.Context, sb *sandbox, dir string) (*moment, error) {
	mo, err := loadMoment(dir)
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return s.saveMoment(ctx, sb, dir)
	}
	return mo, err
}

// finishSwap puts the machine that a rollback prepared in place of one that is gone, or removes it if
// the old one is still there.
func (s *Sandboxes) finishSwap(sb *sandbox) error {
	next := sb.machine().dir() + unfinished
	switch {
	case !exists(next):
		return nil
	case exists(sb.machine().dir()):
		return s.discard(next)
	}
	if err := os.Rename(next, sb.machine().dir()); err != nil {
		return err
	}
	return syncDir(sb.dir)
}

// maxForks bounds the children of one fork; their starts are further bounded by parallelForks.
const (
	maxForks      = 100
	parallelForks = 4
)

// Fork makes children of a sandbox's present moment. The source goes on; a child that fails leaves the
// others alone.
func (s *Sandboxes) Fork(ctx context.Context, req *agentv1.ForkSandboxRequest) ([]*agentv1.ForkSandboxResponse_Result, error) {
	sb, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	if len(req.Children) < 1 || len(req.Children) > maxForks {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "count must be from 1 to %d", maxForks).With("field", "count")
	}
	id := wrenn.NewID(wrenn.PrefixSnapshot)
	if _, err := s.SaveSnapshot(ctx, req.Id, req.OperationId, id); err != nil {
		return nil, err
	}
	defer func() {
		if err := s.DeleteSnapshot(id); err != nil {
			s.log.Error("the moment of a fork is left", "snapshot", id, "err", err)
		}
	}()
	rec := sb.snapshot()
	results := make([]*agentv1.ForkSandboxResponse_Result, len(req.Children))
	places := make(chan struct{}, parallelForks)
	var all sync.WaitGroup
	for i, child := range req.Children {
		all.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			results[i] = s.forkOne(ctx, rec, child, id)
		})
	}
	all.Wait()
	return results, nil
}

func (s *Sandboxes) forkOne(ctx context.Context, rec record, child *agentv1.ForkSandboxRequest_Child, snapshotID string) *agentv1.ForkSandboxResponse_Result {
	sb, err := s.Create(ctx, &agentv1.CreateSandboxRequest{
		Id: child.Id, OperationId: child.OperationId, Template: rec.Template, Vcpus: uint32(rec.VCPUs), MemoryMb: uint64(rec.MemoryMB),
		DiskMb: uint64(rec.DiskMB), Env: child.Env, User: rec.User, Hostname: child.Hostname,
		Source: &agentv1.Source{Moment: &agentv1.Source_SnapshotId{SnapshotId: snapshotID}},
	})
	if err != nil {
		s.log.Error("a child of a fork failed", "sandbox", child.Id, "err", err)
		pub := wrenn.Public(err)
		return &agentv1.ForkSandboxResponse_Result{ErrorKind: string(pub.Kind), ErrorMessage: pub.Message}
	}
	return &agentv1.ForkSandboxResponse_Result{Sandbox: sb}
}
