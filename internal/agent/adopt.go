package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// adopt takes over what an earlier agent left: VMs that still run are watched again, half-done creates
// are undone, half-done deletes finished, and what belongs to no record (network slots, VMMs, trash)
// is removed. A record that cannot be read is left alone and logged: unknown is not garbage.
func (s *Sandboxes) adopt(ctx context.Context, cfg Config) error {
	for _, dir := range []string{sandboxesDir, templatesDir, trashDir, warmDir, forksDir} {
		if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o711); err != nil {
			return err
		}
	}
	if err := errors.Join(os.MkdirAll(s.snapshots, 0o700), os.Chmod(s.snapshots, 0o700)); err != nil {
		return err
	}
	s.revision = uint64(time.Now().UnixMicro())
	entries, err := os.ReadDir(filepath.Join(s.dir, sandboxesDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := s.adoptOne(ctx, filepath.Join(s.dir, sandboxesDir, e.Name())); err != nil {
			s.log.Error("a sandbox could not be taken over and is left as it is", "sandbox", e.Name(), "err", err)
		}
	}
	if err := s.sweepVMMs(cfg); err != nil {
		return fmt.Errorf("remove left-over VMMs: %w", err)
	}
	if err := s.net.Sweep(ctx); err != nil {
		return fmt.Errorf("remove left-over network namespaces: %w", err)
	}
	if err := s.dropUnfinished(s.snapshots); err != nil {
		return err
	}
	return errors.Join(empty(filepath.Join(s.dir, warmDir)), empty(filepath.Join(s.dir, forksDir)), empty(filepath.Join(s.dir, trashDir)))
}

func (s *Sandboxes) sweepVMMs(cfg Config) error {
	keep := map[int]bool{}
	for _, sb := range s.byID {
		if sb.rec.Slot >= 0 {
			keep[sb.rec.Slot] = true // also those that could not be taken over
		}
	}
	killed, err := killOrphans(cfg, keep)
	if killed > 0 {
		s.log.Warn("ended virtual machines that no record names", "count", killed)
	}
	return err
}

func (s *Sandboxes) adoptOne(ctx context.Context, dir string) error {
	rec, err := loadRecord(dir)
	if errors.Is(err, os.ErrNotExist) && wrenn.ValidID(wrenn.PrefixSandbox, filepath.Base(dir)) {
		return s.discard(dir) // the agent died between making the directory and its first record
	}
	if err != nil {
		return err
	}
	sb := &sandbox{id: rec.ID, dir: dir, rec: *rec}
	s.byID[rec.ID] = sb
	if err := s.afterBoot(sb); err != nil {
		return err
	}
	if err := s.dropUnfinished(filepath.Join(dir, checkpointsDir)); err != nil {
		return err
	}
	if rec.Before == nil { // rests of a rollback that was done
		if err := errors.Join(s.discard(sb.old().dir()), s.discard(sb.next().dir())); err != nil {
			return err
		}
	}
	switch rec.State {
	case wrenn.SandboxCreating, wrenn.SandboxDeleting:
		return s.finishRemoval(ctx, sb)
	case wrenn.SandboxRunning:
		if lives, err := s.carryOn(ctx, sb, nil); err != nil || !lives {
			return err
		}
		s.watchers.Go(func() { s.wakeGuest(sb) })
		return nil
	case wrenn.SandboxPausing, wrenn.SandboxResuming:
		if rec.Before != nil {
			return s.revert(ctx, sb)
		}
		return s.settleChange(ctx, sb)
	case wrenn.SandboxPaused:
		return s.adoptPaused(ctx, sb)
	}
	return nil
}

// afterBoot makes sure, when the host was started anew, that the control plane does not take for old what this
// agent reports: it may have heard of state changes that the power cut took back.
func (s *Sandboxes) afterBoot(sb *sandbox) error {
	boot, err := vmproc.BootID()
	if err != nil || sb.rec.BootID == boot {
		return err
	}
	return sb.update(forGood, func(r *record) { r.Revision += revisionsLost })
}

