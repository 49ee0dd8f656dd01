package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// before is what a rollback goes back to if it fails or is cut off. Until its new VM runs, the old one is
// only frozen, and its files lie beside the new ones.
type before struct {
	VM     *vm.Handle `json:"vm,omitempty"` // with the paths that it has after the swap; nil if it was paused
	Slot   int        `json:"slot"`
	Token  string     `json:"token"` // that its guest knows
	Parent string     `json:"parent,omitempty"`
}

// old is the machine that a rollback leaves, until the new one runs; next the new one, until the swap.
func (sb *sandbox) old() machine  { return machine(sb.machine().dir() + ".old") }
func (sb *sandbox) next() machine { return machine(sb.machine().dir() + unfinished) }

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
	keepAs := filepath.Join(sb.dir, checkpointsDir, req.KeepAs)
	noteSave := func() func() {
		if req.KeepAs == "" {
			return func() {}
		}
		return s.saving.begin(sb.id, keepAs)
	}
	defer noteSave()()
	err = sb.do(ctx, req.OperationId, func(ctx context.Context) error {
		defer noteSave()()
		if err := s.settleOperation(ctx, sb); err != nil {
			return err
		}
		rec := sb.snapshot()
		if rec.OperationID == req.OperationId && rec.State == wrenn.SandboxRunning {
			return nil
		}
		mo, err := loadMoment(filepath.Join(sb.dir, checkpointsDir, req.CheckpointId))
		if err != nil {
			return err
		}
		defer s.warm.begin(lull)()
		return s.rollback(ctx, sb, mo, req)
	})
	if err != nil {
		return nil, err
	}
	return sb.report(), nil
}

func (s *Sandboxes) rollback(ctx context.Context, sb *sandbox, mo *moment, req *agentv1.RollbackSandboxRequest) (err error) {
	defer func() { err = diskFull(err) }()
	rec := sb.snapshot()
	if rec.State != wrenn.SandboxRunning && rec.State != wrenn.SandboxPaused {
		return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", rec.State).
			With("state", string(rec.State))
	}
	if err := s.needSpace(mo.MemoryMB); err != nil {
		return err
	}
	if req.KeepAs != "" {
		if _, err := s.saveMomentOnce(ctx, sb, filepath.Join(sb.dir, checkpointsDir, req.KeepAs)); err != nil {
			return err
		}
	}
	if err := s.prepareNext(ctx, sb, mo); err != nil {
		return errors.Join(err, s.discard(sb.next().dir()))
	}
	b := &before{VM: rec.VM, Slot: rec.Slot, Token: rec.AccessToken, Parent: rec.Parent}
	if rec.VM != nil {
		moved := rec.VM.Moved(sb.machine().dir(), sb.old().dir())
		b.VM = &moved
	}
	if err := s.transition(sb, forGood, func(r *record) { r.State, r.OperationID, r.Before = wrenn.SandboxResuming, req.OperationId, b }); err != nil {
		return errors.Join(err, s.discard(sb.next().dir()))
	}
	slot := sb.keepSlot()
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return s.revert(context.WithoutCancel(ctx), sb) })
	if err := s.swap(ctx, sb); err != nil {
		return err
	}
	if err := s.launch(ctx, sb, mo.machine(), false, &u); err != nil {
		return err
	}
	if err := s.transition(sb, forGood, func(r *record) {
		r.toRunning()
		r.Parent, r.Before = mo.ID, nil
	}); err != nil {
		return err
	}
	// It is done: what fails from here leaves only rests, for the next start of the agent.
	if err := s.removeOld(ctx, sb, b, slot); err != nil {
		s.log.Error("the state left by a rollback is not all gone", "sandbox", sb.id, "err", err)
	}
	return nil
}

// prepareNext clones the disk of the moment; its memory is cloned when the VM starts.
func (s *Sandboxes) prepareNext(ctx context.Context, sb *sandbox, mo *moment) error {
	next := sb.next()
	if err := s.discard(next.dir()); err != nil {
		return err
	}
	if err := os.Mkdir(next.dir(), 0o711); err != nil {
		return err
	}
	if err := s.store.Clone(ctx, mo.machine().disk(), next.disk()); err != nil {
		return err
	}
	return s.fault(sb, "rollback.cloned")
}

