//go:build linux

// Package lab is the host on which the tests of real drivers run VMs: a volume with reflinks, network slots, cgroups
// and the little guest of package vmtest. It knows no hypervisor.
package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// Lab is what the tests of a driver share.
type Lab struct {
	Dir          string // on a volume with reflinks
	Kernel       string
	Initrd       string // with the guest
	CgroupParent string
	Log          *slog.Logger

	pool  *network.Pool
	mu    sync.Mutex
	slots map[string]*network.Slot // by Config.Dir
}

// slots is how many VMs a lab can have at a time.
const slots = 64

// labs counts them, for names of their own.
var labs atomic.Int32 //nolint:gochecknoglobals // tests of one program share the host

// New skips where no VM can be run, or a program is missing, and cleans up after the whole test. Its networks have no
// way out.
func New(t testing.TB, programs ...string) *Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: VMs get uids, namespaces and cgroups")
	}
	kernel, err := vmtest.Kernel()
	if err != nil {
		t.Skip(err.Error())
	}
	for _, program := range append([]string{"nft", "mkfs.xfs"}, programs...) {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s", program)
		}
	}
	l := &Lab{
		Kernel: kernel, Dir: filepath.Join(t.TempDir(), "vms"), slots: map[string]*network.Slot{},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if _, err := storage.Open(t.Context(), storage.Options{Dir: l.Dir, VolumeSize: 8 << 30}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := storage.Unmount(l.Dir); err != nil {
			t.Error(err)
		}
	})
	if l.Initrd, err = vmtest.BuildInitramfs(t.Context(), t.TempDir(), kernel); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("q%d%c", os.Getpid()%1_000_000, 'a'+labs.Add(1))
	l.CgroupParent = "wrenn-" + name
	// Labs of other test programs on this machine have VMMs, too, which would see each other by a uid in common.
	uid := 200_000_000 + os.Getpid()*256 + int(labs.Load())*slots
	if l.pool, err = network.Open(t.Context(), network.Options{Name: name, Slots: slots, BaseUID: uid}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close(t, name) })
	return l
}

func (l *Lab) close(t testing.TB, name string) {
	l.pool.Close()
	if err := network.Remove(context.Background(), name); err != nil {
		t.Error(err)
	}
	h, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Cgroup(l.CgroupParent, "").Remove(); err != nil {
		t.Errorf("a VM left its cgroup: %v", err)
	}
}

// Config makes all that a new VM needs and removes it after the test.
func (l *Lab) Config(t testing.TB) vm.Config {
	t.Helper()
	slot, err := l.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(l.Dir, "vm-")
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, disk := range []string{"a", "b"} {
		if err := os.WriteFile(path(disk), make([]byte, 64<<10), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.mu.Lock()
	l.slots[dir] = slot
	l.mu.Unlock()
	t.Cleanup(func() {
		l.pool.Release(slot)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return vm.Config{
		ID: "sb-" + filepath.Base(dir), Dir: dir, VCPUs: 1, MemoryMB: 128, Kernel: l.Kernel, Initrd: l.Initrd,
		Cmdline:    fmt.Sprintf("quiet panic=-1 wrenn.addr=%s/%d wrenn.gw=%s", network.GuestIP, network.GuestPrefix, network.GatewayIP),
		MemoryFile: path("memory"), Console: path("console.log"), Cgroup: filepath.Base(dir),
		Disks: []vm.Disk{{Path: path("a")}, {Path: path("b"), ReadOnly: true}},
		Net:   vm.Net{NetnsPath: slot.NetnsPath, TAP: slot.TAP, MAC: network.GuestMAC}, UID: slot.UID, GID: slot.UID,
	}
}

// Env is the lab as the conformance suite wants it.
func (l *Lab) Env(driver func(vm.DiskLimits) vm.Driver, confined func(*testing.T, vm.Config, vm.Handle)) vmtest.Env {
	return vmtest.Env{
		New: func() vm.Driver { return driver(vm.DiskLimits{}) }, Limited: driver, Config: func(t *testing.T) vm.Config { return l.Config(t) }, Ask: l.Ask, Leftovers: l.Leftovers, Confinement: confined,
	}
}

// Ask sends one line to the guest and reads one, again and again until it does.
func (l *Lab) Ask(ctx context.Context, cfg vm.Config, command string) (string, error) {
	l.mu.Lock()
	slot := l.slots[cfg.Dir]
	l.mu.Unlock()
	for {
		answer, err := askOnce(ctx, slot, command)
		if err == nil || ctx.Err() != nil {
			return answer, err
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(20 * time.Millisecond): // the guest is still booting
		}
	}
}

func askOnce(ctx context.Context, slot *network.Slot, command string) (string, error) {
	dialCtx, cancel := context.WithTimeout(ctx, vmtest.Stretch(300*time.Millisecond))
	defer cancel()
	conn, err := slot.DialContext(dialCtx, "tcp", network.GuestIP+":7")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := io.WriteString(conn, command+"\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

// Leftovers lists what a VM that is gone still has on the host: processes, cgroups, and files that neither the agent
// nor the test made.
func (l *Lab) Leftovers(cfg vm.Config) ([]string, error) {
	var left []string
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".sock") || (e.IsDir() && strings.Contains(e.Name(), "-")) {
			left = append(left, filepath.Join(cfg.Dir, e.Name()))
		}
	}
	h, err := vmproc.FindHierarchy()
	if err != nil {
		return nil, err
	}
	for _, controller := range []string{"memory", "cpu", "pids"} {
		if dir := h.Cgroup(l.CgroupParent, cfg.Cgroup).Path(controller); cfg.Cgroup == filepath.Base(cfg.Dir) {
			if _, err := os.Stat(dir); err == nil {
				left = append(left, dir)
			}
		}
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range cmdlines {
		if b, err := os.ReadFile(path); err == nil && slices.Contains(strings.Split(string(b), "\x00"), cfg.ID) {
			left = append(left, path)
		}
	}
	return left, err
}
