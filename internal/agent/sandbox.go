package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// sandbox is one sandbox of this host, in memory. The record is the truth; the rest is what belongs to
// the VM that runs now.
type sandbox struct {
	id       string
	dir      string
	activity activity
	// remembers says that the guest of the VM that is being launched was this sandbox before, and knows its
	// names; it belongs to the operation in progress.
	remembers bool

	mu     sync.Mutex // guards what follows; never held during a side effect
	rec    record
	op     *operation // in progress, or nil
	slot   *network.Slot
	forks  map[string]*operation // under way, by id; they are beside op, which only saves their moment
	before *network.Slot         // of the VM that a rollback under way may go back to
	guest  *guest.Client
	gone   chan struct{} // closed when the VM that runs now has ended
	forget bool          // deleted: whoever still holds a pointer must not act
}

// operation is one change of a sandbox; there is at most one at a time.
type operation struct {
	id       string
	progress *progress
	done     chan struct{} // closed when its result is known
	err      error
	after    func(ctx context.Context) // what is left to do then
	over     chan struct{}             // closed when nothing is left, and another may begin
}

func newOperation(id string) *operation {
	return &operation{id: id, progress: &progress{}, done: make(chan struct{}), over: make(chan struct{})}
}

// progressOf gives the progress of the operation with this id, if it is under way, and what tells its end.
func (sb *sandbox) progressOf(opID string) (*progress, <-chan struct{}) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	op := sb.op
	if op == nil || op.id != opID {
		if op = sb.forks[opID]; op == nil {
			return nil, nil
		}
	}
	return op.progress, op.done
}

// operationTimeout bounds any one operation, whether or not its caller still waits.
const operationTimeout = 3 * time.Minute

// do runs fn as the sandbox's only operation. If the operation with this id is in progress, its result
// is awaited instead; another one, and what it left for afterwards, is waited for first. The operation goes on
// when the caller's context ends: a caller that went away cancels nothing half-way.
func (sb *sandbox) do(ctx context.Context, opID string, fn func(ctx context.Context) error) error {
	for {
		sb.mu.Lock()
		current := sb.op
		if current == nil {
			op := newOperation(opID)
			sb.op = op
			sb.mu.Unlock()
			doing := context.WithoutCancel(ctx)
			if progressOf(ctx) == nil { // else it is a part of what has one
				doing = withProgress(doing, op.progress)
			}
			go sb.perform(doing, op, fn)
			return op.wait(ctx)
		}
		sb.mu.Unlock()
		if current.id == opID {
			return current.wait(ctx)
		}
		select {
		case <-current.over:
		case <-ctx.Done():
			return gaveUp(ctx)
		}
	}
}

func (sb *sandbox) perform(ctx context.Context, op *operation, fn func(ctx context.Context) error) {
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	op.err = fn(ctx)
	close(op.done)
	if op.err == nil && op.after != nil {
		op.after(ctx)
	}
	sb.mu.Lock()
	sb.op = nil
	sb.mu.Unlock()
	close(op.over)
}

// afterwards leaves work of the operation in progress for when its caller has been answered, unless it fails.
// It is still that operation's: no other begins before.
func (sb *sandbox) afterwards(fn func(ctx context.Context)) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.op.after = fn
}

func (op *operation) wait(ctx context.Context) error {
	select {
	case <-op.done:
		return op.err
	case <-ctx.Done():
		return gaveUp(ctx)
	}
}

func gaveUp(ctx context.Context) error {
	return wrenn.Wrap(ctx.Err(), wrenn.KindHostUnavailable, "the caller gave up waiting; the operation goes on")
}

// update changes the record and writes it before anyone can see it. A sandbox that is being created
// is nothing yet: a crash removes it, by its directory that has no record.
func (sb *sandbox) update(keep lasting, change func(*record)) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	next := sb.rec
	change(&next)
	if _, last := sb.activity.state(); last.After(next.LastActiveAt) {
		next.LastActiveAt = last
	}
	if next.State != wrenn.SandboxCreating {
		if err := next.save(sb.dir, keep); err != nil {
			return fmt.Errorf("save the record of %s: %w", sb.id, err)
		}
	}
	sb.rec = next
	return nil
}

// snapshot is a copy of the record.
func (sb *sandbox) snapshot() record {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.rec
}

// machine is the sandbox's virtual machine, running or at rest.
func (sb *sandbox) machine() machine { return machine(filepath.Join(sb.dir, machineDir)) }

// console is the log of its serial console.
func (sb *sandbox) console() string { return filepath.Join(sb.dir, consoleLog) }

// running gives the guest's client and token, or says why there is none.
func (sb *sandbox) running() (*guest.Client, string, error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.rec.State != wrenn.SandboxRunning || sb.guest == nil {
		return nil, "", wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not running", sb.rec.State).
			With("state", string(sb.rec.State))
	}
	return sb.guest, sb.rec.AccessToken, nil
}

// forgotten tells whether the sandbox was removed from memory; nobody may act on it any more.
func (sb *sandbox) forgotten() bool {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.forget
}

var protoState = map[wrenn.SandboxState]agentv1.SandboxState{
	wrenn.SandboxCreating: agentv1.SandboxState_SANDBOX_STATE_CREATING,
	wrenn.SandboxRunning:  agentv1.SandboxState_SANDBOX_STATE_RUNNING,
	wrenn.SandboxPausing:  agentv1.SandboxState_SANDBOX_STATE_PAUSING,
	wrenn.SandboxPaused:   agentv1.SandboxState_SANDBOX_STATE_PAUSED,
	wrenn.SandboxResuming: agentv1.SandboxState_SANDBOX_STATE_RESUMING,
	wrenn.SandboxDeleting: agentv1.SandboxState_SANDBOX_STATE_DELETING,
}

// report is the sandbox as the control plane sees it.
func (sb *sandbox) report() *agentv1.Sandbox {
	open, last := sb.activity.state()
	sb.mu.Lock()
	defer sb.mu.Unlock()
	r := &sb.rec
	if r.LastActiveAt.After(last) {
		last = r.LastActiveAt
	}
	var needs *needs
	if r.State == wrenn.SandboxPaused {
		needs = r.Needs
	}
	return &agentv1.Sandbox{
		Id: r.ID, State: protoState[r.State], Revision: r.Revision, OperationId: r.OperationID, Reason: r.Reason,
		Template: r.Template, Vcpus: uint32(r.VCPUs), MemoryMb: uint64(r.MemoryMB), DiskMb: uint64(r.DiskMB),
		CreatedAt: timestamp(r.CreatedAt), StartedAt: timestamp(r.StartedAt), LastActiveAt: timestamp(last),
		Active: open, HasMemory: r.HasMemory, AccessToken: r.AccessToken, Cold: r.Cold,
		DurableAt: timestamp(r.DurableAt), Needs: needs.report(),
	}
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// diskFull turns ENOSPC anywhere in err's chain into the kind that users are told.
func diskFull(err error) error {
	var public *wrenn.Error
	if err == nil || errors.As(err, &public) || !isNoSpace(err) {
		return err
	}
	return wrenn.Wrap(err, wrenn.KindDiskFull, "the host's disk is full; delete sandboxes or use another host")
}
