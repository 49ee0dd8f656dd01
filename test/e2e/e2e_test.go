// Package e2e tests Wrenn from outside: through the public API, in real virtual machines. One stack is
// started for the package; every test makes its own sandboxes.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// credentials is how long the host's token and certificate are good: they are renewed while the tests run.
func credentials() time.Duration { return vmtest.Stretch(45 * time.Second) }

// shared is the package's stack; nil with a reason where it cannot run.
type shared struct {
	stack  *stack.Stack
	reason string
}

var env shared

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	in, err := stack.FindInputs()
	if err != nil {
		env.reason = err.Error()
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "wrenn-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Stretch(3*time.Minute))
	defer cancel()
	s, err := stack.Start(ctx, in, dir, "CP_HOST_CREDENTIALS="+credentials().String())
	if err != nil {
		fmt.Fprintln(os.Stderr, err, s.Logs())
		return 1
	}
	env.stack = s
	code := m.Run()
	if code != 0 {
		fmt.Fprintln(os.Stderr, s.Logs())
	}
	if err := s.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// start gives a test the stack and a context, or skips it.
func start(t *testing.T) (context.Context, *stack.Stack) {
	t.Helper()
	if env.stack == nil {
		t.Skip(env.reason)
	}
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(4*time.Minute))
	t.Cleanup(cancel)
	return ctx, env.stack
}

// sandbox makes a sandbox that goes with the test.
func sandbox(ctx context.Context, t *testing.T, s *stack.Stack, o wrenn.SandboxOptions) *wrenn.Sandbox {
	t.Helper()
	sb, err := s.Client.CreateSandbox(ctx, o)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), vmtest.Stretch(time.Minute))
		defer cancel()
		if _, err := sb.Delete(ctx); err != nil && !wrenn.IsNotFound(err) {
			t.Errorf("delete %s: %v", sb.ID, err)
		}
	})
	return sb
}

