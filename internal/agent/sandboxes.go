package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/undo"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Names below AGENT_SANDBOXES_PATH.
const (
	sandboxesDir = "sandboxes"
	trashDir     = "trash" // renamed here before removal, so that a removal can be finished later
)

// Sandboxes owns all sandboxes of this host.
type Sandboxes struct {
	driver vm.Driver
	store  *storage.Store
	net    *network.Pool
	images *images
	kernel string
	initrd string
	egress string
	dir    string
	log    *slog.Logger

	mu       sync.Mutex
	byID     map[string]*sandbox
	revision uint64
	changed  chan struct{} // 1 slot: something changed since the last heartbeat
}

// get finds a sandbox.
func (s *Sandboxes) get(id string) (*sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sb := s.byID[id]; sb != nil {
		return sb, nil
	}
	return nil, wrenn.Errorf(wrenn.KindNotFound, "this host has no sandbox %s", id)
}

// Get reports one sandbox.
func (s *Sandboxes) Get(id string) (*agentv1.Sandbox, error) {
	sb, err := s.get(id)
	if err != nil {
		return nil, err
	}
	return sb.report(), nil
}

// List is one consistent snapshot: while it is taken no state changes.
func (s *Sandboxes) List() ([]*agentv1.Sandbox, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*agentv1.Sandbox, 0, len(s.byID))
	for _, id := range slices.Sorted(maps.Keys(s.byID)) {
		out = append(out, s.byID[id].report())
	}
	return out, s.revision
}

// StateRevision counts state changes; it starts at the agent's start time, so it never repeats.
func (s *Sandboxes) StateRevision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

// Changed receives after state changes that nobody asked for.
func (s *Sandboxes) Changed() <-chan struct{} { return s.changed }

// transition makes a state change durable and visible: record first, then memory, as one step for List.
func (s *Sandboxes) transition(sb *sandbox, change func(*record)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := sb.update(func(r *record) {
		change(r)
		r.Revision++
	})
	if err == nil {
		s.revision++
	}
	return err
}

// Create makes a sandbox and returns when its guest agent is ready. Repeating a create, also while it
// is in progress, gives the first one's result; a failed create leaves nothing.
func (s *Sandboxes) Create(ctx context.Context, req *agentv1.CreateSandboxRequest) (*agentv1.Sandbox, error) {
	if err := validateCreate(req); err != nil {
		return nil, err
	}
	for {
		sb := s.getOrAdd(req)
		err := s.createOnce(ctx, sb, req)
		if errors.Is(err, errForgotten) {
			continue // it was deleted, or its create failed, while this call waited
		}
		if err != nil {
			return nil, err
		}
		return sb.report(), nil
	}
}

// errForgotten says that a sandbox was removed from memory while an operation waited for its turn.
var errForgotten = errors.New("the sandbox was removed meanwhile")

func (s *Sandboxes) getOrAdd(req *agentv1.CreateSandboxRequest) *sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb := s.byID[req.Id]
	if sb == nil {
		sb = &sandbox{id: req.Id, dir: filepath.Join(s.dir, sandboxesDir, req.Id), rec: newRecord(req)}
		s.byID[req.Id] = sb
	}
	return sb
}

func (s *Sandboxes) createOnce(ctx context.Context, sb *sandbox, req *agentv1.CreateSandboxRequest) error {
	return sb.do(ctx, req.OperationId, func(ctx context.Context) error {
		if sb.forgotten() {
			return errForgotten
		}
		rec := sb.snapshot()
		switch {
		case rec.OperationID != req.OperationId || (rec.State != wrenn.SandboxCreating && rec.State != wrenn.SandboxRunning):
			return wrenn.Errorf(wrenn.KindAlreadyExists, "a sandbox %s exists on this host", req.Id)
		case rec.State == wrenn.SandboxRunning:
			return nil
		}
		err := s.create(ctx, sb)
		if err != nil {
			s.drop(sb)
		}
		return err
	})
}

func newRecord(req *agentv1.CreateSandboxRequest) record {
	r := record{
		Version: recordVersion, ID: req.Id, State: wrenn.SandboxCreating, Revision: 1, OperationID: req.OperationId,
		Template: req.Template, VCPUs: int(req.Vcpus), MemoryMB: int(req.MemoryMb), DiskMB: int(req.DiskMb),
		Env: req.Env, User: req.User, Hostname: req.Hostname, AccessToken: guest.NewToken(),
		CreatedAt: time.Now().UTC(), Slot: -1,
	}
	if r.Hostname == "" {
		r.Hostname = strings.TrimPrefix(req.Id, wrenn.PrefixSandbox+"-")
	}
	return r
}

