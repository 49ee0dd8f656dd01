package process

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// follow sends a process's events to one stream until `end`, or until the client goes away. A stream
// that is silent gets keepalives. If the deadline of ctx is the time limit of the process, the stream
// goes on past it: the process is killed, and its last output and `end` still follow.
func follow(ctx context.Context, p *Proc, r *reader, limits bool, interval time.Duration, send func(*processpb.ProcessEvent) error) error {
	defer r.detach()
	if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{Start: &processpb.ProcessEvent_StartEvent{Pid: uint32(p.pid)}}}); err != nil {
		return err
	}
	beat := time.NewTicker(interval)
	defer beat.Stop()
	gone := ctx.Done()
	for {
		select {
		case data, ok := <-r.ch:
			if !ok {
				return finish(p, r.last(), send)
			}
			if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: data}}); err != nil {
				return err
			}
			beat.Reset(interval)
		case <-beat.C:
			if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Keepalive{Keepalive: &processpb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
		case <-gone:
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) || !limits {
				return ctx.Err()
			}
			gone = nil
		}
	}
}

// finish sends `end`; a process that its time limit killed ends the stream with that error too.
func finish(p *Proc, end *processpb.ProcessEvent_EndEvent, send func(*processpb.ProcessEvent) error) error {
	if err := send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: end}}); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timedOut {
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the time limit of the command is over; it was killed"))
	}
	return nil
}
