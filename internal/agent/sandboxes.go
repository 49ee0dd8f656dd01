package agent

import (
	"cmp"
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

	snapshots string // where SaveSnapshot puts moments; on the file system of dir

	// faults, if not nil, is called at named points of operations; tests make them fail there.
	faults func(sandboxID, point string) error

	life      context.Context // ends when this agent gives the host up; nothing is watched any more
	watchers  sync.WaitGroup  // of VMs
	templates templates
	saving    saves
	warm      *warmPool

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

// transition writes a state change and makes it visible: record first, then memory, as one step for List.
func (s *Sandboxes) transition(sb *sandbox, keep lasting, change func(*record)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := sb.update(keep, func(r *record) {
		change(r)
		r.Revision++
	})
	if err == nil {
		s.revision++
	}
	return err
}

// fault is a point at which a test may make an operation on sb fail, stop or lose its VM.
func (s *Sandboxes) fault(sb *sandbox, point string) error {
	if s.faults == nil {
		return nil
	}
	return s.faults(sb.id, point)
}

// needSpace refuses new work when the disk could not take it: a clone's memory is written to disk as the
// guest changes it, and a page that finds no room would cost its VM its life. So the whole memory of
// every running sandbox counts as taken.
func (s *Sandboxes) needSpace(memoryMB int) error {
	s.mu.Lock()
	total := memoryMB
	for _, sb := range s.byID {
		if rec := sb.snapshot(); rec.State == wrenn.SandboxRunning {
			total += rec.MemoryMB
		}
	}
	s.mu.Unlock()
	return s.store.NeedSpace(int64(total) << 20)
}

// Create makes a sandbox and returns when its guest agent is ready. Repeating a create, also while it
// is in progress, gives the first one's result; a failed create leaves nothing.
func (s *Sandboxes) Create(ctx context.Context, req *agentv1.CreateSandboxRequest) (*agentv1.Sandbox, error) {
	return s.createFrom(ctx, req, func(ctx context.Context, rec record) (origin, error) { return s.origin(ctx, rec, req.Source) })
}

func (s *Sandboxes) createFrom(ctx context.Context, req *agentv1.CreateSandboxRequest, from findOrigin) (*agentv1.Sandbox, error) {
	if err := validateCreate(req); err != nil {
		return nil, err
	}
	for {
		sb := s.getOrAdd(req)
		err := s.createOnce(ctx, sb, req, from)
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

func (s *Sandboxes) createOnce(ctx context.Context, sb *sandbox, req *agentv1.CreateSandboxRequest, from findOrigin) error {
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
		err := s.create(ctx, sb, from)
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
		Env: req.Env, User: req.User, Hostname: req.Hostname, MachineID: guest.NewMachineID(),
		CreatedAt: time.Now().UTC(), Slot: -1,
	}
	if r.Hostname == "" {
		r.Hostname = strings.TrimPrefix(req.Id, wrenn.PrefixSandbox+"-")
	}
	return r
}

// create does the work of Create; the sandbox is in byID as creating.
func (s *Sandboxes) create(ctx context.Context, sb *sandbox, find findOrigin) (err error) {
	defer func() { err = diskFull(err) }()
	rec := sb.snapshot()
	if err := s.needSpace(rec.MemoryMB); err != nil {
		return err
	}
	from, err := find(ctx, rec)
	if err != nil {
		return err
	}
	if rec.DiskMB != 0 && rec.DiskMB < from.diskMB {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "disk_mb is %d, but template %q needs at least %d", rec.DiskMB, rec.Template, from.diskMB).
			With("field", "disk_mb")
	}
	var u undo.Stack
	defer u.Run(&err)
	if err := os.Mkdir(sb.dir, 0o711); err != nil {
		return fmt.Errorf("make the sandbox's directory: %w", err)
	}
	u.Push(func() error { return s.discard(sb.dir) })
	if err := sb.update(forGood, func(r *record) {
		r.DiskMB = max(rec.DiskMB, from.diskMB)
		r.TemplateDigest, r.Cold, r.Parent = from.digest, from.cold, from.parent
		r.User = cmp.Or(r.User, from.user)
	}); err != nil {
		return err
	}
	if err := s.begin(ctx, sb, from, &u); err != nil {
		return err
	}
	return s.transition(sb, forGood, (*record).toRunning)
}

// begin gives a new sandbox its first VM: one that is ready, or a clone that is started now.
func (s *Sandboxes) begin(ctx context.Context, sb *sandbox, from origin, u *undo.Stack) error {
	defer s.warm.begin(s.warm.afterCreate(from.machine))()
	if v := s.takeReady(ctx, from, sb.snapshot()); v != nil {
		err := s.claim(ctx, sb, v)
		if err == nil {
			u.Push(func() error { return s.teardown(context.WithoutCancel(ctx), sb) })
			return nil
		}
		s.log.Warn("a virtual machine that was kept ready was of no use", "sandbox", sb.id, "err", err)
	}
	m := sb.machine()
	if err := os.Mkdir(m.dir(), 0o711); err != nil {
		return err
	}
	if err := s.store.Clone(ctx, from.machine.disk(), m.disk()); err != nil {
		return fmt.Errorf("clone the disk of %s: %w", sb.snapshot().Template, err)
	}
	if err := s.fault(sb, "create.cloned"); err != nil {
		return err
	}
	if from.diskOnly { // as from a machine without memory
		from.machine, from.shared = m, false
	}
	return s.launch(ctx, sb, from.machine, from.shared, u)
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

func (s *Sandboxes) delete(ctx context.Context, sb *sandbox, opID string) (err error) {
	defer func() { err = diskFull(err) }()
	if sb.snapshot().State != wrenn.SandboxDeleting {
		if err := s.transition(sb, forGood, func(r *record) { r.State, r.OperationID = wrenn.SandboxDeleting, opID }); err != nil {
			return err
		}
	}
	if err := s.fault(sb, "delete.begun"); err != nil {
		return err
	}
	if err := s.teardown(ctx, sb); err != nil {
		return err
	}
	if err := s.fault(sb, "delete.ended"); err != nil {
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

// discard removes a directory, if it is there, in two steps: after the rename it is no sandbox any more, and a removal
// that was interrupted is finished at the next start.
func (s *Sandboxes) discard(dir string) error {
	trash := filepath.Join(s.dir, trashDir, fmt.Sprintf("%s.%d", filepath.Base(dir), time.Now().UnixNano()))
	if err := os.Rename(dir, trash); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := storage.Sync(filepath.Dir(dir)); err != nil {
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
