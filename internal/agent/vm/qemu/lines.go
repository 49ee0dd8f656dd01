//go:build linux

package qemu

import (
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// keepLine is how long a connection to a VM's monitor is kept for what comes next: what is done to a VM comes in
// twos and threes, and to connect takes as long as to do it.
const keepLine = time.Second

// lines are the connections to monitors, one a VM at most: QEMU lets others wait.
type lines struct {
	mu sync.Mutex
	of map[vmproc.Process]*line
}

type line struct {
	users int      // who has taken it, or waits for QEMU to take another
	idle  *monitor // nil while in use
}

// take gives the connection that is kept, or nil for the caller to make one. Either way put follows.
func (l *lines) take(p vmproc.Process) *monitor {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of == nil {
		l.of = map[vmproc.Process]*line{}
	}
	this := l.of[p]
	if this == nil {
		this = &line{}
		l.of[p] = this
	}
	this.users++
	m := this.idle
	this.idle = nil
	return m
}

// put ends a use. m, which may be nil, is kept for a while unless somebody waits for QEMU.
func (l *lines) put(p vmproc.Process, m *monitor, good bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	this := l.of[p]
	this.users--
	if this.users == 0 && m != nil && good {
		this.idle = m
		time.AfterFunc(keepLine, func() { l.drop(p, m) })
		return
	}
	if m != nil {
		m.close()
	}
	if this.users == 0 {
		delete(l.of, p)
	}
}

// drop closes a connection that nobody has taken since.
func (l *lines) drop(p vmproc.Process, m *monitor) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if this := l.of[p]; this != nil && this.idle == m {
		m.close()
		delete(l.of, p)
	}
}
