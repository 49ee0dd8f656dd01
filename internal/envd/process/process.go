// Package process runs commands in the guest and carries their input and output: the service
// process.Process. It owns the table of running processes; who may call, and with which token, was
// decided before a call comes here.
//
// # Output
//
// Every attached reader gets all output in order, and the slowest reader sets the pace: a process whose
// reader does not read blocks on its pipe, as it would on a terminal. Memory per reader is bounded by
// readerQueue chunks of chunkSize bytes. A process that nobody is attached to never blocks: its output
// is read and dropped. Who attaches later gets what is printed from then on.
//
// # End
//
// `end` follows all output of the process. When a child that it left behind still holds the pipes, the
// stream does not wait for that child: everything the process itself had written is delivered, what comes
// within endGrace of its exit too, then `end`. The child lives on.
//
// # Ending a process
//
// A time limit (Connect-Timeout-Ms of Start) and SIGKILL end the process with all it started. Other
// signals go to its process group, as from a terminal. A client that goes away ends nothing.
package process

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

const (
	chunkSize   = 32 << 10
	readerQueue = 8
	// endGrace is how long after the exit of a process its pipes may stay open in other hands before
	// `end` is sent all the same.
	endGrace = 100 * time.Millisecond
)

// Proc is one process from its start until its `end`.
type Proc struct {
	config *processpb.ProcessConfig
	tag    *string
	pid    int
	seq    uint64 // order of starts

	os    *os.Process
	group *cgroup.Group
	out   *fanout
	in    *input
	tty   *os.File // master side, nil without a terminal

	limit *time.Timer // nil without a time limit

	mu       sync.Mutex
	exited   bool // waited for: the pid may belong to somebody else
	timedOut bool
}

// info is what List tells.
func (p *Proc) info() *processpb.ProcessInfo {
	return &processpb.ProcessInfo{Config: p.config, Pid: uint32(p.pid), Tag: p.tag}
}

// signal sends sig; SIGKILL to everything the process started, others to its process group.
func (p *Proc) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return unix.ESRCH
	}
	if sig == unix.SIGKILL {
		return p.killTree()
	}
	if err := unix.Kill(-p.pid, sig); err == nil {
		return nil
	}
	return unix.Kill(p.pid, sig) // the group is gone if the process moved itself
}

// killTree ends the process and all its descendants; p.mu is held and the process not waited for.
func (p *Proc) killTree() error {
	if p.group.Kill() {
		return nil
	}
	// The leader first, or it would see its children die and go on. Its session keeps its number.
	err := unix.Kill(p.pid, unix.SIGKILL)
	killSession(p.pid)
	return err
}

// expire is called when the time limit is over.
func (p *Proc) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return
	}
	p.timedOut = true
	_ = p.killTree() // it is there: it was not waited for
}

// setLimit ends the process with all it started when d is over.
func (p *Proc) setLimit(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.exited {
		p.limit = time.AfterFunc(max(d, 0), p.expire)
	}
}

// wait collects the process and its output, has it forgotten, and sends `end`.
func (p *Proc) wait(pumps []*pump, forget func()) {
	// The pid stays ours until it is waited for, so nobody else's process can be signalled.
	for unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	state, err := p.os.Wait()
	p.exited = true
	timedOut := p.timedOut
	if p.limit != nil {
		p.limit.Stop()
	}
	p.mu.Unlock()
	for _, pm := range pumps {
		pm.exited()
	}
	for _, pm := range pumps {
		<-pm.done
	}
	p.in.close()
	if p.tty != nil {
		p.tty.Close()
	}
	p.group.Release()
	forget()
	p.out.finish(endEvent(state, err, timedOut))
}

func endEvent(state *os.ProcessState, err error, timedOut bool) *processpb.ProcessEvent_EndEvent {
	end := &processpb.ProcessEvent_EndEvent{ExitCode: -1}
	if err != nil {
		msg := "the process could not be waited for"
		end.Status, end.Error = "unknown", &msg
		return end
	}
	end.ExitCode, end.Exited, end.Status = int32(state.ExitCode()), state.Exited(), state.String()
	if timedOut {
		msg := "the time limit of the command is over; it was killed with everything it started"
		end.Error = &msg
	} else if !state.Success() {
		msg := state.String()
		end.Error = &msg
	}
	return end
}
