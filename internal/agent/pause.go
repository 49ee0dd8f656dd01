package agent

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// guestFreezeTimeout bounds how long a guest may take to stop its processes before a pause. One that
// does not (its root user can see to that) is paused all the same.
const guestFreezeTimeout = 2 * time.Second

// Pause stops a sandbox and keeps its disk and, unless disk_only, its memory. One that fails leaves it
// running.
func (s *Sandboxes) Pause(ctx context.Context, req *agentv1.PauseSandboxRequest) (*agentv1.Sandbox, error) {
	sb, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	err = sb.do(ctx, req.OperationId, func(ctx context.Context) error {
		if err := s.settleOperation(ctx, sb); err != nil {
			return err
		}
		done, err := sb.admit(req.OperationId, wrenn.SandboxPaused, wrenn.SandboxRunning)
		if done || err != nil {
			return err
		}
		if req.IdleSec > 0 {
			if err := sb.checkIdle(ctx, time.Duration(req.IdleSec)*time.Second); err != nil {
				return err
			}
		}
		defer s.warm.begin(lull)()
		return s.pause(ctx, sb, req)
	})
	if err != nil {
		return nil, err
	}
	return sb.report(), nil
}

// admit decides whether an operation that leads from one state to another may start. done says that it
// was done already.
func (sb *sandbox) admit(opID string, to, from wrenn.SandboxState) (done bool, err error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	switch {
	case sb.forget:
		return false, wrenn.Errorf(wrenn.KindNotFound, "this host has no sandbox %s", sb.id)
	case sb.rec.State == to && sb.rec.OperationID == opID:
		return true, nil
	case sb.rec.State != from:
		return false, wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not %s", sb.rec.State, from).
			With("state", string(sb.rec.State))
	}
	return false, nil
}

func (s *Sandboxes) pause(ctx context.Context, sb *sandbox, req *agentv1.PauseSandboxRequest) (err error) {
	defer func() { err = diskFull(err) }()
	if err := s.transition(sb, thisBoot, func(r *record) { r.State, r.OperationID = wrenn.SandboxPausing, req.OperationId }); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return s.transition(sb, thisBoot, func(r *record) { r.State = wrenn.SandboxRunning }) })
	if err := s.fault(sb, "pause.begun"); err != nil {
		return err
	}
	if open, _ := sb.activity.state(); open && req.IdleSec > 0 { // it came since that was looked at
		return wrenn.Errorf(wrenn.KindConflict, "the sandbox is in use")
	}
	sb.activity.drain(ctx)
	save := s.saveMemory
	if req.DiskOnly {
		save = s.saveDisk
	}
	if err := save(ctx, sb, &u); err != nil {
		return err
	}
	keep, durableAt := thisBoot, time.Time{}
	if req.Durable || req.DiskOnly { // a disk alone was written to the host's disk by saveDisk
		step(ctx, stepDurable)
		if err := sb.machine().sync(); err != nil {
			return err
		}
		keep, durableAt = forGood, time.Now().UTC()
	}
	if err := s.fault(sb, "pause.saved"); err != nil {
		return err
	}
	if err := s.transition(sb, keep, func(r *record) {
		ending, slot := r.VM, r.Slot
		r.toPaused(sb.machine(), !req.DiskOnly)
		r.VM, r.Slot, r.DurableAt = ending, slot, durableAt
	}); err != nil {
		return err
	}
	// The VM stands still and is not needed any more; nobody has to wait for its end but the next operation.
	sb.afterwards(func(ctx context.Context) {
		if err := s.endPaused(ctx, sb); err != nil {
			s.log.Error("the VM of a paused sandbox does not end yet", "sandbox", sb.id, "err", err)
		}
	})
	return nil
}

// endPaused ends the VM of a sandbox that is paused.
func (s *Sandboxes) endPaused(ctx context.Context, sb *sandbox) error {
	if err := s.teardown(ctx, sb); err != nil {
		return err
	}
	if err := s.fault(sb, "pause.ended"); err != nil {
		return err
	}
	if !sb.snapshot().HasMemory {
		if err := sb.machine().dropMemory(); err != nil {
			return err
		}
	}
	if err := sb.update(thisBoot, func(r *record) { r.VM, r.Slot = nil, -1 }); err != nil {
		return err
	}
	s.harden(sb)
	return nil
}

