package agent

import (
	"context"
	"sync"
	"time"
)

// activity knows when a sandbox was last used. What is open now (streams, transfers, proxied requests)
// keeps it awake; the agent's own polling never passes through here.
type activity struct {
	mu    sync.Mutex
	open  map[*time.Time]bool // by when it began
	last  time.Time
	ended chan struct{} // closed when something ends; nil if nobody waits for that
}

// begin notes that something was opened; the returned function notes its end.
func (a *activity) begin() (end func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = time.Now()
	began := a.last
	if a.open == nil {
		a.open = map[*time.Time]bool{}
	}
	a.open[&began] = true
	return sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.open, &began)
		a.last = time.Now()
		if a.ended != nil {
			close(a.ended)
			a.ended = nil
		}
	})
}

// youngLimit is how long a request may take that a pause waits for. Mostly one that takes longer is a stream.
const youngLimit = time.Second

// drain waits for what was opened last: it came before a pause, so it was not told to wait for its end, and
// mostly it is over at once. What is open for longer is not waited for.
func (a *activity) drain(ctx context.Context) {
	for {
		a.mu.Lock()
		var left time.Duration
		for began := range a.open {
			left = max(left, youngLimit-time.Since(*began))
		}
		if left > 0 && a.ended == nil {
			a.ended = make(chan struct{})
		}
		ended := a.ended
		a.mu.Unlock()
		if left <= 0 {
			return
		}
		timer := time.NewTimer(left)
		select {
		case <-ended:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// Ping counts as a use of a running sandbox.
func (s *Sandboxes) Ping(id string) error {
	sb, err := s.get(id)
	if err != nil {
		return err
	}
	if _, _, err := sb.running(); err != nil {
		return err
	}
	sb.activity.begin()()
	return nil
}

// state tells whether something is open and when the last use was: now, if something is open.
func (a *activity) state() (open bool, last time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.open) > 0 {
		return true, time.Now()
	}
	return false, a.last
}
