//go:build linux

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// childEnv makes this test program an agent that starts one VM, tells its handle and waits to be killed.
const childEnv = "WRENN_QEMU_TEST_START"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		startAndWait(spec)
	}
	goleak.VerifyTestMain(m)
}

type childSpec struct {
	Verdict Verdict
	Options Options
	Config  vm.Config
}

func startAndWait(spec string) {
	var s childSpec
	if err := json.Unmarshal([]byte(spec), &s); err != nil {
		panic(err)
	}
	s.Options.Log = nil
	h, err := New(s.Verdict, s.Options).Start(context.Background(), s.Config)
	if err != nil {
		panic(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(h); err != nil {
		panic(err)
	}
	select {}
}

// lab is what the tests of a real QEMU share: built once, by the first test that needs it.
type lab struct {
	dir     string // on a volume with reflinks where the host can make one
	kernel  string
	initrd  string
	verdict Verdict
	opts    Options
	pool    *network.Pool

	mu    sync.Mutex
	slots map[string]*network.Slot // by Config.Dir
}

// labs counts them, for names of their own.
var labs atomic.Int32

// newLab skips where no VM can be run, and cleans up after the whole test.
func newLab(t testing.TB) *lab {
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
	for _, program := range []string{"qemu-system-x86_64", "nft", "mkfs.xfs"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s", program)
		}
	}
	l := &lab{kernel: kernel, dir: filepath.Join(t.TempDir(), "vms"), slots: map[string]*network.Slot{}}
	if _, err := storage.Open(t.Context(), storage.Options{Dir: l.dir, VolumeSize: 8 << 30}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := storage.Unmount(l.dir); err != nil {
			t.Error(err)
		}
	})
	if l.initrd, err = vmtest.BuildInitramfs(t.Context(), t.TempDir(), kernel); err != nil {
		t.Fatal(err)
	}
	// The probe has a test of its own; here only QEMU is looked for.
	if l.verdict, err = findQEMU(t.Context(), ""); err != nil {
		t.Skip(err.Error())
	}
	name := fmt.Sprintf("q%d%c", os.Getpid()%1_000_000, 'a'+labs.Add(1))
	l.opts = Options{CacheDir: filepath.Join(l.dir, "cache"), CgroupParent: "wrenn-" + name, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if l.pool, err = network.Open(t.Context(), network.Options{Name: name, Slots: 64, BaseUID: 760_000}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.pool.Close()
		if err := network.Remove(context.Background(), name); err != nil {
			t.Error(err)
		}
		h, err := vmproc.FindHierarchy()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Cgroup(l.opts.CgroupParent, "").Remove(); err != nil {
			t.Errorf("a VM left its cgroup: %v", err)
		}
	})
	return l
}

func (l *lab) driver() vm.Driver { return New(l.verdict, l.opts) }

func (l *lab) config(t testing.TB) vm.Config {
	t.Helper()
	slot, err := l.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(l.dir, "vm-")
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
		ID: "sb-" + filepath.Base(dir), Dir: dir, VCPUs: 1, MemoryMB: 128, Kernel: l.kernel, Initrd: l.initrd,
		Cmdline:    fmt.Sprintf("quiet panic=-1 wrenn.addr=%s/%d wrenn.gw=%s", network.GuestIP, network.GuestPrefix, network.GatewayIP),
		MemoryFile: path("memory"), Console: path("console.log"), Cgroup: filepath.Base(dir),
		Disks: []vm.Disk{{Path: path("a")}, {Path: path("b"), ReadOnly: true}},
		Net:   vm.Net{NetnsPath: slot.NetnsPath, TAP: slot.TAP, MAC: network.GuestMAC}, UID: slot.UID, GID: slot.UID,
	}
}

