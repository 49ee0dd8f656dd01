package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// warmDir holds, below AGENT_SANDBOXES_PATH, the virtual machines that are nobody's yet. They end with
// the agent: the next one makes its own.
const warmDir = "warm"

// warmTemplates is for how many templates, those that creates asked for last, machines are kept ready.
const warmTemplates = 2

// shape is what a ready VM is a clone of.
type shape struct {
	template        machine
	vcpus, memoryMB int
	diskMB          int
}

// readyVM is a clone of a template that has no identity yet: its guest agent has answered and run a
// command, so what that takes is in memory and, with an emulated CPU, translated; then it was frozen.
type readyVM struct {
	dir    string // its machine and console
	slot   *network.Slot
	handle vm.Handle
}

// warmPool keeps VMs ready for creates to come. An empty one is slower, never wrong.
type warmPool struct {
	size int // per template; 0 keeps none
	wake chan struct{}

	mu     sync.Mutex
	busy   int           // operations under way
	quiet  chan struct{} // closed when there are none any more; nil while there are none
	calm   time.Time     // until then more of them are to be expected
	recent []machine     // latest last
	shapes map[machine]shape
	ready  map[machine][]*readyVM
	making *making // nil while none is
}

// making is a ready VM to come. The first create that finds none ready waits for it: that is shorter than to
// begin another one, which would take the CPU from both.
type making struct {
	template machine
	waited   bool          // somebody waits
	done     chan *readyVM // for who waits; closed if it could not be made
}

func newWarmPool(size int) *warmPool {
	return &warmPool{size: size, wake: make(chan struct{}, 1), shapes: map[machine]shape{}, ready: map[machine][]*readyVM{}}
}

// take gives a ready clone of a template, or one that will be ready soon, which the caller must wait for, or
// neither; more are made when creates leave time for it. What it no longer keeps ready is returned for the
// caller to end.
func (p *warmPool) take(sh shape) (v *readyVM, soon <-chan *readyVM, drop []*readyVM) {
	if p.size == 0 {
		return nil, nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recent = append(slices.DeleteFunc(p.recent, func(m machine) bool { return m == sh.template }), sh.template)
	p.shapes[sh.template] = sh
	if len(p.recent) > warmTemplates {
		drop = p.forget(p.recent[0])
	}
	if all := p.ready[sh.template]; len(all) > 0 {
		v, p.ready[sh.template] = all[0], all[1:]
	} else if m := p.making; m != nil && m.template == sh.template && !m.waited {
		m.waited, soon = true, m.done
	}
	return v, soon, drop
}

// lull is how long after an operation the next one is to be expected, or the first command of a new sandbox.
const lull = 300 * time.Millisecond

// afterCreate is the lull after a create. What it takes is replaced at once when half of the pool is gone.
func (p *warmPool) afterCreate(template machine) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready[template]) <= max(p.size/2, 1) {
		return 0
	}
	return lull
}

// begin notes an operation, which may be followed by another within the lull; the returned function notes its end,
// and has replaced what it took.
func (p *warmPool) begin(lull time.Duration) (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy++; p.busy == 1 {
		p.quiet = make(chan struct{})
	}
	return func() {
		p.mu.Lock()
		if next := time.Now().Add(lull); lull > 0 && next.After(p.calm) {
			p.calm = next
		}
		if p.busy--; p.busy == 0 {
			close(p.quiet)
			p.quiet = nil
		}
		p.mu.Unlock()
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

// maxYield is how long the making of ready VMs stands back for operations, which need the CPU more.
const maxYield = 3 * time.Second

// yield waits until no operation is under way or to be expected, at most maxYield.
func (p *warmPool) yield(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, maxYield)
	defer cancel()
	for {
		p.mu.Lock()
		quiet, left := p.quiet, time.Until(p.calm)
		p.mu.Unlock()
		var calm <-chan time.Time
		switch {
		case quiet != nil:
		case left <= 0:
			return
		default:
			calm = time.After(left)
		}
		select {
		case <-quiet:
		case <-calm:
		case <-ctx.Done():
			return
		}
	}
}

// forget keeps nothing ready of a template; p.mu is held.
func (p *warmPool) forget(template machine) []*readyVM {
	drop := p.ready[template]
	delete(p.ready, template)
	delete(p.shapes, template)
	p.recent = slices.DeleteFunc(p.recent, func(m machine) bool { return m == template })
	return drop
}

// next is what is to be made ready, if anything: of the template that was asked for last first.
func (p *warmPool) next() (shape, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, template := range slices.Backward(p.recent) {
		if len(p.ready[template]) < p.size {
			return p.shapes[template], true
		}
	}
	return shape{}, false
}

// start notes that a VM of a template is being made; put or fail follows.
func (p *warmPool) start(sh shape) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.making = &making{template: sh.template, done: make(chan *readyVM, 1)}
}

