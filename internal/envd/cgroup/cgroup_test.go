package cgroup

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tree makes a tree in a group of the test's own in the host's cgroup v2 file system.
func tree(t *testing.T) *Tree {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir, err := os.MkdirTemp(root, "envd-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() {
			for _, sub := range []string{"wrenn/user/*", "wrenn/pty/*", "wrenn/*", "*", ""} {
				found, _ := filepath.Glob(filepath.Join(dir, sub))
				for _, d := range found {
					_ = unix.Rmdir(d) // files are refused, and go with their directory
				}
			}
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is left over", dir)
			}
		})
		tr, err := Open(dir, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	t.Skip("needs root: a cgroup v2 file system to write in")
	return nil
}

// sleeper runs in g, with a child that left its session.
func sleeper(t *testing.T, g *Group) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "setsid sleep 300 & exec sleep 300")
	fd, ok := g.FD()
	if !ok {
		t.Fatal("the group has no descriptor")
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Kill(); _ = cmd.Wait() })
	return cmd
}

func members(t *testing.T, g *Group) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(g.path, "cgroup.procs"))
	if err != nil {
		return 0
	}
	return len(bytes.Fields(raw))
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}

func TestKillReachesWhatLeftTheSession(t *testing.T) {
	t.Parallel()
	tr := tree(t)
	g, err := tr.New(User)
	if err != nil {
		t.Fatal(err)
	}
	cmd := sleeper(t, g)
	eventually(t, "both processes run", func() bool { return members(t, g) >= 2 })
	if !g.Kill() {
		t.Skip("needs cgroup.kill (Linux 5.14)")
	}
	_ = cmd.Wait()
	eventually(t, "nothing runs in the group", func() bool { return members(t, g) == 0 })
	g.Release()
}

func TestReleasedGroupGoesWhenItsLastProcessEnds(t *testing.T) {
	t.Parallel()
	tr := tree(t)
	g, err := tr.New(PTY)
	if err != nil {
		t.Fatal(err)
	}
	cmd := sleeper(t, g)
	g.Release()
	if _, err := os.Stat(g.path); err != nil {
		t.Fatal("a group with processes was removed")
	}
	if !g.Kill() {
		t.Skip("needs cgroup.kill (Linux 5.14)")
	}
	_ = cmd.Wait()
	eventually(t, "the group is removed with a later one's making", func() bool {
		next, err := tr.New(User)
		if err != nil {
			t.Fatal(err)
		}
		next.Release()
		_, err = os.Stat(g.path)
		return errors.Is(err, os.ErrNotExist)
	})
}

func TestFreezeStopsAndThawContinues(t *testing.T) {
	t.Parallel()
	tr := tree(t)
	g, err := tr.New(User)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Release()
	cmd := exec.Command("/bin/sh", "-c", "while :; do :; done")
	fd, _ := g.FD()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { g.Kill(); _ = cmd.Wait() }()
	res, err := tr.Freeze(context.Background(), Legacy, 0, 5*time.Second)
	if err != nil || res.Requested != 2 || res.Frozen != 2 || res.NotFrozen != 0 || res.Visited != 2 {
		t.Fatalf("%+v %v", res, err)
	}
	used := cpuTicks(t, cmd.Process.Pid)
	if res, err := tr.Freeze(context.Background(), Hierarchy, 1, 0); err != nil || res.Visited != 1 || res.Frozen != 0 {
		t.Errorf("a second freeze: %+v %v", res, err)
	}
	if now := cpuTicks(t, cmd.Process.Pid); now != used {
		t.Errorf("it ran on while frozen: %d ticks", now-used)
	}
	if err := tr.Thaw(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it runs again", func() bool { return cpuTicks(t, cmd.Process.Pid) > used })
}

// A group that somebody else froze is left to them.
func TestThawLeavesForeignFreezes(t *testing.T) {
	t.Parallel()
	tr := tree(t)
	foreign := filepath.Join(filepath.Dir(tr.dir), "foreign")
	if err := os.Mkdir(foreign, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(foreign, "cgroup.freeze"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	res, err := tr.Freeze(context.Background(), Hierarchy, 0, time.Second)
	if err != nil || res.PreFrozen != 1 || res.Requested != 1 {
		t.Errorf("%+v %v", res, err)
	}
	if err := tr.Thaw(); err != nil {
		t.Fatal(err)
	}
	if frozen, err := readFlag(filepath.Join(foreign, "cgroup.freeze"), ""); err != nil || !frozen {
		t.Error("the foreign group was thawed")
	}
}

func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	n, err := strconv.Atoi(strings.Fields(rest)[11])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestWithoutATree(t *testing.T) {
	t.Parallel()
	var tr *Tree
	g, err := tr.New(User)
	if g != nil || err != nil || g.Kill() {
		t.Error("a group without a tree")
	}
	if _, ok := g.FD(); ok {
		t.Error("a descriptor without a group")
	}
	g.Release()
	if res, err := tr.Freeze(context.Background(), Legacy, 0, 0); err != nil || res.Unobservable != 1 {
		t.Errorf("%+v %v", res, err)
	}
	if err := tr.Thaw(); err != nil {
		t.Error(err)
	}
	if _, err := Open(t.TempDir(), 0); err == nil {
		t.Error("an ordinary directory was taken for a cgroup file system")
	}
}