// hardenAfter is how long a sandbox is paused before it is made to survive a power cut: one that is resumed at
// once need not be, and the disk is left to whoever waits for it.
const hardenAfter = time.Second

// harden makes a paused sandbox survive a power cut of the host, in the background: writing out what may
// be all of its memory takes its time, and it can be resumed meanwhile.
func (s *Sandboxes) harden(sb *sandbox) {
	rec := sb.snapshot()
	if rec.State != wrenn.SandboxPaused || !rec.DurableAt.IsZero() {
		return
	}
	s.watchers.Go(func() {
		select {
		case <-time.After(hardenAfter):
		case <-s.life.Done():
			return
		}
		if err := s.hardenNow(sb, rec.Revision); err != nil && !sb.forgotten() && s.life.Err() == nil {
			s.log.Error("a paused sandbox does not survive a power cut yet", "sandbox", sb.id, "err", err)
		}
		s.notify()
	})
}

// hardenNow does it, unless the sandbox has gone on since the revision.
func (s *Sandboxes) hardenNow(sb *sandbox, revision uint64) error {
	if sb.forgotten() || sb.snapshot().Revision != revision {
		return nil
	}
	if err := sb.machine().syncFiles(); err != nil {
		return err
	}
	return sb.do(s.life, wrenn.NewID(wrenn.PrefixOperation), func(context.Context) error {
		if sb.forgotten() || sb.snapshot().Revision != revision || s.life.Err() != nil {
			return s.life.Err()
		}
		if err := sb.machine().markDurable(); err != nil {
			return err
		}
		return s.transition(sb, forGood, func(r *record) { r.DurableAt = time.Now().UTC() })
	})
}

// notify has the control plane told that something changed which it did not ask for.
func (s *Sandboxes) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// settleOperation ends an operation that could neither be done nor undone to its end, because a record could
// not be written or a VM did not end.
func (s *Sandboxes) settleOperation(ctx context.Context, sb *sandbox) error {
	switch rec := sb.snapshot(); {
	case rec.Before != nil:
		return s.revert(ctx, sb)
	case rec.State == wrenn.SandboxPausing:
		return s.settleChange(ctx, sb)
	case rec.State == wrenn.SandboxPaused && rec.VM != nil:
		return s.endPaused(ctx, sb)
	}
	return nil
}

// settleChange settles a pause or resume that was cut off, in this agent or an earlier one. A manifest says
// that the machine is whole at rest and its VM, if any, has not gone on; without one the VM is the truth.
func (s *Sandboxes) settleChange(ctx context.Context, sb *sandbox) error {
	rec := sb.snapshot()
	if sb.machine().atRest() {
		if err := s.teardown(ctx, sb); err != nil {
			return err
		}
		return s.settled(sb, true)
	}
	if rec.VM == nil { // a resume that had not come to starting the VM, of a machine without memory
		return s.settled(sb, false)
	}
	sb.mu.Lock()
	slot := sb.slot
	sb.mu.Unlock()
	if lives, err := s.carryOn(ctx, sb, slot); err != nil || !lives {
		return err
	}
	if err := s.greet(ctx, sb); err != nil {
		return err
	}
	return s.transition(sb, thisBoot, (*record).toRunning)
}

// saveMemory brings the machine to rest: frozen, its device state and manifest beside its memory and disk.
func (s *Sandboxes) saveMemory(ctx context.Context, sb *sandbox, u *undo.Stack) error {
	client, token, rec := sb.guestAndRecord()
	s.freezeGuest(ctx, sb)
	undoing := context.WithoutCancel(ctx)
	u.Push(func() error { return client.Catchup(undoing, token) })
	if err := s.fault(sb, "pause.quiet"); err != nil {
		return err
	}
	if err := s.driver.Pause(ctx, *rec.VM); err != nil {
		return err
	}
	u.Push(func() error { return errors.Join(sb.machine().wake(), s.driver.Resume(undoing, *rec.VM)) })
	if err := s.fault(sb, "pause.frozen"); err != nil {
		return err
	}
	return sb.machine().rest(ctx, s.driver, *rec.VM, rec.VCPUs, rec.AccessToken)
}