// fail tells who waits for the VM being made that it will not come.
func (p *warmPool) fail() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.making.done)
	p.making = nil
}

// put gives the VM that was made to who waits for it, or adds it, unless it is not wanted any more.
func (p *warmPool) put(sh shape, v *readyVM) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.making
	p.making = nil
	if m.waited {
		m.done <- v
		return true
	}
	if _, wanted := p.shapes[sh.template]; !wanted {
		return false
	}
	p.ready[sh.template] = append(p.ready[sh.template], v)
	return true
}

// oldest takes a VM out of the pool, to make room.
func (p *warmPool) oldest() *readyVM {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, template := range p.recent {
		if all := p.ready[template]; len(all) > 0 {
			p.ready[template] = all[1:]
			return all[0]
		}
	}
	return nil
}

// abandon stops trying for a template until it is asked for again, and returns what was ready.
func (p *warmPool) abandon(template machine) []*readyVM {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.forget(template)
}

// keepWarm makes VMs ready, one after the other, until ctx ends; then it ends those that are left.
func (s *Sandboxes) keepWarm(ctx context.Context) {
	defer func() {
		for v := s.warm.oldest(); v != nil; v = s.warm.oldest() {
			s.endReady(v)
		}
	}()
	for {
		sh, wanted := s.warm.next()
		if !wanted {
			select {
			case <-ctx.Done():
				return
			case <-s.warm.wake:
				continue
			}
		}
		s.warm.yield(ctx)
		if ctx.Err() != nil {
			return
		}
		s.warm.start(sh)
		v, err := s.makeReady(ctx, sh)
		if err != nil {
			s.warm.fail()
			if ctx.Err() != nil {
				return
			}
			s.log.Warn("no virtual machine is kept ready of a template", "template", filepath.Base(sh.template.dir()), "err", err)
			for _, v := range s.warm.abandon(sh.template) {
				s.endReady(v)
			}
			continue
		}
		if !s.warm.put(sh, v) {
			s.endReady(v)
		}
	}
}

// makeReady starts a clone of a template and lets it do once what every sandbox does first.
func (s *Sandboxes) makeReady(ctx context.Context, sh shape) (ready *readyVM, err error) {
	if err := s.needSpace(sh.memoryMB); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	var u undo.Stack
	defer u.Run(&err)
	dir, err := os.MkdirTemp(filepath.Join(s.dir, warmDir), "vm-")
	if err != nil {
		return nil, err
	}
	u.Push(func() error { return os.RemoveAll(dir) })
	v := &readyVM{dir: dir}
	m := v.machine()
	if err := errors.Join(os.Chmod(dir, 0o711), os.Mkdir(m.dir(), 0o711)); err != nil {
		return nil, err
	}
	if err := s.store.Clone(ctx, sh.template.disk(), m.disk()); err != nil {
		return nil, err
	}
	if v.slot, err = s.net.Acquire(ctx); err != nil {
		return nil, err
	}
	u.Push(func() error { s.net.Release(v.slot); return nil })
	cfg, err := s.vmConfig("ready", m, v.console(), sh.vcpus, sh.memoryMB, v.slot)
	if err != nil {
		return nil, err
	}
	man, err := sh.template.load()
	if err != nil {
		return nil, err
	}
	cfg.Restore, cfg.SharedMemory = &vm.SnapshotFiles{State: sh.template.state(), Memory: sh.template.memory(), Driver: man.Driver}, true
	if v.handle, err = s.driver.Start(ctx, cfg); err != nil {
		return nil, err
	}
	u.Push(func() error { return s.driver.Destroy(context.WithoutCancel(ctx), v.handle) })
	client := guest.New(network.GuestIP, v.slot.DialContext)
	defer client.Close()
	if err := rehearse(ctx, client); err != nil {
		return nil, err
	}
	if err := client.Freeze(ctx, ""); err != nil { // as before a pause; Init lets go
		return nil, err
	}
	// Names for now, which nobody sees: the sandbox's own follow before anything else runs.
	if err := client.Init(ctx, "", s.identity(&record{Hostname: "ready", MachineID: guest.NewMachineID(), DiskMB: sh.diskMB})); err != nil {
		return nil, err
	}
	return v, s.driver.Pause(ctx, v.handle)
}