func shell(ctx context.Context, t *testing.T, sb *wrenn.Sandbox, script string) string {
	t.Helper()
	res, err := sb.Shell(ctx, script)
	if err != nil {
		t.Fatalf("exec %q: %v", script, err)
	}
	if res.ExitCode != 0 {
		t.Fatalf("exec %q: exit %d: %s", script, res.ExitCode, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

func TestCodeRunsInAVirtualMachineOfItsOwn(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	if got := shell(ctx, t, sb, "id -un; id -u; pwd"); got != "user\n1000\n/home/user" {
		t.Errorf("default user is %q", got)
	}
	const bootID = "/proc/sys/kernel/random/boot_id"
	host, err := os.ReadFile(bootID)
	if err != nil {
		t.Fatal(err)
	}
	if got := shell(ctx, t, sb, "cat "+bootID); got == strings.TrimSpace(string(host)) {
		t.Error("the code runs in the host's kernel")
	}
	if got := shell(ctx, t, sb, "sudo id -u"); got != "0" {
		t.Errorf("sudo id -u: %q", got)
	}
}

func TestTwoSandboxesAreNotTwins(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	a := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	b := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	for _, what := range []string{
		"head -c 16 /dev/urandom | od -An -tx1", "cat /proc/sys/kernel/random/uuid", "cat /etc/machine-id", "hostname",
	} {
		if x, y := shell(ctx, t, a, what), shell(ctx, t, b, what); x == y || x == "" {
			t.Errorf("%s: %q and %q", what, x, y)
		}
	}
	checkClock(ctx, t, "a create", b)
}

// calmCommand is how long a command takes at most where clocks can be held against the bound.
const calmCommand = 150 * time.Millisecond

// checkClock sees that a guest's clock is within 50 ms of the host's, as far as the time that it takes to ask tells.
func checkClock(ctx context.Context, t *testing.T, way string, sb *wrenn.Sandbox) {
	t.Helper()
	var clock int64
	before := time.Now()
	if _, err := fmt.Sscan(shell(ctx, t, sb, "date +%s%3N"), &clock); err != nil {
		t.Fatal(err)
	}
	after, at := time.Now(), time.UnixMilli(clock)
	tolerance := vmtest.Stretch(50 * time.Millisecond)
	if !at.Before(before.Add(-tolerance)) && !at.After(after.Add(tolerance)) {
		return
	}
	tell := t.Errorf
	if after.Sub(before) > vmtest.Stretch(calmCommand) { // a guest of an overloaded host hears the time late
		tell = t.Logf
	}
	tell("%s: the guest said %v; it was asked at %v and answered at %v", way, at, before, after)
}

func TestExitCodeOutputAndTimeLimit(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	res, err := sb.Shell(ctx, "echo out; echo err >&2; exit 7")
	if err != nil || res.ExitCode != 7 || string(res.Stdout) != "out\n" || string(res.Stderr) != "err\n" {
		t.Errorf("got %+v, %v", res, err)
	}
	res, err = sb.ExecWith(ctx, wrenn.ExecOptions{Cmd: "echo before; sleep 100 & sleep 100", Shell: true, Timeout: 2 * time.Second})
	if err != nil || !res.TimedOut || res.ExitCode != -1 || string(res.Stdout) != "before\n" {
		t.Errorf("time limit: got %+v, %v", res, err)
	}
	if got := shell(ctx, t, sb, "pgrep -c sleep || true"); got != "0" {
		t.Errorf("%s sleeps outlived their time limit", got)
	}
	_, err = sb.Exec(ctx, "no-such-program")
	if wrenn.CodeOf(err) == "" || wrenn.CodeOf(err) == wrenn.CodeInternal {
		t.Errorf("a missing program: %v", err)
	}
}

func TestDeletedSandboxIsGone(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	if done, err := sb.Delete(ctx); err != nil || !done {
		t.Fatal(done, err)
	}
	_, err := s.Client.GetSandbox(ctx, sb.ID)
	var api *wrenn.APIError
	if !errors.As(err, &api) || api.Status != 404 {
		t.Errorf("after delete: %v", err)
	}
}

func TestPauseKeepsProcessesAndFiles(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	shell(ctx, t, sb, "echo kept > note; sleep 1000 > /dev/null 2>&1 & echo $! > pid")
	if err := sb.Pause(ctx, true); err != nil || sb.Status != "paused" {
		t.Fatalf("pause: %v, %s", err, sb.Status)
	}
	if _, err := sb.Shell(ctx, "true"); wrenn.CodeOf(err) != wrenn.CodeInvalidState {
		t.Errorf("exec in a paused sandbox: %v", err)
	}
	if err := sb.Resume(ctx); err != nil || sb.Status != "running" {
		t.Fatalf("resume: %v, %s", err, sb.Status)
	}
	if got := shell(ctx, t, sb, "cat note; kill -0 $(cat pid) && echo alive"); got != "kept\nalive" {
		t.Errorf("after a pause with memory: %q", got)
	}
	if err := sb.Pause(ctx, false); err != nil {
		t.Fatal(err)
	}
	if err := sb.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if got := shell(ctx, t, sb, "cat note; kill -0 $(cat pid) 2>/dev/null || echo rebooted"); got != "kept\nrebooted" {
		t.Errorf("after a pause of the disk alone: %q", got)
	}
	shell(ctx, t, sb, "sleep 1000 > /dev/null 2>&1 & echo $! > pid; sync")
	if err := errors.Join(sb.Pause(ctx, true), sb.ResumeWith(ctx, wrenn.ResumeOptions{DiskOnly: true})); err != nil {
		t.Fatal(err)
	}
	if got := shell(ctx, t, sb, "cat note; kill -0 $(cat pid) 2>/dev/null || echo rebooted"); got != "kept\nrebooted" {
		t.Errorf("after a resume that gave the memory up: %q", got)
	}
}

func TestIdleSandboxesArePausedOrKilled(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	pause := sandbox(ctx, t, s, wrenn.SandboxOptions{TimeoutSec: 3})
	kill := sandbox(ctx, t, s, wrenn.SandboxOptions{TimeoutSec: 3, OnTimeout: "kill"})
	busy := sandbox(ctx, t, s, wrenn.SandboxOptions{TimeoutSec: 3, OnTimeout: "kill"})
	if _, err := busy.Background(ctx, wrenn.ExecOptions{Cmd: "sleep", Args: []string{"1000"}}); err != nil {
		t.Fatal(err)
	}
	err := stack.Eventually(ctx, vmtest.Stretch(time.Minute), func() error {
		if err := pause.Refresh(ctx); err != nil {
			return err
		}
		if pause.Status != "paused" {
			return fmt.Errorf("the idle sandbox is %s", pause.Status)
		}
		if err := kill.Refresh(ctx); !wrenn.IsNotFound(err) {
			return fmt.Errorf("the sandbox that was to be killed is %s (%w)", kill.Status, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := busy.Refresh(ctx); err != nil || busy.Status != "running" {
		t.Errorf("a sandbox with a running command: %v, %s", err, busy.Status)
	}
}
