package network

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// use is what an index is taken for.
//
//	found ──Adopt──► held ──Release──► leaving ──► (free)
//	  └────Sweep───────────────────────► ▲
//	(free) ──► making ──► warm ──Acquire──► held
//	(free) ──Acquire──► acquiring ────────► held
type use int

const (
	found     use = iota // on the host since before Open, of a VM that may still run
	making               // being made, to be warm
	acquiring            // being made, for somebody who waits
	warm                 // ready, held by nobody
	held                 // acquired or adopted
	leaving              // being removed
)

const (
	retryFirst = time.Second
	retryMost  = 30 * time.Second
)

// Pool hands out slots. Its methods may be called from several goroutines.
type Pool struct {
	opts      Options
	addresses netip.Prefix // of the veth pairs, with egress

	mu      sync.Mutex
	uses    map[int]use
	ready   []*Slot // the warm ones
	slots   map[int]*Slot
	closed  bool
	wake    chan struct{}
	stop    context.CancelFunc
	workers sync.WaitGroup
}

// Open makes the pool ready and starts to make warm slots in the background. Namespaces of an earlier
// agent of the same Name stay untouched until they are adopted or swept.
func Open(ctx context.Context, opts Options) (*Pool, error) {
	opts, err := opts.normal()
	if err != nil {
		return nil, err
	}
	p := &Pool{opts: opts, uses: map[int]use{}, slots: map[int]*Slot{}, wake: make(chan struct{}, 1)}
	indexes, err := onHost(opts.Name)
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot list network namespaces in %s", netnsDir)
	}
	for _, i := range indexes {
		p.uses[i] = found
	}
	if opts.Egress == EgressInternet {
		if err := p.ensureHost(func(rules string) error { return applyRules(ctx, rules) }); err != nil {
			return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot set up NAT for sandboxes; install nftables, or set AGENT_EGRESS=none")
		}
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	p.workers.Go(func() { p.fill(background) })
	return p, nil
}

// fill keeps the warm slots made.
func (p *Pool) fill(ctx context.Context) {
	retry := retryFirst
	for {
		index, ok := p.reserveWarm()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-p.wake:
				continue
			}
		}
		s, err := p.make(ctx, index)
		p.made(index, s, warm)
		if err == nil {
			retry = retryFirst
			continue
		}
		if ctx.Err() != nil {
			return
		}
		p.opts.Log.Error("cannot make a network slot ahead", "err", err, "retry_in", retry)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry):
			retry = min(2*retry, retryMost)
		}
	}
}

// reserveWarm takes an index if a warm slot is wanted.
func (p *Pool) reserveWarm() (int, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle, busy := p.count(warm)+p.count(making), p.count(held)+p.count(acquiring)
	if p.closed || idle >= p.opts.Warm || idle+busy >= p.opts.Slots {
		return 0, false
	}
	return p.reserve(making)
}

// reserve takes the lowest free index.
func (p *Pool) reserve(as use) (int, bool) {
	for i := range maxSlots {
		if _, taken := p.uses[i]; !taken {
			p.uses[i] = as
			return i, true
		}
	}
	return 0, false
}

func (p *Pool) count(which use) (n int) {
	for _, u := range p.uses {
		if u == which {
			n++
		}
	}
	return n
}

// made notes what became of an index that was being made; a nil slot is a failure.
func (p *Pool) made(index int, s *Slot, as use) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s == nil {
		delete(p.uses, index)
		return
	}
	p.uses[index], p.slots[index] = as, s
	if as == warm {
		p.ready = append(p.ready, s)
	}
}

// wakeFill makes fill look again.
func (p *Pool) wakeFill() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Acquire takes a slot, a warm one if there is any. With all Slots in use it fails at once with
// KindNoCapacity.
func (p *Pool) Acquire(ctx context.Context) (*Slot, error) {
	s, index, err := p.take()
	if err != nil || s != nil {
		p.wakeFill()
		return s, err
	}
	s, err = p.make(ctx, index)
	p.made(index, s, held)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot make a network for the sandbox; see `wrenn-agent doctor`")
	}
	return s, nil
}

// take takes a warm slot, or an index to make one at.
func (p *Pool) take() (*Slot, int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, 0, wrenn.Errorf(wrenn.KindHostUnavailable, "the agent is stopping; try again")
	}
	if n := len(p.ready); n > 0 {
		s := p.ready[n-1]
		p.ready = p.ready[:n-1]
		p.uses[s.Index] = held
		return s, 0, nil
	}
	if p.count(held)+p.count(acquiring) < p.opts.Slots {
		if index, ok := p.reserve(acquiring); ok {
			return nil, index, nil
		}
	}
	return nil, 0, wrenn.Errorf(wrenn.KindNoCapacity, "all %d network slots of this host are in use; delete sandboxes or add hosts", p.opts.Slots)
}

// Adopt takes the slot of a VM that survived an earlier agent, and applies today's rules to it.
// KindNotFound: it is not there (any more).
func (p *Pool) Adopt(index int) (*Slot, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u, ok := p.uses[index]; !ok || u != found {
		if ok && u == held {
			return nil, wrenn.Errorf(wrenn.KindInUse, "network slot %d is in use already", index)
		}
		return nil, wrenn.Errorf(wrenn.KindNotFound, "network slot %d is not on this host", index)
	}
	s := &Slot{Index: index, NetnsPath: netnsPath(p.opts.Name, index), TAP: tapName, UID: p.opts.BaseUID + index}
	uplink, err := s.check()
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, wrenn.Wrap(err, wrenn.KindNotFound, "network slot %d is not on this host", index)
	}
	if err == nil {
		err = netns.Do(s.NetnsPath, func() error {
			return applyRules(context.Background(), renderSlotRules(uplink && p.opts.Egress == EgressInternet))
		})
	}
	if err == nil {
		err = p.serveNames(s)
	}
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot take over network slot %d", index)
	}
	p.uses[index], p.slots[index] = held, s
	return s, nil
}

// Release gives a slot back. It is removed, in the background, and never used again: nothing of one VM
// reaches the next.
func (p *Pool) Release(s *Slot) {
	p.mu.Lock()
	if p.slots[s.Index] != s || p.uses[s.Index] != held {
		p.mu.Unlock()
		return
	}
	p.uses[s.Index] = leaving
	if !p.closed {
		p.workers.Go(func() { p.drop(s) })
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.drop(s)
}

// drop removes a slot whose use is leaving. One that cannot be removed is left for the next Sweep.
func (p *Pool) drop(s *Slot) {
	err := p.remove(s)
	if err != nil {
		p.opts.Log.Error("cannot remove a network slot", "slot", s.Index, "err", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.slots, s.Index)
	delete(p.uses, s.Index)
	if err != nil {
		p.uses[s.Index] = found
	}
	p.wakeFill()
}

// Close stops the background work and removes the warm slots. Acquired slots stay as they are, besides
// that their guests' names are no longer resolved until the next agent adopts them.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	idle := p.ready
	p.ready = nil
	p.mu.Unlock()
	p.stop()
	p.workers.Wait()
	p.mu.Lock()
	idle = append(idle, p.ready...)
	p.ready = nil
	for _, s := range p.slots {
		if s.dns != nil {
			s.dns.close()
		}
	}
	p.mu.Unlock()
	for _, s := range idle {
		if err := p.remove(s); err != nil {
			p.opts.Log.Error("cannot remove a network slot", "slot", s.Index, "err", err)
		}
	}
}
