// Package vmtest is the conformance suite of vm.Driver: what the contract says, as named checks that any
// implementation has to pass. It owns the checks and the little guest they run (package guest); it knows
// no hypervisor, and what a check needs of the host it is given by an Env.
package vmtest

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Env is the host on which a driver is exercised. Its functions may be called from parallel tests.
type Env struct {
	// New makes a driver value that knows nothing of earlier ones, as the next agent process would.
	New func() vm.Driver
	// Limited is New with limits of disks; nil if VMs are no machines here.
	Limited func(vm.DiskLimits) vm.Driver
	// Config makes all that a new VM needs (directory, disks, network, uid) and returns its configuration for
	// a cold start of the suite's guest. What it made is removed after the test, when the VMs are gone.
	Config func(t *testing.T) vm.Config
	// Ask sends a command to the guest of a running VM, waiting until it answers, and returns its answer.
	Ask func(ctx context.Context, cfg vm.Config, command string) (string, error)
	// Leftovers lists what a VM that is gone still has on the host: processes, cgroups, sockets.
	Leftovers func(cfg vm.Config) ([]string, error)
	// Confinement checks what the host enforces on a running VM; nil if VMs are no processes here.
	Confinement func(t *testing.T, cfg vm.Config, h vm.Handle)
	// Only names the checks to be run; nil for all.
	Only []string
}

// StretchEnv is a whole number by which the time limits of tests are multiplied, for machines that are emulated
// themselves.
const StretchEnv = "WRENN_TEST_STRETCH"

// Stretch is a time limit on this machine.
func Stretch(limit time.Duration) time.Duration {
	n, err := strconv.Atoi(os.Getenv(StretchEnv))
	if err != nil || n < 1 {
		return limit
	}
	return limit * time.Duration(n)
}

// patience with a check: an emulated guest boots in seconds, also on a busy host.
func patience() time.Duration { return Stretch(60 * time.Second) }

// Exercise runs the suite. One VM is booted and snapshotted; most checks restore that snapshot.
func Exercise(t *testing.T, env Env) {
	s := &suite{env: env}
	s.template(t)
	checks := []check{
		{"lifecycle of a cold start", (*suite).coldStart},
		{"the guest has what was asked for", (*suite).hardware},
		{"a restored guest sees its disk grow", (*suite).grow},
		{"disks are as fast as they may be", (*suite).diskLimits},
		{"a frozen start runs no vCPU", (*suite).frozenStart},
		{"every call in every state", (*suite).everyCallInEveryState},
		{"pause and resume are idempotent", (*suite).idempotent},
		{"restore goes on where the snapshot was", (*suite).restore},
		{"many restores of one snapshot", (*suite).manyRestores},
		{"pause in place and resume, again and again", (*suite).inPlace},
		{"cleared memory comes back clear", (*suite).zeroes},
		{"a VM goes on after a snapshot", (*suite).goesOn},
		{"a failed snapshot leaves the VM frozen", (*suite).failedSnapshot},
		{"a snapshot that does not fit is refused", (*suite).mismatch},
		{"a config that cannot be honoured leaves nothing", (*suite).badConfigs},
		{"a cancelled start leaves nothing", (*suite).cancelledStart},
		{"the next agent adopts a VM by its handle", (*suite).adoption},
		{"a reused pid is not the VM", (*suite).reusedPID},
		{"wait sees the guest power off", (*suite).powerOff},
		{"wait ends with its context", (*suite).waitContext},
		{"the console is kept and bounded", (*suite).console},
		{"the VM is confined", (*suite).confinement},
	}
	for _, name := range env.Only {
		if !slices.ContainsFunc(checks, func(c check) bool { return c.name == name }) {
			t.Errorf("there is no check %q", name)
		}
	}
	for _, c := range checks {
		if env.Only != nil && !slices.Contains(env.Only, c.name) {
			continue
		}
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			c.run(s, t)
		})
	}
}

type check struct {
	name string
	run  func(*suite, *testing.T)
}

type suite struct {
	env  Env
	base vm.Config        // of the VM that the snapshot was taken of
	snap vm.SnapshotFiles // frozen, with the pattern of seed 7 in its memory
}

// running is a VM under test.
type running struct {
	*testing.T
	env    Env
	driver vm.Driver
	cfg    vm.Config
	handle vm.Handle
}

func (s *suite) start(t *testing.T, cfg vm.Config) *running {
	t.Helper()
	r := &running{T: t, env: s.env, driver: s.env.New(), cfg: cfg}
	r.begin()
	return r
}

func (r *running) context() context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), patience())
	r.Cleanup(cancel)
	return ctx
}