// rehearse has a guest without identity do what comes first in every sandbox: answer, and run a command. It
// leaves nothing but what is in the guest's caches.
func rehearse(ctx context.Context, client *guest.Client) error {
	if err := client.WaitReady(ctx, nil); err != nil {
		return err
	}
	procs := processconnect.NewProcessClient(guestHTTP{client, ""}, "http://"+client.Host())
	stream, err := procs.Start(ctx, connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-lc", "/bin/true"}},
	}))
	if err != nil {
		return err
	}
	for stream.Receive() { // until it has ended
	}
	return errors.Join(stream.Err(), stream.Close())
}

func (v *readyVM) machine() machine { return machine(filepath.Join(v.dir, machineDir)) }
func (v *readyVM) console() string  { return filepath.Join(v.dir, consoleLog) }

// endReady ends a ready VM that nobody wants.
func (s *Sandboxes) endReady(v *readyVM) {
	ctx, cancel := context.WithTimeout(context.Background(), operationTimeout)
	defer cancel()
	if err := s.driver.Destroy(ctx, v.handle); err != nil {
		s.log.Error("cannot end a virtual machine that was kept ready", "err", err)
		return
	}
	s.net.Release(v.slot)
	if err := os.RemoveAll(v.dir); err != nil {
		s.log.Error("cannot remove a virtual machine that was kept ready", "err", err)
	}
}

// takeReady gives a VM that is ready for a new sandbox, or nil.
func (s *Sandboxes) takeReady(ctx context.Context, from origin, rec record) *readyVM {
	if !from.template || from.diskOnly || rec.DiskMB != from.diskMB {
		return nil
	}
	sh := shape{template: from.machine, vcpus: rec.VCPUs, memoryMB: rec.MemoryMB, diskMB: from.diskMB}
	for {
		v, soon, drop := s.warm.take(sh)
		for _, d := range drop {
			s.endReady(d)
		}
		if soon != nil {
			v = s.awaitVM(ctx, soon)
		}
		if v == nil {
			return nil
		}
		if state, err := s.driver.Inspect(ctx, v.handle); err == nil && state == vm.StateFrozen {
			return v
		}
		s.endReady(v) // it died meanwhile
	}
}

// awaitVM waits for a VM that is being made ready; nil if it cannot be, or ctx ends.
func (s *Sandboxes) awaitVM(ctx context.Context, soon <-chan *readyVM) *readyVM {
	select {
	case v := <-soon:
		return v
	case <-ctx.Done():
		s.watchers.Go(func() {
			if v := <-soon; v != nil {
				s.endReady(v)
			}
		})
		return nil
	}
}

// claim makes a ready VM a sandbox's. After an error nothing of the VM is left.
func (s *Sandboxes) claim(ctx context.Context, sb *sandbox, v *readyVM) (err error) {
	defer func() {
		if err != nil {
			undoing := context.WithoutCancel(ctx)
			err = errors.Join(err, s.teardown(undoing, sb), s.discard(sb.machine().dir()), s.discard(v.dir),
				sb.update(thisBoot, func(r *record) { r.VM, r.Slot = nil, -1 }))
		}
	}()
	handle := v.handle
	if err := sb.update(thisBoot, func(r *record) { r.VM, r.Slot = &handle, v.slot.Index }); err != nil {
		return err
	}
	s.attach(sb, v.slot, handle)
	if err := os.Rename(v.machine().dir(), sb.machine().dir()); err != nil {
		return err
	}
	if err := os.Rename(v.console(), sb.console()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Remove(v.dir); err != nil {
		return fmt.Errorf("remove the place of a ready machine: %w", err)
	}
	handle = handle.Moved(v.dir, sb.dir)
	if err := sb.update(thisBoot, func(r *record) { r.VM, r.StartedAt = &handle, time.Now().UTC() }); err != nil {
		return err
	}
	if err := s.driver.Resume(ctx, handle); err != nil {
		return err
	}
	return s.greet(ctx, sb)
}

// acquireSlot takes a network slot, if need be that of a ready VM.
func (s *Sandboxes) acquireSlot(ctx context.Context) (*network.Slot, error) {
	for {
		slot, err := s.net.Acquire(ctx)
		if wrenn.KindOf(err) != wrenn.KindNoCapacity {
			return slot, err
		}
		v := s.warm.oldest()
		if v == nil {
			return nil, err
		}
		s.endReady(v)
	}
}
