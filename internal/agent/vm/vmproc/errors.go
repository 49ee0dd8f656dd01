//go:build linux

package vmproc

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Talk has a VMM spoken to over its control socket, and turns what goes wrong into the errors of a vm.Driver. refused
// tells the VMM's own answer that it will not from a VMM that does not answer.
func (p *Process) Talk(ctx context.Context, refused func(error) bool, talk func() error) error {
	alive, err := p.Alive()
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot look for the VM")
	}
	if !alive {
		return gone(nil)
	}
	if err = talk(); err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var public *wrenn.Error
	if errors.As(err, &public) {
		return err
	}
	if alive, aliveErr := p.Alive(); aliveErr == nil && !alive {
		return gone(err)
	}
	if refused(err) {
		return wrenn.Wrap(err, wrenn.KindInvalidState, "the VM's state does not allow this; delete it and start it again if it persists")
	}
	return wrenn.Wrap(err, wrenn.KindInternal, "the hypervisor does not answer; the host may be overloaded")
}

func gone(cause error) error {
	return wrenn.Wrap(cause, wrenn.KindNotFound, "the VM is gone")
}

// StartError turns a failed start into what may be shown; what the programs said is part of the cause.
func StartError(ctx context.Context, err error, words ...*os.File) error {
	var public *wrenn.Error
	if errors.As(err, &public) {
		return err
	}
	for _, f := range words {
		if said := LastWords(f); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return wrenn.Wrap(err, wrenn.KindInternal, "the VM did not start; see the agent's log, and `wrenn-agent doctor`")
}

// Undo ends what a failed start came to: process and cgroup, each of which may be nil, and the memory file that it
// made, if memory names one.
func Undo(p *Process, c *Cgroup, memory string) error {
	var errs []error
	if p != nil {
		errs = append(errs, p.Kill(context.Background()), p.Reap())
	}
	if c != nil {
		errs = append(errs, c.Remove())
	}
	if memory != "" {
		errs = append(errs, os.Remove(memory))
	}
	return errors.Join(errs...)
}