// swap freezes the old VM and puts the new machine in the place of the old one.
func (s *Sandboxes) swap(ctx context.Context, sb *sandbox) error {
	if err := s.fault(sb, "rollback.begun"); err != nil {
		return err
	}
	rec := sb.snapshot()
	if rec.VM != nil {
		if err := s.driver.Pause(ctx, *rec.VM); err != nil {
			return err
		}
	}
	if err := s.fault(sb, "rollback.frozen"); err != nil {
		return err
	}
	if err := os.Rename(sb.machine().dir(), sb.old().dir()); err != nil {
		return err
	}
	if err := s.fault(sb, "rollback.between"); err != nil {
		return err
	}
	if err := os.Rename(sb.next().dir(), sb.machine().dir()); err != nil {
		return err
	}
	s.detach(sb)
	if err := errors.Join(storage.Sync(sb.dir), sb.update(forGood, func(r *record) { r.VM, r.Slot = nil, -1 })); err != nil {
		return err
	}
	return s.fault(sb, "rollback.swapped")
}

func (s *Sandboxes) removeOld(ctx context.Context, sb *sandbox, b *before, slot *network.Slot) error {
	if b.VM != nil {
		if err := s.driver.Destroy(ctx, *b.VM); err != nil {
			return err
		}
		s.net.Release(slot)
	}
	return s.discard(sb.old().dir())
}

// keepSlot notes the slot of the VM that runs, as a rollback begins.
func (sb *sandbox) keepSlot() *network.Slot {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.before = sb.slot
	return sb.slot
}

// revert takes back a rollback that did not come to its end, in the same agent or the next: the new VM goes,
// the old machine comes back, and its VM goes on.
func (s *Sandboxes) revert(ctx context.Context, sb *sandbox) error {
	rec := sb.snapshot()
	b := rec.Before
	if rec.VM != nil && (b.VM == nil || rec.VM.PID != b.VM.PID) {
		if err := s.driver.Destroy(ctx, *rec.VM); err != nil {
			return err
		}
	}
	if exists(sb.old().dir()) {
		if err := s.discard(sb.machine().dir()); err != nil {
			return err
		}
		if err := errors.Join(os.Rename(sb.old().dir(), sb.machine().dir()), storage.Sync(sb.dir)); err != nil {
			return err
		}
	}
	if err := s.discard(sb.next().dir()); err != nil {
		return err
	}
	if b.VM == nil {
		err := s.transition(sb, forGood, func(r *record) {
			r.toPaused(sb.machine(), sb.machine().atRest())
			r.Parent, r.AccessToken, r.NextToken = b.Parent, b.Token, ""
		})
		s.harden(sb)
		return err
	}
	handle := b.VM.Moved(sb.old().dir(), sb.machine().dir())
	if err := sb.update(forGood, func(r *record) {
		r.VM, r.Slot, r.Parent, r.AccessToken, r.NextToken = &handle, b.Slot, b.Parent, b.Token, ""
	}); err != nil {
		return err
	}
	return s.goOn(ctx, sb)
}

// goOn lets the old VM of a reverted rollback run again.
func (s *Sandboxes) goOn(ctx context.Context, sb *sandbox) error {
	sb.mu.Lock()
	slot := sb.before
	sb.mu.Unlock()
	if lives, err := s.carryOn(ctx, sb, slot); err != nil || !lives {
		return err
	}
	client, token, _ := sb.guestAndRecord()
	if err := client.SyncClock(ctx, token); err != nil {
		return err
	}
	return s.transition(sb, forGood, func(r *record) {
		r.toRunning()
		r.Before = nil
	})
}

func (s *Sandboxes) saveMomentOnce(ctx context.Context, sb *sandbox, dir string) (*moment, error) {
	mo, err := loadMoment(dir)
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return s.saveMoment(ctx, sb, dir, true)
	}
	return mo, err
}
