package agent

import (
	"context"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Steps that operations tell they are at, in the words of api/openapi.yaml (Progress).
const (
	stepImporting  = "importing_image"
	stepBooting    = "booting"
	stepStopping   = "stopping_processes"
	stepMemory     = "saving_memory" // bytes: of the RAM gone through
	stepDisk       = "saving_disk"
	stepDurable    = "making_durable"
	stepStarting   = "starting_vm"
	stepGuest      = "waiting_for_guest"
	stepChildren   = "starting_children" // sandboxes: those that run
	unitBytes      = "bytes"
	unitSandboxes  = "sandboxes"
	progressPeriod = 250 * time.Millisecond // between two looks at an operation
)

// progress says where an operation is. Steps overwrite each other: it is for whoever looks now.
type progress struct {
	mu          sync.Mutex
	name, unit  string
	done, total int64
	of          *progress // what it waits for, if that is not its own doing
}

type progressKey struct{}

// withProgress has what is done under the context tell p its steps; nil for nobody.
func withProgress(ctx context.Context, p *progress) context.Context {
	return context.WithValue(ctx, progressKey{}, p)
}

func progressOf(ctx context.Context) *progress {
	p, _ := ctx.Value(progressKey{}).(*progress)
	return p
}

// step says that the operation of ctx is at this step now.
func step(ctx context.Context, name string) { progressOf(ctx).count(name, 0, 0, "") }

// bytesOf gives what counts the bytes of a step.
func bytesOf(ctx context.Context, name string) func(done, total int64) {
	p := progressOf(ctx)
	p.count(name, 0, 0, "") // not every driver counts
	return func(done, total int64) { p.count(name, done, total, unitBytes) }
}

// count sets the step, with how much of it is done; total is 0 if that is not known.
func (p *progress) count(name string, done, total int64, unit string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.name, p.done, p.total, p.unit = name, done, total, unit
}

// advance counts one more.
func (p *progress) advance() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
}

// follow has p be where another operation is, until the returned function is called.
func (p *progress) follow(other *progress) (stop func()) {
	if p == nil {
		return func() {}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of = other
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.of = nil
	}
}

// now is the step at this moment; nil before the first.
func (p *progress) now() *agentv1.Progress {
	p.mu.Lock()
	of := p.of
	now := &agentv1.Progress{Step: p.name, Done: uint64(p.done), Total: uint64(p.total), Unit: p.unit}
	p.mu.Unlock()
	if of != nil {
		return of.now()
	}
	if now.Step == "" {
		return nil
	}
	return now
}

// Progress tells where an operation on a sandbox is, whenever that has changed, at most four times a second,
// until the operation or ctx ends. An operation that is not under way has none.
func (s *Sandboxes) Progress(ctx context.Context, id, opID string, tell func(*agentv1.Progress) error) error {
	sb, err := s.get(id)
	if err != nil {
		return err
	}
	tick := time.NewTicker(progressPeriod)
	defer tick.Stop()
	var last *agentv1.Progress
	for {
		p, done := sb.progressOf(opID)
		if p == nil {
			return nil
		}
		if now := p.now(); now != nil && !same(now, last) {
			last = now
			if err := tell(now); err != nil {
				return err
			}
		}
		select {
		case <-done:
			return nil
		case <-s.life.Done():
			return wrenn.Errorf(wrenn.KindHostUnavailable, "the agent stops")
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func same(a, b *agentv1.Progress) bool {
	return b != nil && a.Step == b.Step && a.Done == b.Done && a.Total == b.Total
}