// saveDisk flushes and freezes the guest's file system, so that the disk alone can be booted again.
func (s *Sandboxes) saveDisk(ctx context.Context, sb *sandbox, u *undo.Stack) error {
	step(ctx, stepDisk)
	client, token, rec := sb.guestAndRecord()
	if err := client.FreezeFS(ctx, token); err != nil {
		return err
	}
	undoing := context.WithoutCancel(ctx)
	u.Push(func() error { return client.ThawFS(undoing, token) })
	if err := s.driver.Pause(ctx, *rec.VM); err != nil {
		return err
	}
	u.Push(func() error { return s.driver.Resume(undoing, *rec.VM) })
	return s.fault(sb, "pause.disk")
}

// Resume makes a paused sandbox run again; one without memory, or that is to give it up, is booted. One that fails
// leaves it paused.
func (s *Sandboxes) Resume(ctx context.Context, req *agentv1.ResumeSandboxRequest) (*agentv1.Sandbox, error) {
	sb, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	err = sb.do(ctx, req.OperationId, func(ctx context.Context) error {
		if err := s.settleOperation(ctx, sb); err != nil {
			return err
		}
		done, err := sb.admit(req.OperationId, wrenn.SandboxRunning, wrenn.SandboxPaused)
		if done || err != nil {
			return err
		}
		defer s.warm.begin(lull)()
		return s.resume(ctx, sb, req)
	})
	if err != nil {
		return nil, err
	}
	return sb.report(), nil
}

func (s *Sandboxes) resume(ctx context.Context, sb *sandbox, req *agentv1.ResumeSandboxRequest) (err error) {
	defer func() { err = diskFull(err) }()
	if err := s.needSpace(sb.snapshot().MemoryMB); err != nil {
		return err
	}
	if err := s.transition(sb, thisBoot, func(r *record) { r.State, r.OperationID = wrenn.SandboxResuming, req.OperationId }); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return s.settled(sb, sb.machine().atRest()) })
	if err := s.fault(sb, "resume.begun"); err != nil {
		return err
	}
	if req.DiskOnly {
		if err := sb.machine().wake(); err != nil {
			return err
		}
	}
	if err := s.launch(ctx, sb, sb.machine(), false, &u); err != nil {
		return err
	}
	return s.transition(sb, thisBoot, (*record).toRunning)
}

// checkIdle refuses with KindConflict if the sandbox was used within the last idle time, or a command
// runs in it.
func (sb *sandbox) checkIdle(ctx context.Context, idle time.Duration) error {
	if err := sb.checkQuiet(idle); err != nil {
		return err
	}
	client, token, _ := sb.guestAndRecord()
	procs := processconnect.NewProcessClient(guestHTTP{client, token}, "http://"+client.Host())
	list, err := procs.List(ctx, connect.NewRequest(&process.ListRequest{}))
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's guest agent does not answer")
	}
	if n := len(list.Msg.Processes); n > 0 {
		return wrenn.Errorf(wrenn.KindConflict, "the sandbox is in use: %d commands run in it", n)
	}
	return sb.checkQuiet(idle) // it may have been used while its guest was asked
}

// checkQuiet is checkIdle as far as the host knows.
func (sb *sandbox) checkQuiet(idle time.Duration) error {
	open, last := sb.activity.state()
	_, _, rec := sb.guestAndRecord()
	if rec.LastActiveAt.After(last) {
		last = rec.LastActiveAt
	}
	if rec.StartedAt.After(last) {
		last = rec.StartedAt
	}
	if open || time.Since(last) < idle {
		return wrenn.Errorf(wrenn.KindConflict, "the sandbox is in use")
	}
	return nil
}

func (sb *sandbox) guestAndRecord() (*guest.Client, string, record) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.guest, sb.rec.AccessToken, sb.rec
}

// guestHTTP is the HTTP client of generated clients towards one guest.
type guestHTTP struct {
	client *guest.Client
	token  string
}

func (g guestHTTP) Do(req *http.Request) (*http.Response, error) { return g.client.Do(req, g.token) }

// dropMemory frees the memory of a machine that was saved without it.
func (m machine) dropMemory() error {
	if err := os.Remove(m.memory()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
