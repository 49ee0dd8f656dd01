package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
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
		if err := s.adoptRunning(ctx, sb); err != nil {
			return err
		}
		s.watchers.Go(func() { s.wakeGuest(sb) })
		return nil
	case wrenn.SandboxPausing, wrenn.SandboxResuming:
		return s.adoptChanging(ctx, sb)
	case wrenn.SandboxPaused:
		return s.adoptPaused(sb)
	}
	return nil
}

// adoptPaused sees whether the saved memory is still good, and goes on to make it durable.
func (s *Sandboxes) adoptPaused(sb *sandbox) (err error) {
	if _, loadErr := sb.machine().load(); sb.rec.HasMemory && errors.Is(loadErr, os.ErrNotExist) {
		s.log.Warn("a paused sandbox lost its memory", "sandbox", sb.id, "err", loadErr)
		err = s.transition(sb, func(r *record) {
			r.toPaused(sb.machine(), false)
			r.Reason = "its host went down before the saved memory was safe on disk; the disk is kept"
		})
	}
	s.harden(sb)
	return err
}

// adoptChanging settles a pause or resume that was cut off. A manifest says that the machine is whole at
// rest and its VM, if any, has not gone on; without one the VM is the truth.
func (s *Sandboxes) adoptChanging(ctx context.Context, sb *sandbox) error {
	if sb.rec.Before != nil {
		return s.revert(ctx, sb)
	}
	if sb.machine().atRest() {
		if err := s.teardown(ctx, sb); err != nil {
			return err
		}
		return s.settled(sb, true)
	}
	if sb.rec.VM == nil { // a resume that had not come to starting the VM, of a machine without memory
		return s.settled(sb, false)
	}
	if err := s.adoptRunning(ctx, sb); err != nil || sb.snapshot().State == wrenn.SandboxPaused {
		return err
	}
	if err := s.greet(ctx, sb); err != nil {
		return err
	}
	return s.transition(sb, (*record).toRunning)
}

func (s *Sandboxes) settled(sb *sandbox, hasMemory bool) error {
	err := s.transition(sb, func(r *record) { r.toPaused(sb.machine(), hasMemory) })
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

func (s *Sandboxes) adoptRunning(ctx context.Context, sb *sandbox) error {
	handle := *sb.rec.VM
	state, err := s.driver.Inspect(ctx, handle)
	if err != nil {
		return err
	}
	if state == vm.StateGone {
		if err := s.driver.Destroy(ctx, handle); err != nil { // removes the rest: cgroup, socket
			return err
		}
		return s.lost(sb)
	}
	slot, err := s.net.Adopt(sb.rec.Slot)
	if err != nil {
		return err
	}
	if state == vm.StateFrozen {
		if err := s.driver.Resume(ctx, handle); err != nil {
			return err
		}
	}
	s.attach(sb, slot, handle)
	s.log.Info("took over a running sandbox", "sandbox", sb.id, "pid", handle.PID)
	return nil
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
		_, err := s.Pause(ctx, &agentv1.PauseSandboxRequest{Id: r.Id, OperationId: wrenn.NewID(wrenn.PrefixOperation), Durable: true})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
