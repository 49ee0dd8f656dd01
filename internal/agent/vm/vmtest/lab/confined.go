//go:build linux

package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// Confined looks at a running VMM from outside: what no VMM may have, whatever its driver.
func (l *Lab) Confined(t *testing.T, cfg vm.Config, h vm.Handle) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", h.PID)
	status := statusOf(t, proc)
	uid := strconv.Itoa(cfg.UID)
	for field, want := range map[string]string{
		"Uid": strings.Repeat(uid+"\t", 3) + uid, "Gid": strings.Repeat(uid+"\t", 3) + uid, "Groups": "",
		"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapAmb": "0000000000000000",
	} {
		if status[field] != want {
			t.Errorf("%s is %q, want %q", field, status[field], want)
		}
	}
	if sid, err := unix.Getsid(h.PID); err != nil || sid != h.PID {
		t.Errorf("session %d, %v; want its own", sid, err)
	}
	var ns, slot unix.Stat_t
	if err := unix.Stat(proc+"ns/net", &ns); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(cfg.Net.NetnsPath, &slot); err != nil || ns.Ino != slot.Ino {
		t.Errorf("network namespace %d, want %d, %v", ns.Ino, slot.Ino, err)
	}
	for _, which := range []string{"pid", "mnt", "ipc"} {
		var own unix.Stat_t
		if err := errors.Join(unix.Stat(proc+"ns/"+which, &ns), unix.Stat("/proc/self/ns/"+which, &own)); err != nil || ns.Ino == own.Ino {
			t.Errorf("%s namespace is the host's, %v", which, err)
		}
	}
	for _, secret := range []string{"/etc/passwd", "/root", "/tmp", "/var", "/sys", "/usr/bin/env", "/proc/sys", cfg.Dir} {
		if _, err := os.Stat(proc + "root" + secret); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the jail has %s: %v", secret, err)
		}
	}
	for _, secret := range []string{cfg.Dir, cfg.MemoryFile, cfg.Disks[0].Path} {
		fi, err := os.Stat(secret)
		if err != nil || fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is open to others: %v %v", secret, fi.Mode(), err)
		}
	}
}

func statusOf(t *testing.T, proc string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	status := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		status[k] = strings.TrimSpace(v)
	}
	return status
}

// Descriptors checks that a VMM has its own files and nothing else of this process.
func (l *Lab) Descriptors(t *testing.T, h vm.Handle, own ...string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", h.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		n, _ := strconv.Atoi(filepath.Base(fd))
		known := err != nil || n < 3 || strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:") ||
			slices.ContainsFunc(own, func(p string) bool { return strings.HasPrefix(target, p) })
		if !known {
			t.Errorf("descriptor %d is %s", n, target)
		}
	}
}

// Limited checks that the VM's cgroup holds its VMM, its page server and nothing else, and has these limits.
func (l *Lab) Limited(t *testing.T, cfg vm.Config, h vm.Handle, limits vmproc.Limits) {
	t.Helper()
	hierarchy, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	c := hierarchy.Cgroup(l.CgroupParent, cfg.Cgroup)
	own := []int{h.PID}
	if h.PagerPID != 0 {
		own = append(own, h.PagerPID)
	}
	pids, err := c.PIDs()
	slices.Sort(own)
	slices.Sort(pids)
	if err != nil || !slices.Equal(pids, own) {
		t.Errorf("the cgroup holds %v, %v; want %v", pids, err, own)
	}
	quota := strconv.Itoa(int(limits.CPUs * 100_000))
	files := map[string]string{"memory.max": strconv.FormatInt(limits.MemoryBytes, 10), "cpu.max": quota + " 100000", "pids.max": strconv.Itoa(limits.PIDs)}
	if hierarchy.Version() == 1 {
		files = map[string]string{
			"memory.limit_in_bytes": files["memory.max"], "cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000", "pids.max": files["pids.max"],
		}
	}
	for file, want := range files {
		controller, _, _ := strings.Cut(file, ".")
		b, err := os.ReadFile(filepath.Join(c.Path(controller), file))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", file, got, err, want)
		}
	}
}