// ask sends one line to the guest and reads one, again and again until it does.
func (l *lab) ask(ctx context.Context, cfg vm.Config, command string) (string, error) {
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
	dialCtx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
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

func (l *lab) leftovers(cfg vm.Config) ([]string, error) {
	left, err := filepath.Glob(filepath.Join(cfg.Dir, "*.sock"))
	if err != nil {
		return nil, err
	}
	h, err := vmproc.FindHierarchy()
	if err != nil {
		return nil, err
	}
	for _, controller := range []string{"memory", "cpu", "pids"} {
		if dir := h.Cgroup(l.opts.CgroupParent, cfg.Cgroup).Path(controller); cfg.Cgroup == filepath.Base(cfg.Dir) {
			if _, err := os.Stat(dir); err == nil {
				left = append(left, dir)
			}
		}
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range cmdlines {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "\x00"+cfg.ID+"\x00") && strings.HasPrefix(string(b), l.verdict.Binary) {
			left = append(left, path)
		}
	}
	return left, err
}

func TestQEMUConforms(t *testing.T) {
	l := newLab(t)
	leak, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not close-on-exec, as inherited from a careless parent
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(leak) })
	vmtest.Exercise(t, vmtest.Env{New: l.driver, Config: func(t *testing.T) vm.Config { return l.config(t) }, Ask: l.ask, Leftovers: l.leftovers, Confinement: l.confined})
}

