package agent

import (
	"sync"
	"time"
)

// activity knows when a sandbox was last used. What is open now (streams, transfers, proxied requests)
// keeps it awake; the agent's own polling never passes through here.
type activity struct {
	mu   sync.Mutex
	open int
	last time.Time
}

// begin notes that something was opened; the returned function notes its end.
func (a *activity) begin() (end func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open++
	a.last = time.Now()
	return sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.open--
		a.last = time.Now()
	})
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
	if a.open > 0 {
		return true, time.Now()
	}
	return false, a.last
}
