package wrenn

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// ExecOptions describe a command whose output is wanted as a whole. Start streams instead.
type ExecOptions struct {
	Cmd  string
	Args []string
	// Shell runs Cmd by `/bin/bash -lc`; Args are then $0, $1, …
	Shell bool
	Env   map[string]string
	Cwd   string
	// User is the sandbox's default user if empty.
	User string
	// Timeout kills the command with all it started; 0 means no limit. Whole seconds.
	Timeout time.Duration
	// Stdin is the standard input, as text.
	Stdin string
}

// ExecResult is how a command ended. A command that failed is not an error of the call.
type ExecResult struct {
	// Stdout and Stderr hold the first 16 MiB of each stream.
	Stdout, Stderr                   []byte
	StdoutTruncated, StderrTruncated bool
	// ExitCode is 128 + n if signal n ended the command, -1 if it ran out of time.
	ExitCode int
	TimedOut bool
	Signal   string
	Duration time.Duration
}

// Exec runs a program with arguments and waits for it.
func (s *Sandbox) Exec(ctx context.Context, cmd string, args ...string) (*ExecResult, error) {
	return s.ExecWith(ctx, ExecOptions{Cmd: cmd, Args: args})
}

// Shell runs a bash script and waits for it.
func (s *Sandbox) Shell(ctx context.Context, script string) (*ExecResult, error) {
	return s.ExecWith(ctx, ExecOptions{Cmd: script, Shell: true})
}

// ExecWith runs a command and waits for it. If ctx ends first, the command goes on.
func (s *Sandbox) ExecWith(ctx context.Context, o ExecOptions) (*ExecResult, error) {
	var r api.ExecResult
	if _, err := s.client.do(ctx, call{method: http.MethodPost, path: s.path("/exec"), body: o.request(false), out: &r}); err != nil {
		return nil, err
	}
	out := &ExecResult{StdoutTruncated: r.StdoutTruncated, StderrTruncated: r.StderrTruncated, ExitCode: int(r.ExitCode),
		TimedOut: r.TimedOut, Signal: r.Signal, Duration: time.Duration(r.DurationMS) * time.Millisecond}
	var err error
	if out.Stdout, err = output(r.Stdout, r.Encoding); err != nil {
		return nil, err
	}
	out.Stderr, err = output(r.Stderr, r.Encoding)
	return out, err
}

// Background starts a command and gives its pid as soon as it runs. Attach and Signal work on it.
func (s *Sandbox) Background(ctx context.Context, o ExecOptions) (pid int, err error) {
	var p api.BackgroundProcess
	_, err = s.client.do(ctx, call{method: http.MethodPost, path: s.path("/exec"), body: o.request(true), out: &p})
	return int(p.PID), err
}

func (o ExecOptions) request(background bool) api.ExecRequest {
	return api.ExecRequest{Cmd: o.Cmd, Args: o.Args, Shell: o.Shell, Env: o.Env, Cwd: o.Cwd, User: o.User,
		TimeoutSec: seconds(o.Timeout), Stdin: o.Stdin, Background: background}
}

// seconds rounds up: a limit under a second must not become none.
func seconds(d time.Duration) int32 { return int32((d + time.Second - 1) / time.Second) }

func output(text string, enc api.ExecResultEncoding) ([]byte, error) {
	if enc != api.ExecResultEncodingBase64 {
		return []byte(text), nil
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("wrenn: the server sent output that is not base64: %w", err)
	}
	return raw, nil
}

// Processes lists the processes that were started through the API and run.
func (s *Sandbox) Processes(ctx context.Context) ([]api.Process, error) {
	var l api.ProcessList
	_, err := s.client.do(ctx, call{method: http.MethodGet, path: s.path("/processes"), out: &l})
	return l.Processes, err
}

// Signal sends a signal, named with or without SIG, to a process.
func (s *Sandbox) Signal(ctx context.Context, pid int, signal string) error {
	_, err := s.client.do(ctx, call{method: http.MethodPost, path: s.path("/processes/" + strconv.Itoa(pid) + "/signal"),
		body: api.SignalRequest{Signal: signal}})
	return err
}