// create does the work of Create; the sandbox is in byID as creating.
func (s *Sandboxes) create(ctx context.Context, sb *sandbox) (err error) {
	defer func() { err = diskFull(err) }()
	rec := sb.snapshot()
	img, err := s.images.find(rec.Template)
	if err != nil {
		return err
	}
	if rec.DiskMB != 0 && rec.DiskMB < img.DiskMB() {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "disk_mb is %d, but template %q needs at least %d", rec.DiskMB, img.Name, img.DiskMB()).
			With("field", "disk_mb")
	}
	if err := s.store.NeedSpace(int64(rec.MemoryMB) << 20); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	if err := os.Mkdir(sb.dir, 0o711); err != nil {
		return fmt.Errorf("make the sandbox's directory: %w", err)
	}
	u.Push(func() error { return s.discard(sb.dir) })
	if err := sb.update(func(r *record) {
		r.DiskMB = max(rec.DiskMB, img.DiskMB())
		r.TemplateDigest = img.Digest
		if r.User == "" {
			r.User = img.DefaultUser
		}
	}); err != nil {
		return err
	}
	if err := s.cloneDisk(ctx, sb, img); err != nil {
		return err
	}
	if err := s.start(ctx, sb, &u); err != nil {
		return err
	}
	return s.transition(sb, func(r *record) { r.State = wrenn.SandboxRunning })
}

func (s *Sandboxes) cloneDisk(ctx context.Context, sb *sandbox, img image) error {
	ctx, cancel := context.WithTimeout(ctx, importTimeout)
	defer cancel()
	src, err := s.images.open(ctx, img)
	if err != nil {
		return fmt.Errorf("import image %s: %w", img.Name, err)
	}
	if err := s.store.Clone(ctx, src, sb.path(diskFile)); err != nil {
		return fmt.Errorf("clone image %s: %w", img.Name, err)
	}
	return s.store.Resize(sb.path(diskFile), int64(sb.snapshot().DiskMB)<<20)
}

// start boots the sandbox's VM from its disk and waits for its guest agent. Undo steps are pushed for
// all that it takes.
func (s *Sandboxes) start(ctx context.Context, sb *sandbox, u *undo.Stack) error {
	slot, err := s.net.Acquire(ctx)
	if err != nil {
		return err
	}
	u.Push(func() error { s.net.Release(slot); return nil })
	if err := sb.update(func(r *record) { r.Slot, r.Cold = slot.Index, true }); err != nil {
		return err
	}
	cfg, err := s.vmConfig(sb, slot)
	if err != nil {
		return err
	}
	handle, err := s.driver.Start(ctx, cfg)
	if err != nil {
		return err
	}
	u.Push(func() error { return s.driver.Destroy(context.WithoutCancel(ctx), handle) })
	if err := sb.update(func(r *record) { r.VM = &handle; r.StartedAt = handle.StartedAt.UTC() }); err != nil {
		return err
	}
	s.attach(sb, slot, handle)
	u.Push(func() error { s.detach(sb); return nil })
	sb.mu.Lock()
	client, gone := sb.guest, sb.gone
	sb.mu.Unlock()
	if err := client.WaitReady(ctx, gone); err != nil {
		return err
	}
	return s.identify(ctx, sb, client)
}

// identify makes the guest itself: token, clock, entropy, names.
func (s *Sandboxes) identify(ctx context.Context, sb *sandbox, client *guest.Client) error {
	rec := sb.snapshot()
	id := guest.Identity{
		Token: rec.AccessToken, Hostname: rec.Hostname, MachineID: guest.NewMachineID(), Env: rec.Env, DefaultUser: rec.User,
	}
	if s.egress != network.EgressNone {
		id.Nameservers = []string{network.GatewayIP}
	}
	return client.Init(ctx, "", id)
}

func (s *Sandboxes) vmConfig(sb *sandbox, slot *network.Slot) (vm.Config, error) {
	rec := sb.snapshot()
	dir := sb.path(vmDir)
	if err := os.RemoveAll(dir); err != nil {
		return vm.Config{}, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return vm.Config{}, err
	}
	cmdline := fmt.Sprintf("root=/dev/vda rootfstype=ext4 rw init=/usr/local/bin/envd quiet panic=-1 wrenn.addr=%s/%d wrenn.gw=%s",
		network.GuestIP, network.GuestPrefix, network.GatewayIP)
	if s.egress != network.EgressNone {
		cmdline += " wrenn.dns=" + network.GatewayIP
	}
	return vm.Config{
		ID: rec.ID, Dir: dir, VCPUs: rec.VCPUs, MemoryMB: rec.MemoryMB, Kernel: s.kernel, Initrd: s.initrd, Cmdline: cmdline,
		Disks: []vm.Disk{{Path: sb.path(diskFile)}}, MemoryFile: sb.path(memoryFile), Console: sb.path(consoleLog),
		Net: vm.Net{NetnsPath: slot.NetnsPath, TAP: slot.TAP, MAC: network.GuestMAC},
		UID: slot.UID, GID: slot.UID, Cgroup: rec.ID,
	}, nil
}

