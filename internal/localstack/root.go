package localstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sort"
	"strings"
)

// rootRunner runs what needs root: directly if we are root, else by sudo.
type rootRunner struct{ sudo bool }

func newRootRunner() *rootRunner { return &rootRunner{sudo: os.Geteuid() != 0} }

// ready asks for sudo's password once, before any work is done.
func (r *rootRunner) ready(ctx context.Context) error {
	if !r.sudo {
		return nil
	}
	if _, err := exec.LookPath("sudo"); err != nil {
		return errors.New("the host agent needs root, and sudo is not installed: run this as root")
	}
	cmd := exec.CommandContext(ctx, "sudo", "-v", "-p", "The host agent needs root. Password of %u for sudo: ")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return errors.New("the host agent needs root, and sudo was refused: run this as root, or as a user who may use sudo")
	}
	return nil
}

// command is a command line that runs program as root with exactly the variables in env, PATH and HOME.
func (r *rootRunner) command(env map[string]string, program string, args ...string) []string {
	line := []string{"env", "-i", "PATH=" + rootPath, "HOME=/root"}
	keys := make([]string, 0, len(env))
	for k := range env {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		line = append(line, k+"="+env[k])
	}
	if r.sudo {
		line = append([]string{"sudo", "-n", "--"}, line...)
	}
	return append(append(line, program), args...)
}

// rootPath includes the sbin directories, which hold nft, losetup and mkfs.
const rootPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// run runs a program to its end and gives its output.
func (r *rootRunner) run(ctx context.Context, env map[string]string, program string, args ...string) (string, error) {
	line := r.command(env, program, args...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return out.String(), err
	}
	return out.String(), nil
}

// signal sends a signal, by its name, to a process that may be root's.
func (r *rootRunner) signal(ctx context.Context, pid int, name string) error {
	if out, err := r.run(ctx, nil, "kill", "-s", name, fmt.Sprint(pid)); err != nil {
		return fmt.Errorf("signalling process %d: %w: %s", pid, err, strings.TrimSpace(out))
	}
	return nil
}

// lastOf gives the last lines of a text.
func lastOf(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}
