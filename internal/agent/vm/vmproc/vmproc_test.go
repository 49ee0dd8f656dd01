//go:build linux

package vmproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == prisoner {
		lookAround()
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_, _ = Sweep(parent, func(string) bool { return false })
		os.Exit(code)
	}))
}

const parent = "wrenn-vmproctest"

// sleeper starts a process that does nothing, and ends it after the test.
func sleeper(t *testing.T, spec Spec) *Process {
	t.Helper()
	spec.Path = "/bin/sleep"
	spec.Args = []string{"60"}
	p, err := Launch(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		if err := p.Reap(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
	})
	return p
}

func needRoot(t *testing.T) *Hierarchy {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: uids and cgroups")
	}
	h, err := FindHierarchy()
	if err != nil {
		t.Skip(err.Error())
	}
	return h
}

func TestLaunchedProcessIsConfinedAndTheAgentIsNot(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	c := h.Cgroup(parent, "confined")
	if err := c.Ensure(Limits{MemoryBytes: 64 << 20, CPUs: 0.5, PIDs: 10}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(); err != nil {
			t.Error(err)
		}
	})
	weight := map[int]string{1: "cpu.shares 1024", 2: "cpu.weight 50"}[h.Version()]
	file, want, _ := strings.Cut(weight, " ")
	if got, err := os.ReadFile(filepath.Join(h.Cgroup(parent, "").Path("cpu"), file)); err != nil || strings.TrimSpace(string(got)) != want {
		t.Errorf("all VMs have %s %s, %v; want %s", file, got, err, want)
	}
	p := sleeper(t, Spec{UID: 700_900, GID: 700_901, Cgroup: c})
	if pids, err := c.PIDs(); err != nil || !slices.Equal(pids, []int{p.PID}) {
		t.Errorf("the cgroup holds %v, %v", pids, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t700900\t700900", "Gid:\t700901\t700901", "NoNewPrivs:\t1", "CapBnd:\t0000000000000000"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in the process's status", want)
		}
	}
	out, err := exec.Command("grep", "NoNewPrivs", "/proc/self/status").Output()
	if err != nil || strings.TrimSpace(string(out)) != "NoNewPrivs:\t0" {
		t.Errorf("children of the agent are confined, too: %q, %v", out, err)
	}
}

func TestManyLaunchesLeaveNoThreadBehind(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	c := h.Cgroup(parent, "many")
	if err := c.Ensure(Limits{MemoryBytes: 64 << 20, CPUs: 1, PIDs: 100}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(); err != nil { // refused while a thread of this process is in it
			t.Error(err)
		}
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			p, err := Launch(Spec{Path: "/bin/true", UID: 700_900, GID: 700_900, Cgroup: c})
			if err != nil {
				t.Error(err)
				return
			}
			if err := p.Wait(context.Background()); err != nil {
				t.Error(err)
			}
			if err := p.Reap(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestWaitKillAndAlive(t *testing.T) {
	t.Parallel()
	needRoot(t)
	p := sleeper(t, Spec{UID: 700_902, GID: 700_902})
	if alive, err := p.Alive(); err != nil || !alive {
		t.Fatalf("alive %v, %v", alive, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if alive, err := p.Alive(); err != nil || alive { // a zombie until it is reaped
		t.Errorf("killed, and alive %v, %v", alive, err)
	}
	if err := errors.Join(p.Wait(t.Context()), p.Kill(t.Context())); err != nil {
		t.Error(err)
	}
}

func TestAnotherProcessIsNotTakenForOurs(t *testing.T) {
	t.Parallel()
	me, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*Process{
		"started at another time": {PID: me.PID, StartTime: me.StartTime + 1, BootID: me.BootID},
		"of another boot":         {PID: me.PID, StartTime: me.StartTime, BootID: "x"},
		"no pid":                  {BootID: me.BootID},
		"every process":           {PID: -1, BootID: me.BootID},
		"a pid that is not there": {PID: 1 << 30, BootID: me.BootID},
	} {
		if alive, err := p.Alive(); err != nil || alive {
			t.Errorf("%s: alive %v, %v", name, alive, err)
		}
		if err := errors.Join(p.Kill(t.Context()), p.Wait(t.Context())); err != nil { // this test would not survive it
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLaunchThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	absent := h.Cgroup(parent, "absent")
	for name, spec := range map[string]Spec{
		"no program": {Path: "/nonexistent"},
		"no netns":   {Path: "/bin/true", NetnsPath: "/nonexistent"},
		"no cgroup":  {Path: "/bin/true", Cgroup: absent},
		"no device":  {Path: "/bin/true", Jail: &Jail{Dir: t.TempDir(), Devices: []string{"/nonexistent"}}},
		"no bind":    {Path: "/bin/true", Jail: &Jail{Dir: t.TempDir(), Binds: []Bind{{From: "/nonexistent", To: "/x"}}}},
	} {
		if p, err := Launch(spec); err == nil {
			t.Errorf("%s: started %d", name, p.PID)
		}
	}
}

func TestSweepEndsWhatIsNotKept(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	const own = "wrenn-vmprocsweep"
	var procs []*Process
	for _, name := range []string{"slot-1", "slot-2"} {
		c := h.Cgroup(own, name)
		if err := c.Ensure(Limits{MemoryBytes: 64 << 20, CPUs: 1, PIDs: 10}); err != nil {
			t.Fatal(err)
		}
		procs = append(procs, sleeper(t, Spec{UID: 700_904, GID: 700_904, Cgroup: c}))
	}
	if err := h.Cgroup(own, "slot-3").Ensure(Limits{MemoryBytes: 64 << 20, CPUs: 1, PIDs: 10}); err != nil {
		t.Fatal(err)
	}
	if n, err := Sweep(own, func(name string) bool { return name == "slot-1" }); n != 1 || err != nil {
		t.Errorf("ended %d, %v", n, err)
	}
	one, err1 := procs[0].Alive()
	two, err2 := procs[1].Alive()
	if err := errors.Join(err1, err2); err != nil || !one || two {
		t.Errorf("kept alive %v, other alive %v, %v", one, two, err)
	}
	if names, err := h.Children(own); err != nil || !slices.Equal(names, []string{"slot-1"}) {
		t.Errorf("cgroups left: %v, %v", names, err)
	}
	if n, err := Sweep(own, func(string) bool { return false }); n != 1 || err != nil {
		t.Errorf("ended %d, %v", n, err)
	}
	if _, err := os.Stat(h.Cgroup(own, "").Path("memory")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the parent is still there: %v", err)
	}
	if n, err := Sweep(own, func(string) bool { return false }); n != 0 || err != nil {
		t.Errorf("nothing to sweep: %d, %v", n, err)
	}
}

func TestBoundedFileDoesNotGrow(t *testing.T) {
	t.Parallel()
	f, err := BoundedFile("test", 100)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f, "last words\n"); err != nil {
		t.Fatal(err)
	}
	if got := LastWords(f); got != "last words" {
		t.Errorf("%q", got)
	}
	if n, err := f.Write(make([]byte, 1000)); err == nil {
		t.Errorf("wrote %d bytes to a file of 100", n)
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 100 {
		t.Errorf("size %d, %v", fi.Size(), err)
	}
}
