package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
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
	}, func(sb *sandbox) error { return sb.update(forGood, func(r *record) { r.Parent = checkpointID }) })
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
	defer s.saving.begin(sb.id, where(sb))()
	err = sb.do(ctx, opID, func(ctx context.Context) error {
		defer s.saving.begin(sb.id, where(sb))() // also when nobody waits any more
		if mo, err = loadMoment(where(sb)); wrenn.KindOf(err) != wrenn.KindNotFound {
			return err // saved already, or not readable
		}
		if mo, err = s.saveMoment(ctx, sb, where(sb), true); err != nil {
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

// saves are the moments that are being saved, or are about to be.
type saves struct {
	mu    sync.Mutex
	count map[saveOf]int
}

type saveOf struct{ sandboxID, dir string }

// begin notes one; end notes its end.
func (s *saves) begin(sandboxID, dir string) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count = map[saveOf]int{}
	}
	of := saveOf{sandboxID, dir}
	s.count[of]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.count[of]--; s.count[of] == 0 {
			delete(s.count, of)
		}
	}
}

func (s *saves) list() []*agentv1.ListMomentsResponse_Moment {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*agentv1.ListMomentsResponse_Moment, 0, len(s.count))
	for of := range s.count {
		m := &agentv1.ListMomentsResponse_Moment{Checkpoint: &agentv1.Checkpoint{Id: filepath.Base(of.dir)}, Saving: true}
		if filepath.Base(filepath.Dir(of.dir)) == checkpointsDir {
			m.SandboxId = of.sandboxID
		}
		out = append(out, m)
	}
	return out
}

// saveMoment writes the present moment of a sandbox to dir, whole or not at all, and so that it survives a
// power cut if it is to be durable. A running sandbox stops for as long as device state and clones take.
func (s *Sandboxes) saveMoment(ctx context.Context, sb *sandbox, dir string, durable bool) (mo *moment, err error) {
	defer func() { err = diskFull(err) }()
	defer s.warm.begin(lull)()
	if err := s.settleOperation(ctx, sb); err != nil {
		return nil, err
	}
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
	if err := s.fault(sb, "moment.begun"); err != nil {
		return nil, err
	}
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
	if err := s.fault(sb, "moment.cloned"); err != nil {
		return nil, err
	}
	mo.HasMemory = mo.machine().atRest()
	if durable {
		step(ctx, stepDurable)
		if err := mo.machine().sync(); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(mo.save(), s.fault(sb, "moment.saved")); err != nil {
		return nil, err
	}
	if err := os.Rename(scratch, dir); err != nil {
		return nil, err
	}
	mo.dir = dir
	return mo, errors.Join(storage.Sync(filepath.Dir(dir)), s.fault(sb, "moment.named"))
}

// cloneRunning takes the moment of a running VM into dst. The VM runs again when it returns, whatever
// happened.
func (s *Sandboxes) cloneRunning(ctx context.Context, sb *sandbox, dst machine) (err error) {
	client, token, rec := sb.guestAndRecord()
	src := sb.machine()
	if err := os.Mkdir(dst.dir(), 0o711); err != nil {
		return err
	}
	step(ctx, stepDisk)
	// What is dirty is written while the VM still runs: a reflink would have to, while it stands still.
	if err := storage.Sync(src.disk()); err != nil {
		return err
	}
	going := context.WithoutCancel(ctx)
	s.freezeGuest(ctx, sb)
	defer func() { err = errors.Join(err, client.SyncClock(going, token)) }()
	if err := s.driver.Pause(ctx, *rec.VM); err != nil {
		return err
	}
	defer func() { err = errors.Join(s.driver.Resume(going, *rec.VM), err) }()
	if err := s.fault(sb, "moment.frozen"); err != nil {
		return err
	}
	if err := s.store.Clone(ctx, src.disk(), dst.disk()); err != nil {
		return err
	}
	return dst.rest(ctx, s.driver, *rec.VM, rec.VCPUs, rec.AccessToken)
}

// freezeGuest stops user processes, so that a clone runs none before it knows who it is. A guest whose
// root user prevents that hurts only itself.
func (s *Sandboxes) freezeGuest(ctx context.Context, sb *sandbox) {
	step(ctx, stepStopping)
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