// begin starts the VM of r.cfg, and has it destroyed and looked after at the end.
func (r *running) begin() {
	r.Helper()
	begun := time.Now()
	h, err := r.driver.Start(r.context(), r.cfg)
	if err != nil {
		r.Fatalf("start: %v", err)
	}
	r.Logf("start (restore: %v) in %s", r.cfg.Restore != nil, time.Since(begun).Round(time.Millisecond/10))
	r.handle = h
	cfg := r.cfg
	r.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience()) // whatever the check has used up
		defer cancel()
		if err := r.driver.Destroy(ctx, h); err != nil {
			r.Errorf("destroy: %v", err)
		}
		r.nothingLeft(cfg)
	})
}

func (r *running) nothingLeft(cfg vm.Config) {
	r.Helper()
	left, err := r.env.Leftovers(cfg)
	if err != nil || len(left) > 0 {
		r.Errorf("left over: %v %v", left, err)
	}
}

func (r *running) ask(command string) string {
	r.Helper()
	answer, err := Ask(r.context(), r.env.Ask, r.driver, r.handle, r.cfg, command)
	if err != nil {
		r.Fatalf("the guest did not answer %q: %v", command, err)
	}
	return answer
}

// Ask is Env.Ask that fails at once when the VM ends.
func Ask(ctx context.Context, ask func(context.Context, vm.Config, string) (string, error), d vm.Driver, h vm.Handle, cfg vm.Config, command string) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if d.Wait(ctx, h) == nil {
			cancel(errors.New("its VM has ended"))
		}
	}()
	defer func() { cancel(nil); <-ended }()
	answer, err := ask(ctx, cfg, command)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	return answer, err
}

func (r *running) expect(command, want string) {
	r.Helper()
	if got := r.ask(command); got != want {
		r.Errorf("%s: the guest says %q, want %q", command, got, want)
	}
}

func (r *running) state(want vm.State) {
	r.Helper()
	got, err := r.driver.Inspect(r.context(), r.handle)
	if err != nil || got != want {
		r.Errorf("state is %q, %v; want %q", got, err, want)
	}
}

func (r *running) ok(what string, err error) {
	r.Helper()
	if err != nil {
		r.Fatalf("%s: %v", what, err)
	}
}

func (r *running) kind(what string, err error, want wrenn.Kind) {
	r.Helper()
	if got := wrenn.KindOf(err); got != want {
		r.Errorf("%s: %v (kind %q), want kind %q", what, err, got, want)
	}
}

func (r *running) pause()   { r.Helper(); r.ok("pause", r.driver.Pause(r.context(), r.handle)) }
func (r *running) resume()  { r.Helper(); r.ok("resume", r.driver.Resume(r.context(), r.handle)) }
func (r *running) destroy() { r.Helper(); r.ok("destroy", r.driver.Destroy(r.context(), r.handle)) }

func (r *running) snapshot(dst vm.SnapshotFiles) {
	r.Helper()
	begun := time.Now()
	r.ok("snapshot", r.driver.Snapshot(r.context(), r.handle, dst))
	r.Logf("snapshot in %s", time.Since(begun).Round(time.Millisecond/10))
}

// files names a snapshot in the VM's directory.
func (r *running) files(name string) vm.SnapshotFiles {
	return vm.SnapshotFiles{State: filepath.Join(r.cfg.Dir, name+".state"), Memory: filepath.Join(r.cfg.Dir, name+".memory")}
}

// template boots the VM that the other checks restore.
func (s *suite) template(t *testing.T) {
	r := s.start(t, s.env.Config(t))
	begun := time.Now()
	r.expect("ping", "pong")
	t.Logf("guest ready %s after the start", time.Since(begun).Round(time.Millisecond))
	r.expect("fill 7 24", "ok")
	r.expect("disk write before", "ok")
	r.pause()
	snap := r.files("template")
	r.snapshot(snap)
	r.destroy()
	s.base, s.snap = r.cfg, snap
}

// clone is the configuration of a VM that restores the suite's snapshot.
func (s *suite) clone(t *testing.T) vm.Config {
	t.Helper()
	cfg := s.env.Config(t)
	snap := s.snap
	cfg.Restore = &snap
	for i, disk := range cfg.Disks {
		b, err := os.ReadFile(s.base.Disks[i].Path)
		if err == nil {
			err = os.WriteFile(disk.Path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// later is a handle as the next agent process reads it from disk.
func later(t *testing.T, h vm.Handle) vm.Handle {
	t.Helper()
	b, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	var out vm.Handle
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}
