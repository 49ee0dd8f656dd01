package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// launch makes a sandbox's machine run and returns when its guest agent is ready and knows who it is. It
// goes on from the moment that is saved in from: its own, or that of which its disk is a clone; without
// memory there it is booted. shared says that others are made from there as well. Undo steps are pushed for
// all that it takes.
func (s *Sandboxes) launch(ctx context.Context, sb *sandbox, from machine, shared bool, u *undo.Stack) error {
	step(ctx, stepStarting)
	slot, err := s.acquireSlot(ctx)
	if err != nil {
		return err
	}
	u.Push(func() error { s.net.Release(slot); return nil })
	handle, err := s.startVM(ctx, sb, slot, from, shared, u)
	if err != nil {
		return err
	}
	s.attach(sb, slot, handle)
	u.Push(func() error { s.detach(sb); return nil })
	if err := s.fault(sb, "launch.started"); err != nil {
		return err
	}
	// From here the VM changes its disk, so that and the memory are no saved moment any more. This is on disk
	// before the first instruction.
	if err := sb.update(thisBoot, func(r *record) { r.VM, r.HasMemory, r.StartedAt = &handle, false, handle.StartedAt.UTC() }); err != nil {
		return err
	}
	if err := s.fault(sb, "launch.recorded"); err != nil {
		return err
	}
	if err := sb.machine().wake(); err != nil {
		return err
	}
	u.Push(func() error { return s.keepMemory(context.WithoutCancel(ctx), sb, handle) })
	if err := s.fault(sb, "launch.woken"); err != nil {
		return err
	}
	if err := s.driver.Resume(ctx, handle); err != nil {
		return err
	}
	if err := s.fault(sb, "launch.running"); err != nil {
		return err
	}
	if err := s.greet(ctx, sb); err != nil {
		return err
	}
	return s.fault(sb, "launch.greeted")
}

// keepMemory takes a resume back whose guest does not answer: its memory must not be lost for that.
func (s *Sandboxes) keepMemory(ctx context.Context, sb *sandbox, handle vm.Handle) error {
	rec := sb.snapshot()
	if rec.State != wrenn.SandboxResuming || rec.Before != nil {
		return nil // a create or rollback that failed
	}
	if err := s.driver.Pause(ctx, handle); err != nil {
		return err
	}
	return sb.machine().rest(ctx, s.driver, handle, rec.VCPUs, rec.AccessToken)
}

// startVM starts the VM frozen. The slot is on record first, so a VM that dies unrecorded is found by
// its uid; the next token too, so an agent that dies in between can still speak to the guest.
func (s *Sandboxes) startVM(ctx context.Context, sb *sandbox, slot *network.Slot, from machine, shared bool, u *undo.Stack) (vm.Handle, error) {
	rec, m := sb.snapshot(), sb.machine()
	cfg, err := s.vmConfig(sb.id, m, sb.console(), rec.VCPUs, rec.MemoryMB, slot)
	if err != nil {
		return vm.Handle{}, err
	}
	cfg.Frozen = true
	var token string
	man, err := from.load()
	sb.remembers = man != nil && rec.State == wrenn.SandboxResuming
	switch {
	case errors.Is(err, os.ErrNotExist): // a guest that boots knows no token
		if err := m.dropMemory(); err != nil {
			return vm.Handle{}, err
		}
	case err != nil:
		return vm.Handle{}, err
	default:
		if err := man.fits(s.driver.Capabilities()); err != nil {
			return vm.Handle{}, err
		}
		cfg.Restore = &vm.SnapshotFiles{State: from.state(), Memory: from.memory(), Driver: man.Driver}
		cfg.SharedMemory = shared
		token = man.Token
	}
	if err := sb.update(thisBoot, func(r *record) {
		r.Slot, r.AccessToken, r.NextToken, r.Cold = slot.Index, token, cmp.Or(r.NextToken, guest.NewToken()), r.Cold || man == nil
	}); err != nil {
		return vm.Handle{}, err
	}
	cfg.Disks[0].GrowTo = int64(rec.DiskMB) << 20
	handle, err := s.driver.Start(ctx, cfg)
	if err != nil {
		return vm.Handle{}, err
	}
	u.Push(func() error { return s.driver.Destroy(context.WithoutCancel(ctx), handle) })
	return handle, nil
}

// greet waits for the guest agent and makes the guest itself: token, clock, entropy, names. The token that
// it knows then becomes the record's with the next state, by toRunning.
func (s *Sandboxes) greet(ctx context.Context, sb *sandbox) error {
	sb.mu.Lock()
	client, gone := sb.guest, sb.gone
	sb.mu.Unlock()
	step(ctx, stepGuest)
	rec := sb.snapshot()
	if err := client.WaitHeld(ctx, rec.AccessToken, gone); err != nil {
		return err
	}
	id := s.identity(&rec)
	if sb.remembers {
		id = guest.Identity{Token: rec.NextToken}
	}
	err := client.Init(ctx, rec.AccessToken, id)
	if err != nil && rec.NextToken != "" && ctx.Err() == nil {
		// An agent that died right here may have told the guest already.
		if again := client.Init(ctx, rec.NextToken, id); again != nil {
			return errors.Join(err, again)
		}
		return nil
	}
	return err
}