// confined looks at a running QEMU from outside.
func (l *lab) confined(t *testing.T, cfg vm.Config, h vm.Handle) {
	proc := fmt.Sprintf("/proc/%d/", h.PID)
	status := statusOf(t, proc)
	uid := strconv.Itoa(cfg.UID)
	for field, want := range map[string]string{
		"Uid": strings.Repeat(uid+"\t", 3) + uid, "Gid": strings.Repeat(uid+"\t", 3) + uid, "Groups": "",
		"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapBnd": "0000000000000000",
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
	for _, secret := range []string{"/etc/passwd", "/root", "/tmp", "/run", "/var", "/sys", "/usr/bin/env", "/proc/sys", cfg.Dir} {
		if _, err := os.Stat(proc + "root" + secret); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the jail has %s: %v", secret, err)
		}
	}
	l.descriptors(t, proc, cfg)
	l.limited(t, cfg, h)
	for _, secret := range []string{cfg.Dir, cfg.MemoryFile, cfg.Disks[0].Path, h.Socket} {
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

// descriptors checks that QEMU has its own files and nothing else of this process.
func (l *lab) descriptors(t *testing.T, proc string, cfg vm.Config) {
	t.Helper()
	fds, err := filepath.Glob(proc + "fd/*")
	if err != nil {
		t.Fatal(err)
	}
	own := []string{cfg.MemoryFile, cfg.Disks[0].Path, cfg.Disks[1].Path, "/dev/net/tun", "/memfd:qemu-stderr"}
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		n, _ := strconv.Atoi(filepath.Base(fd))
		known := err != nil || n < 3 || strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:") ||
			slices.ContainsFunc(own, func(p string) bool { return strings.HasPrefix(target, p) }) ||
			(cfg.Restore != nil && target == cfg.Restore.State)
		if !known {
			t.Errorf("descriptor %d is %s", n, target)
		}
	}
}

func (l *lab) limited(t *testing.T, cfg vm.Config, h vm.Handle) {
	t.Helper()
	hierarchy, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	c := hierarchy.Cgroup(l.opts.CgroupParent, cfg.Cgroup)
	pids, err := c.PIDs()
	if err != nil || !slices.Equal(pids, []int{h.PID}) {
		t.Errorf("the cgroup holds %v, %v; want %d", pids, err, h.PID)
	}
	limits := New(l.verdict, l.opts).limits(cfg)
	files := map[string]string{"memory.max": strconv.FormatInt(limits.MemoryBytes, 10), "cpu.max": "125000 100000", "pids.max": strconv.Itoa(limits.PIDs)}
	if hierarchy.Version() == 1 {
		files = map[string]string{
			"memory.limit_in_bytes": files["memory.max"], "cpu.cfs_quota_us": "125000", "cpu.cfs_period_us": "100000", "pids.max": files["pids.max"],
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

func TestVMOutlivesTheAgentThatWasKilled(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config(t)
	spec, err := json.Marshal(childSpec{l.verdict, Options{CacheDir: l.opts.CacheDir, CgroupParent: l.opts.CgroupParent}, cfg})
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(os.Args[0])
	agent.Env = append(os.Environ(), childEnv+"="+string(spec))
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
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := New(l.verdict, l.opts)
	defer func() {
		if err := d.Destroy(context.WithoutCancel(ctx), h); err != nil {
			t.Error(err)
		}
		if left, err := l.leftovers(cfg); err != nil || len(left) > 0 {
			t.Errorf("left over: %v %v", left, err)
		}
	}()
	if state, err := d.Inspect(ctx, h); err != nil || state != vm.StateRunning {
		t.Fatalf("after the agent's death the VM is %q, %v", state, err)
	}
	if answer, err := l.ask(ctx, cfg, "ping"); err != nil || answer != "pong" {
		t.Errorf("the guest says %q, %v", answer, err)
	}
	waited := make(chan error, 1)
	go func() { waited <- d.Wait(ctx, h) }() // takes over the console, too
	if _, err := l.ask(ctx, cfg, "flood 1"); err != nil {
		t.Error(err)
	}
	for !strings.Contains(l.consoleOf(t, cfg), "end of flood") {
		if ctx.Err() != nil {
			t.Fatalf("after the agent's death the console is %q", l.consoleOf(t, cfg))
		}
		time.Sleep(10 * time.Millisecond) // nothing tells when a file has grown
	}
	// Sweep spares what it is told to, and ends what it is not.
	if n, err := vmproc.Sweep(l.opts.CgroupParent, func(name string) bool { return name == cfg.Cgroup }); n != 0 || err != nil {
		t.Fatalf("the sweep ended %d VMs, %v", n, err)
	}
	if answer, err := l.ask(ctx, cfg, "ping"); err != nil || answer != "pong" {
		t.Errorf("after the sweep the guest says %q, %v", answer, err)
	}
	if n, err := vmproc.Sweep(l.opts.CgroupParent, func(string) bool { return false }); n != 1 || err != nil {
		t.Fatalf("the sweep ended %d VMs, %v", n, err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

func (l *lab) consoleOf(t *testing.T, cfg vm.Config) string {
	t.Helper()
	b, err := os.ReadFile(cfg.Console)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestVMThatNeedsTooMuchMemoryIsEndedAlone gives a VM less than QEMU itself takes.
func TestVMThatNeedsTooMuchMemoryIsEndedAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config(t)
	h, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	c := h.Cgroup(l.opts.CgroupParent, cfg.Cgroup)
	if err := c.Ensure(vmproc.Limits{MemoryBytes: 8 << 20, CPUs: 1, PIDs: 100}); err != nil {
		t.Fatal(err)
	}
	p, err := vmproc.Launch(vmproc.Spec{Path: l.verdict.Binary, Args: []string{"-M", "none", "-m", "64M", "-nographic"}, UID: cfg.UID, GID: cfg.GID, Cgroup: c})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("QEMU lives on with 8 MiB: %v", err)
		_ = p.Kill(ctx)
	}
	if err := p.Reap(); err != nil {
		t.Error(err)
	}
	if err := c.Remove(); err != nil {
		t.Error(err)
	}
}

func TestStartRefusesASecondVMOfTheSameName(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config(t)
	cfg.Frozen = true
	d := New(l.verdict, l.opts)
	h, err := d.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Start(t.Context(), cfg); wrenn.KindOf(err) != wrenn.KindInvalidState {
		t.Errorf("a second start: %v", err)
	}
	if state, err := d.Inspect(t.Context(), h); err != nil || state != vm.StateFrozen {
		t.Errorf("the first is %q, %v", state, err)
	}
	if err := d.Destroy(t.Context(), h); err != nil {
		t.Error(err)
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	opts := ProbeOptions{Kernel: l.kernel, Initrd: l.initrd, CacheFile: filepath.Join(t.TempDir(), "verdict"), Timeout: 3 * time.Second}
	v, err := Probe(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("verdict: %+v", v)
	if v.Binary == "" || v.Version == "" || v.Reason == "" || v.ProbedAt.IsZero() {
		t.Errorf("verdict is incomplete: %+v", v)
	}
	again, err := Probe(t.Context(), opts)
	if err != nil || !again.ProbedAt.Equal(v.ProbedAt) || again.KVM != v.KVM {
		t.Errorf("the cached verdict is %+v, %v", again, err)
	}
	// Another kernel is another question.
	other := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(other, []byte("no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	opts.Kernel = other
	if v, err = Probe(t.Context(), opts); err != nil || v.KVM {
		t.Errorf("a file of nonsense booted: %+v, %v", v, err)
	}
	opts.device = "/nonexistent/kvm"
	if v, err = Probe(t.Context(), opts); err != nil || v.KVM || !strings.Contains(v.Reason, "/nonexistent/kvm") {
		t.Errorf("without a device: %+v, %v", v, err)
	}
	opts.Binary = "qemu-system-nonexistent"
	if _, err = Probe(t.Context(), opts); err == nil {
		t.Error("a QEMU that is not installed was found")
	}
}
