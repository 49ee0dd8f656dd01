//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// childEnv makes a test program an agent that starts one VM, tells its handle and waits to be killed.
const childEnv = "WRENN_VM_TEST_START"

// Child is that agent, if this program is one; it then never returns. It is to be called first in TestMain.
func Child(start func(spec []byte) (vm.Handle, error)) {
	spec := os.Getenv(childEnv)
	if spec == "" {
		return
	}
	h, err := start([]byte(spec))
	if err != nil {
		panic(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(h); err != nil {
		panic(err)
	}
	select {}
}

// OutlivesItsAgent has a VM started by another process, which is killed at once, and takes the VM over.
func (l *Lab) OutlivesItsAgent(t *testing.T, cfg vm.Config, spec any, driver func() vm.Driver) {
	t.Helper()
	h := startAndKill(t, spec)
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(time.Minute))
	defer cancel()
	d := driver()
	defer func() {
		if err := d.Destroy(context.WithoutCancel(ctx), h); err != nil {
			t.Error(err)
		}
		if left, err := l.Leftovers(cfg); err != nil || len(left) > 0 {
			t.Errorf("left over: %v %v", left, err)
		}
	}()
	if state, err := d.Inspect(ctx, h); err != nil || state != vm.StateRunning {
		t.Fatalf("after the agent's death the VM is %q, %v", state, err)
	}
	l.answers(ctx, t, cfg, "ping", "pong")
	waited := make(chan error, 1)
	go func() { waited <- d.Wait(ctx, h) }() // takes over the console, too
	for !strings.Contains(consoleOf(t, cfg), "end of flood") {
		if ctx.Err() != nil {
			t.Fatalf("after the agent's death the console is %q", consoleOf(t, cfg))
		}
		l.answers(ctx, t, cfg, "flood 1", "ok") // again: what is said before somebody listens is lost
		time.Sleep(10 * time.Millisecond)       // nothing tells when a file has grown
	}
	// Sweep spares what it is told to, and ends what it is not.
	if n, err := vmproc.Sweep(l.CgroupParent, func(name string) bool { return name == cfg.Cgroup }); n != 0 || err != nil {
		t.Fatalf("the sweep ended %d VMs, %v", n, err)
	}
	l.answers(ctx, t, cfg, "ping", "pong")
	if n, err := vmproc.Sweep(l.CgroupParent, func(string) bool { return false }); n != 1 || err != nil {
		t.Fatalf("the sweep ended %d VMs, %v", n, err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

func startAndKill(t *testing.T, spec any) vm.Handle {
	t.Helper()
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.CommandContext(t.Context(), os.Args[0])
	agent.Env = append(os.Environ(), childEnv+"="+string(raw))
	agent.Stderr = os.Stderr
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	var h vm.Handle
	err = json.NewDecoder(out).Decode(&h)
	_ = agent.Process.Kill()
	_ = agent.Wait()
	if err != nil {
		t.Fatalf("the agent started no VM: %v", err)
	}
	return h
}

func (l *Lab) answers(ctx context.Context, t *testing.T, cfg vm.Config, command, want string) {
	t.Helper()
	if answer, err := l.Ask(ctx, cfg, command); err != nil || answer != want {
		t.Errorf("%s: the guest says %q, %v", command, answer, err)
	}
}

func consoleOf(t *testing.T, cfg vm.Config) string {
	t.Helper()
	b, err := os.ReadFile(cfg.Console)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}