// adoptPaused sees whether the saved memory is still good, and goes on to make it durable.
func (s *Sandboxes) adoptPaused(ctx context.Context, sb *sandbox) (err error) {
	if sb.rec.VM != nil {
		return s.endPaused(ctx, sb)
	}
	if _, loadErr := sb.machine().load(); sb.rec.HasMemory && errors.Is(loadErr, os.ErrNotExist) {
		s.log.Warn("a paused sandbox lost its memory", "sandbox", sb.id, "err", loadErr)
		err = s.transition(sb, forGood, func(r *record) {
			r.toPaused(sb.machine(), false)
			r.Reason = "its host went down before the saved memory was safe on disk; the disk is kept"
		})
	}
	s.harden(sb)
	return err
}

func (s *Sandboxes) settled(sb *sandbox, hasMemory bool) error {
	err := s.transition(sb, thisBoot, func(r *record) { r.toPaused(sb.machine(), hasMemory) })
	s.harden(sb)
	return err
}

func (s *Sandboxes) finishRemoval(ctx context.Context, sb *sandbox) error {
	if err := s.teardown(ctx, sb); err != nil {
		return err
	}
	if err := s.discard(sb.dir); err != nil {
		return err
	}
	s.drop(sb)
	s.log.Info("removed a sandbox whose create or delete was cut off", "sandbox", sb.id)
	return nil
}

// carryOn lets the VM that the record names go on, in its slot, or if that is nil in the one that an earlier
// agent left. A sandbox whose VM is gone is then paused.
func (s *Sandboxes) carryOn(ctx context.Context, sb *sandbox, slot *network.Slot) (lives bool, err error) {
	rec := sb.snapshot()
	handle := *rec.VM
	state, err := s.driver.Inspect(ctx, handle)
	if err != nil {
		return false, err
	}
	if state == vm.StateGone {
		if err := s.driver.Destroy(ctx, handle); err != nil { // removes the rest: cgroup, socket
			return false, err
		}
		s.detach(sb)
		if slot != nil {
			s.net.Release(slot)
		}
		return false, s.lost(sb)
	}
	if slot == nil {
		if slot, err = s.net.Adopt(rec.Slot); err != nil {
			return false, err
		}
		s.log.Info("took over a running sandbox", "sandbox", sb.id, "pid", handle.PID)
	}
	s.detach(sb)
	s.attach(sb, slot, handle)
	if state == vm.StateFrozen {
		return true, s.driver.Resume(ctx, handle)
	}
	return true, nil
}

// wakeGuest lets the processes of a guest go on that an operation which was cut off had stopped. Where none
// was, it does nothing.
func (s *Sandboxes) wakeGuest(sb *sandbox) {
	client, token, _ := sb.guestAndRecord()
	if client == nil {
		return
	}
	if err := client.SyncClock(s.life, token); err != nil && s.life.Err() == nil {
		s.log.Warn("a guest that was taken over does not answer", "sandbox", sb.id, "err", err)
	}
}

// dropUnfinished removes moments that were being written.
func (s *Sandboxes) dropUnfinished(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*"+unfinished))
	for _, path := range paths {
		err = errors.Join(err, s.discard(path))
	}
	return err
}

// empty removes what is in a directory.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// StopVMs pauses all running sandboxes with their memory, as for a shutdown of the host.
func (s *Sandboxes) StopVMs(ctx context.Context) error {
	list, _ := s.List()
	var errs []error
	for _, r := range list {
		if r.State != protoState[wrenn.SandboxRunning] {
			continue
		}
		errs = append(errs, s.stopVM(ctx, r.Id))
	}
	return errors.Join(errs...)
}

// stopVM pauses a sandbox and returns when its VM has ended.
func (s *Sandboxes) stopVM(ctx context.Context, id string) error {
	req := &agentv1.PauseSandboxRequest{Id: id, OperationId: wrenn.NewID(wrenn.PrefixOperation), Durable: true}
	if _, err := s.Pause(ctx, req); err != nil {
		return err
	}
	sb, err := s.get(id)
	if err != nil {
		return err
	}
	return sb.do(ctx, wrenn.NewID(wrenn.PrefixOperation), func(ctx context.Context) error { return s.settleOperation(ctx, sb) })
}