// identity is what a guest is told that it is.
func (s *Sandboxes) identity(rec *record) guest.Identity {
	id := guest.Identity{
		Token: rec.NextToken, Hostname: rec.Hostname, MachineID: rec.MachineID, Env: rec.Env, DefaultUser: rec.User,
		DiskBytes: int64(rec.DiskMB) << 20,
	}
	if s.egress != network.EgressNone {
		id.Nameservers = []string{network.GatewayIP}
	}
	return id
}

// vmConfig is the VM of a machine in a slot. The driver's directory is made anew.
func (s *Sandboxes) vmConfig(id string, m machine, console string, vcpus, memoryMB int, slot *network.Slot) (vm.Config, error) {
	if err := os.RemoveAll(m.vm()); err != nil {
		return vm.Config{}, err
	}
	if err := os.Mkdir(m.vm(), 0o700); err != nil {
		return vm.Config{}, err
	}
	cmdline := fmt.Sprintf("root=/dev/vda rootfstype=ext4 rw init=/usr/local/bin/envd quiet panic=-1 wrenn.addr=%s/%d wrenn.gw=%s",
		network.GuestIP, network.GuestPrefix, network.GatewayIP)
	if s.egress != network.EgressNone {
		cmdline += " wrenn.dns=" + network.GatewayIP
	}
	return vm.Config{
		ID: id, Dir: m.vm(), VCPUs: vcpus, MemoryMB: memoryMB, Kernel: s.kernel, Initrd: s.initrd, Cmdline: cmdline,
		Disks: []vm.Disk{{Path: m.disk()}}, MemoryFile: m.memory(), Console: console,
		Net: vm.Net{NetnsPath: slot.NetnsPath, TAP: slot.TAP, MAC: network.GuestMAC},
		UID: slot.UID, GID: slot.UID, Cgroup: cgroupName(slot.Index),
	}, nil
}

// attach makes a VM the sandbox's, and watches for its end.
func (s *Sandboxes) attach(sb *sandbox, slot *network.Slot, handle vm.Handle) {
	gone, client := make(chan struct{}), guest.New(network.GuestIP, slot.DialContext)
	sb.mu.Lock()
	sb.slot, sb.gone, sb.guest = slot, gone, client
	sb.mu.Unlock()
	s.watchers.Go(func() { client.KeepClock(s.life, gone) })
	s.watchers.Go(func() {
		if err := s.driver.Wait(s.life, handle); err != nil {
			if s.life.Err() == nil {
				s.log.Error("cannot watch a VM", "sandbox", sb.id, "err", err)
			}
			return
		}
		if s.life.Err() != nil {
			return // the next agent settles it
		}
		close(gone)
		client.Close() // whoever waits for an answer, an operation too, hears at once that there will be none
		s.ended(sb, gone)
	})
}

// detach forgets the VM that ran.
func (s *Sandboxes) detach(sb *sandbox) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.guest != nil {
		sb.guest.Close()
	}
	sb.guest, sb.slot, sb.gone = nil, nil, nil
}

// ended handles a VM that ended without being asked to: the guest powered off, or the VMM died. The
// disk is all that is left, so the sandbox is paused without memory; it is not lost.
func (s *Sandboxes) ended(sb *sandbox, gone chan struct{}) {
	err := sb.do(s.life, wrenn.NewID(wrenn.PrefixOperation), func(ctx context.Context) error {
		sb.mu.Lock()
		current := sb.gone == gone && !sb.forget && sb.rec.State == wrenn.SandboxRunning
		sb.mu.Unlock()
		if !current {
			return nil // the end was ours: destroyed, deleted or paused
		}
		if err := s.teardown(ctx, sb); err != nil { // the rest: cgroup, sockets, slot
			return err
		}
		return s.lost(sb)
	})
	if err != nil {
		s.log.Error("cannot settle a VM that ended", "sandbox", sb.id, "err", err)
		return
	}
	s.notify()
}

// lost records that a running sandbox has no VM any more.
func (s *Sandboxes) lost(sb *sandbox) error {
	s.log.Warn("the virtual machine of a sandbox ended by itself", "sandbox", sb.id)
	err := s.transition(sb, forGood, func(r *record) {
		r.toPaused(sb.machine(), false)
		r.Reason = "its virtual machine ended by itself (powered off, or its host restarted); the disk is kept"
	})
	s.harden(sb)
	return err
}
