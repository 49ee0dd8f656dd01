// Package cli tests the wrenn command as a user has it: `wrenn up` starts a whole stack once for the
// package, the scripts in testdata use it with real virtual machines, and `wrenn reset` must leave
// nothing behind.
package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/wrenn-sandbox/wrenn/internal/cli"
	"github.com/wrenn-sandbox/wrenn/internal/localstack"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"wrenn": func() {
			os.Exit(cli.Run(context.Background(), os.Args[1:], os.Getenv, cli.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
		},
	})
}

// wrenn runs the built program with a stack's settings.
type wrenn struct {
	home string
	env  []string
	bin  string
}

func (w *wrenn) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "wrenn"), args...)
	cmd.Env = w.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (w *wrenn) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.run(t, args...)
	if err != nil {
		t.Fatalf("wrenn %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// newWrenn prepares a stack of its own in a directory that only root can walk through: that is what
// a clone in root's home is like.
func newWrenn(t *testing.T) *wrenn {
	t.Helper()
	in, err := stack.FindInputs()
	if err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "wrenn-cli-") // 0700
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &wrenn{home: filepath.Join(dir, "state"), bin: in.Bin}
	w.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "WRENN_HOME=" + w.home, "AGENT_EGRESS=none", "AGENT_VOLUME_SIZE=20G",
		"AGENT_KERNEL_PATH=" + in.Kernel, "AGENT_IMAGES_PATH=" + in.Images,
		"WRENN_PORT=" + strconv.Itoa(freePort(t)), "WRENN_AGENT_PORT=" + strconv.Itoa(freePort(t))}
	t.Cleanup(func() {
		if out, err := w.run(t, "reset", "--yes"); err != nil {
			t.Errorf("wrenn reset: %v\n%s", err, out)
		}
		if left, err := os.ReadDir(w.home); err == nil && len(left) > 0 {
			t.Errorf("reset left %v", left)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(mounts), w.home) {
			t.Errorf("reset left a mount below %s (%v)", w.home, err)
		}
	})
	return w
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestWrenn is one test, so that the stack is started once and the life of the stack itself (up again,
// crashes, down) is tried with sandboxes in it after the scripts.
func TestWrenn(t *testing.T) {
	w := newWrenn(t)
	w.must(t, "up")
	env, err := localstack.ReadEnv(filepath.Join(w.home, "env"))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("scripts", func(t *testing.T) { scripts(t, w, env) })
	t.Run("files are private", func(t *testing.T) {
		for _, name := range []string{"env", "secrets", "postgres/password", "redis/password"} {
			info, err := os.Stat(filepath.Join(w.home, name))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: mode %v, %v; want 0600", name, info.Mode(), err)
			}
		}
	})
	t.Run("shell can source the env file", func(t *testing.T) {
		out, err := exec.Command("sh", "-c", `. "$1"; exec sh -c 'echo $WRENN_API_URL $WRENN_API_KEY'`, "sh", filepath.Join(w.home, "env")).Output()
		if want := env["WRENN_API_URL"] + " " + env["WRENN_API_KEY"] + "\n"; err != nil || string(out) != want {
			t.Errorf("got %q, %v; want %q", out, err, want)
		}
	})
	t.Run("crashes are mended", func(t *testing.T) { crashes(t, w) })
	t.Run("down keeps data", func(t *testing.T) { downKeepsData(t, w, env) })
}

func scripts(t *testing.T, w *wrenn, env map[string]string) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("TERM", "xterm")
			e.Setenv("STACK", w.home)
			e.Setenv("URL", env["WRENN_API_URL"])
			e.Setenv("KEY", env["WRENN_API_KEY"])
			e.Setenv("EMAIL", env["WRENN_ADMIN_EMAIL"])
			e.Setenv("PASSWORD", env["WRENN_ADMIN_PASSWORD"])
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// exits CODE COMMAND…: runs a command and checks its exit code; its output is for stdout and stderr.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// crashes kills each program the hard way; `wrenn up` must start it again, with a sandbox running on.
func crashes(t *testing.T, w *wrenn) {
	lines := strings.Fields(w.must(t, "sandbox", "create", "--name", "survivor"))
	id := lines[len(lines)-1] // behind what it says of its progress
	w.must(t, "sandbox", "exec", id, "sh", "-c", "echo kept > kept")
	boot := w.must(t, "sandbox", "exec", id, "cat", "/proc/sys/kernel/random/boot_id")
	for _, name := range []string{"postgres/pid", "redis/pid", "run/wrenn-cp.pid", "run/wrenn-agent.pid"} {
		pid := readPID(t, filepath.Join(w.home, name))
		kill(t, pid)
		if out, err := w.run(t, "status"); err == nil {
			t.Errorf("after the death of %s status says all is well:\n%s", name, out)
		}
		w.must(t, "up")
		w.must(t, "status")
		if got := w.must(t, "sandbox", "exec", id, "cat", "/proc/sys/kernel/random/boot_id"); got != boot {
			t.Errorf("after the death of %s the sandbox is another machine", name)
		}
	}
	out := w.must(t, "up")
	if strings.Contains(out, "started") {
		t.Errorf("a second up started something:\n%s", out)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	out, err = w.run(t, "up", "--port", strconv.Itoa(taken.Addr().(*net.TCPAddr).Port))
	if err == nil || !strings.Contains(out, "already in use") {
		t.Errorf("a used port: %v\n%s", err, out)
	}
	w.must(t, "status") // and what ran still runs
}

// kill ends a process the hard way and returns when it is dead, if not buried.
func kill(t *testing.T, pid string) {
	t.Helper()
	if err := exec.Command("kill", "-KILL", pid).Run(); err != nil {
		t.Fatal(err)
	}
	err := stack.Eventually(context.Background(), 10*time.Second, func() error {
		raw, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil || strings.Contains(string(raw), ") Z ") {
			return nil //nolint:nilerr // no such process: it is gone
		}
		return errors.New("still there: " + pid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func downKeepsData(t *testing.T, w *wrenn, env map[string]string) {
	w.must(t, "down")
	if out, err := w.run(t, "status"); err == nil {
		t.Errorf("after down status says all is well:\n%s", out)
	}
	if out := w.must(t, "down"); strings.Contains(out, "✗") {
		t.Errorf("a second down:\n%s", out)
	}
	w.must(t, "up")
	again, err := localstack.ReadEnv(filepath.Join(w.home, "env"))
	if err != nil || again["WRENN_API_KEY"] != env["WRENN_API_KEY"] {
		t.Errorf("the API key changed (%v)", err)
	}
	if out := w.must(t, "sandbox", "ls"); !strings.Contains(out, "survivor") {
		t.Errorf("the sandbox is gone:\n%s", out)
	}
}

func readPID(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), `"pid":`)
	pid, _, _ := strings.Cut(rest, ",")
	return pid
}