// attach makes a VM that runs the sandbox's, and watches for its end.
func (s *Sandboxes) attach(sb *sandbox, slot *network.Slot, handle vm.Handle) {
	gone := make(chan struct{})
	sb.mu.Lock()
	sb.slot, sb.gone = slot, gone
	sb.guest = guest.New(network.GuestIP, slot.DialContext)
	sb.mu.Unlock()
	go func() {
		if err := s.driver.Wait(context.Background(), handle); err != nil {
			s.log.Error("cannot watch a VM", "sandbox", sb.id, "err", err)
			return
		}
		close(gone)
		s.ended(sb, gone)
	}()
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
	err := sb.do(context.Background(), wrenn.NewID(wrenn.PrefixOperation), func(ctx context.Context) error {
		sb.mu.Lock()
		current := sb.gone == gone && !sb.forget && sb.rec.State == wrenn.SandboxRunning
		slot, handle := sb.slot, sb.rec.VM
		sb.mu.Unlock()
		if !current {
			return nil // the end was ours: destroyed, deleted or paused
		}
		if err := s.driver.Destroy(ctx, *handle); err != nil {
			return err
		}
		s.detach(sb)
		s.net.Release(slot)
		return s.lost(sb)
	})
	if err != nil {
		s.log.Error("cannot settle a VM that ended", "sandbox", sb.id, "err", err)
		return
	}
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// lost records that a running sandbox has no VM any more.
func (s *Sandboxes) lost(sb *sandbox) error {
	s.log.Warn("the virtual machine of a sandbox ended by itself", "sandbox", sb.id)
	return s.transition(sb, func(r *record) {
		r.State, r.VM, r.Slot, r.HasMemory = wrenn.SandboxPaused, nil, -1, false
		r.Reason = "its virtual machine ended by itself (powered off, or its host restarted); the disk is kept"
	})
}

// Delete removes a sandbox and all that belongs to it. Deleting what is not there succeeds.
func (s *Sandboxes) Delete(ctx context.Context, id, opID string) error {
	sb, err := s.get(id)
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return nil
	}
	return sb.do(ctx, opID, func(ctx context.Context) error {
		if sb.forgotten() {
			return nil
		}
		return s.delete(ctx, sb, opID)
	})
}

func (s *Sandboxes) delete(ctx context.Context, sb *sandbox, opID string) error {
	if sb.snapshot().State != wrenn.SandboxDeleting {
		if err := s.transition(sb, func(r *record) { r.State, r.OperationID = wrenn.SandboxDeleting, opID }); err != nil {
			return err
		}
	}
	if err := s.teardown(ctx, sb); err != nil {
		return err
	}
	if err := s.discard(sb.dir); err != nil {
		return err
	}
	s.drop(sb)
	return nil
}

// teardown ends the VM and gives the slot back.
func (s *Sandboxes) teardown(ctx context.Context, sb *sandbox) error {
	rec := sb.snapshot()
	if rec.VM != nil {
		if err := s.driver.Destroy(ctx, *rec.VM); err != nil {
			return fmt.Errorf("end the VM of %s: %w", rec.ID, err)
		}
	}
	sb.mu.Lock()
	slot := sb.slot
	sb.mu.Unlock()
	s.detach(sb)
	if slot != nil {
		s.net.Release(slot)
	}
	return nil
}

// drop removes a sandbox from memory.
func (s *Sandboxes) drop(sb *sandbox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.forget = true
	if s.byID[sb.id] == sb {
		delete(s.byID, sb.id)
		s.revision++
	}
}

// discard removes a directory in two steps: after the rename it is no sandbox any more, and a removal
// that was interrupted is finished at the next start.
func (s *Sandboxes) discard(dir string) error {
	trash := filepath.Join(s.dir, trashDir, fmt.Sprintf("%s.%d", filepath.Base(dir), time.Now().UnixNano()))
	if err := os.Rename(dir, trash); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

func validateCreate(req *agentv1.CreateSandboxRequest) error {
	bad := func(field, format string, args ...any) error {
		return wrenn.Errorf(wrenn.KindInvalidRequest, field+" "+format, args...).With("field", field)
	}
	switch {
	case !wrenn.ValidID(wrenn.PrefixSandbox, req.Id):
		return bad("id", "is not a sandbox id")
	case req.OperationId == "" || len(req.OperationId) > 128:
		return bad("operation_id", "must have 1 to 128 characters")
	case !imageName.MatchString(req.Template):
		return bad("template", "is not a template name")
	case req.Vcpus < 1 || req.Vcpus > wrenn.MaxVCPUs:
		return bad("vcpus", "must be from 1 to %d", wrenn.MaxVCPUs)
	case req.MemoryMb < wrenn.MinMemoryMB || req.MemoryMb > wrenn.MaxMemoryMB:
		return bad("memory_mb", "must be from %d to %d", wrenn.MinMemoryMB, wrenn.MaxMemoryMB)
	case req.DiskMb != 0 && (req.DiskMb < wrenn.MinDiskMB || req.DiskMb > wrenn.MaxDiskMB):
		return bad("disk_mb", "must be from %d to %d", wrenn.MinDiskMB, wrenn.MaxDiskMB)
	}
	return nil
}

func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
