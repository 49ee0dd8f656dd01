package stack

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
)

// RestartAgent kills the agent and starts it again; its virtual machines go on.
func (s *Stack) RestartAgent(ctx context.Context) error {
	if err := s.Agent.Kill(); err != nil {
		return err
	}
	return s.StartAgent(ctx)
}

// RestartControlPlane kills wrenn-cp and starts it again.
func (s *Stack) RestartControlPlane(ctx context.Context) error {
	if err := s.ControlPlane.Kill(); err != nil {
		return err
	}
	return s.StartControlPlane(ctx)
}

// RestartPostgres kills PostgreSQL and starts it again on its data.
func (s *Stack) RestartPostgres(ctx context.Context) (err error) {
	return s.restart(ctx, &s.Postgres, "postgres", localstack.StartPostgres)
}

// RestartRedis kills Redis and starts it again.
func (s *Stack) RestartRedis(ctx context.Context) (err error) {
	return s.restart(ctx, &s.Redis, "redis", localstack.StartRedis)
}

func (s *Stack) restart(ctx context.Context, server **localstack.Server, name string, start func(context.Context, localstack.Options) (*localstack.Server, error)) error {
	if err := syscall.Kill((*server).PID, syscall.SIGKILL); err != nil {
		return err
	}
	return Eventually(ctx, 30*time.Second, func() error {
		again, err := start(ctx, localstack.Options{Dir: filepath.Join(s.Dir, name), Ephemeral: true})
		if err != nil {
			return err
		}
		if again.PID == (*server).PID {
			return fmt.Errorf("%s has not ended yet", name)
		}
		*server = again
		return nil
	})
}

// Eventually asks until check succeeds; its last error is the result when time is up.
func Eventually(ctx context.Context, limit time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return ask(ctx, nil, check)
}

// ask repeats check until it succeeds, ctx ends or stop is closed; its last error is the result then. Where there is one slow
// processor it leaves most of it to what it waits for.
func ask(ctx context.Context, stop <-chan struct{}, check func() error) error {
	const every, rest = 20 * time.Millisecond, 4 // times as long as a check takes
	for {
		begun := time.Now()
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-stop:
			return err
		case <-time.After(max(every, rest*time.Since(begun))):
		}
	}
}

// CheckIdle tells what is left on the host when no sandbox should be: sandbox directories, and VMM
// processes other than those of the machines that the agent keeps ready, which have a directory each.
// Warm network slots are the agent's to keep.
func (s *Stack) CheckIdle() error {
	left, err := filepath.Glob(filepath.Join(s.Dir, "sandboxes", "sandboxes", "*"))
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("sandboxes left on disk: %v", left)
	}
	ready, err := filepath.Glob(filepath.Join(s.Dir, "sandboxes", "warm", "*"))
	if err != nil {
		return err
	}
	n, err := s.VMMs()
	if err == nil && n != len(ready) {
		err = fmt.Errorf("%d VMMs run, but %d are kept ready", n, len(ready))
	}
	return err
}

// VMMs counts the processes that run under this agent's uids: its virtual machines.
func (s *Stack) VMMs() (int, error) {
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, p := range procs {
		info, err := os.Stat(p) // a process that ended meanwhile is not one
		if err != nil {
			continue
		}
		if uid := int(info.Sys().(*syscall.Stat_t).Uid); uid >= s.baseUID && uid < s.baseUID+uidRange {
			n++
		}
	}
	return n, nil
}
