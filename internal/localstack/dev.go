package localstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"

	wrennsdk "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// RunControlPlane starts PostgreSQL and Redis in the background and wrenn-cp in the caller's
// terminal, in place of one in the background, until ctx ends. For development.
func (s *Stack) RunControlPlane(ctx context.Context, out io.Writer) error {
	u, unlock, err := s.prepareDev(ctx, "wrenn-cp")
	if err != nil {
		return err
	}
	if u.secrets, err = u.loadSecrets(); err == nil {
		err = u.portForControlPlane(ctx)
	}
	unlock()
	if err != nil {
		return err
	}
	return foreground(ctx, out, append([]string{"env"}, append(u.controlPlaneEnv(), filepath.Join(s.config.Bin, "wrenn-cp"))...))
}

// RunAgent makes the admin, the key and the host if they are not there, and runs wrenn-agent as root in
// the caller's terminal until ctx ends. The control plane must run, by RunControlPlane or Up.
func (s *Stack) RunAgent(ctx context.Context, out io.Writer) error {
	u, unlock, err := s.prepareDev(ctx, "wrenn-agent")
	if err != nil {
		return err
	}
	line, err := u.devAgent(ctx)
	unlock()
	if err != nil {
		return err
	}
	return foreground(ctx, out, line)
}

func (u *bringUp) devAgent(ctx context.Context) (line []string, err error) {
	if u.secrets, err = u.loadSecrets(); err != nil {
		return nil, err
	}
	if u.client, err = wrennsdk.New(wrennsdk.WithURL(u.URL()), wrennsdk.WithAPIKey("")); err != nil {
		return nil, err
	}
	if _, err := u.client.Ready(ctx); err != nil {
		return nil, fmt.Errorf("the control plane is not ready (%w): run `make dev` in another terminal first", err)
	}
	if err := u.step("admin and API key", func() (string, error) { return u.account(ctx) }); err != nil {
		return nil, err
	}
	args, _, err := u.registration(ctx)
	if err != nil {
		return nil, err
	}
	return u.root.command(u.agentEnv(), filepath.Join(u.config.Bin, "wrenn-agent"), args...), nil
}

// prepareDev starts the databases and ends the named program in the background. The caller unlocks
// before it runs anything for long.
func (s *Stack) prepareDev(ctx context.Context, name string) (u *bringUp, unlock func(), err error) {
	if err := s.checkFiles(); err != nil {
		return nil, nil, err
	}
	if unlock, err = s.lock(); err != nil {
		return nil, nil, err
	}
	u = &bringUp{Stack: s}
	err = errors.Join(s.remember(), s.root.ready(ctx))
	if err == nil {
		err = s.step("PostgreSQL", func() (string, error) { return u.postgres(ctx) })
	}
	if err == nil {
		err = s.step("Redis", func() (string, error) { return u.redis(ctx) })
	}
	if err == nil {
		_, err = s.stopDaemon(ctx, name)
	}
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return u, unlock, nil
}

// foreground runs a program whose signals come from the terminal, as it does for us.
func foreground(ctx context.Context, out io.Writer, line []string) error {
	cmd := exec.CommandContext(context.WithoutCancel(ctx), line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("it ended: %w", err)
	}
	return nil
}
