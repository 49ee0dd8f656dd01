package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// faultyOperation is an operation with the points at which it is made to fail.
type faultyOperation struct {
	name   string
	points []string
	late   string // the one of the points that is passed when the caller has its answer
	paused bool   // it is done on a paused sandbox
	do     func(ctx context.Context, s *Sandboxes, v *victim) error
}

// victim is a sandbox under test. Its disk, its memory and a process say "first" at its checkpoint, "second" now.
type victim struct {
	id         string
	checkpoint string
	repeated   string // if set, what the ids of an operation on it end with: it is the same one each time
}

func newOp() string { return wrenn.NewID(wrenn.PrefixOperation) }

// newID makes the id of an operation on the victim, or of what it makes.
func (v *victim) newID(prefix string) string {
	if v.repeated != "" {
		return prefix + v.repeated
	}
	return wrenn.NewID(prefix)
}

func (v *victim) newOp() string { return v.newID(wrenn.PrefixOperation) }

var launchPoints = []string{"launch.started", "launch.recorded", "launch.woken", "launch.running", "launch.greeted"}

var momentPoints = []string{"moment.begun", "moment.frozen", "moment.cloned", "moment.saved", "moment.named"}

func faultyOperations() []faultyOperation {
	return []faultyOperation{
		{name: "pause", points: []string{"pause.begun", "pause.quiet", "pause.frozen", "pause.saved", "pause.ended"}, late: "pause.ended",
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Pause(ctx, &agentv1.PauseSandboxRequest{Id: v.id, OperationId: v.newOp()})
				return err
			}},
		{name: "pause of the disk", points: []string{"pause.disk", "pause.ended"}, late: "pause.ended",
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Pause(ctx, &agentv1.PauseSandboxRequest{Id: v.id, OperationId: v.newOp(), DiskOnly: true})
				return err
			}},
		{name: "resume", paused: true, points: append([]string{"resume.begun"}, launchPoints...),
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Resume(ctx, &agentv1.ResumeSandboxRequest{Id: v.id, OperationId: v.newOp()})
				return err
			}},
		{name: "checkpoint", points: momentPoints,
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Checkpoint(ctx, v.id, v.newOp(), v.newID(wrenn.PrefixCheckpoint))
				return err
			}},
		{name: "snapshot", points: []string{"moment.frozen", "moment.named"},
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.SaveSnapshot(ctx, v.id, v.newOp(), v.newID(wrenn.PrefixSnapshot))
				return err
			}},
		{name: "rollback", points: append([]string{"moment.frozen", "rollback.cloned", "rollback.begun", "rollback.frozen", "rollback.between", "rollback.swapped"}, launchPoints...),
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Rollback(ctx, &agentv1.RollbackSandboxRequest{
					Id: v.id, OperationId: v.newOp(), CheckpointId: v.checkpoint, KeepAs: v.newID(wrenn.PrefixCheckpoint),
				})
				return err
			}},
		{name: "rollback of a paused one", paused: true, points: []string{"rollback.between", "rollback.swapped", "launch.running"},
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				_, err := s.Rollback(ctx, &agentv1.RollbackSandboxRequest{Id: v.id, OperationId: v.newOp(), CheckpointId: v.checkpoint})
				return err
			}},
		{name: "fork", points: []string{"moment.frozen", "moment.named", "fork.saved"},
			do: func(ctx context.Context, s *Sandboxes, v *victim) error {
				child := &agentv1.ForkSandboxRequest_Child{Id: v.newID(wrenn.PrefixSandbox), OperationId: v.newOp()}
				results, err := s.Fork(ctx, &agentv1.ForkSandboxRequest{Id: v.id, OperationId: v.newOp(), Children: []*agentv1.ForkSandboxRequest_Child{child}})
				if err != nil {
					return err
				}
				if results[0].Sandbox == nil {
					return errors.New(results[0].ErrorMessage)
				}
				return s.Delete(context.WithoutCancel(ctx), child.Id, newOp())
			}},
		{name: "delete", points: []string{"delete.begun", "delete.ended"},
			do: func(ctx context.Context, s *Sandboxes, v *victim) error { return s.Delete(ctx, v.id, v.newOp()) }},
	}
}

// faultLab is a host with a snapshot that victims are made of, and faults by sandbox.
type faultLab struct {
	cfg      Config
	s        *Sandboxes
	crash    func()
	snapshot string

	mu     sync.Mutex
	faults map[string]func(point string) error
}

func newFaultLab(t *testing.T) *faultLab {
	t.Helper()
	l := &faultLab{cfg: testConfig(t), faults: map[string]func(string) error{}, snapshot: wrenn.NewID(wrenn.PrefixSnapshot)}
	l.cfg.WarmVMs = 0
	l.open(t)
	seed := create(t, l.s)
	shell(t, l.s, seed.Id, marks("first")+"; sleep 100000 > /dev/null 2>&1 & echo $! > pid")
	if _, err := l.s.SaveSnapshot(t.Context(), seed.Id, newOp(), l.snapshot); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Delete(t.Context(), seed.Id, newOp()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *faultLab) open(t *testing.T) {
	t.Helper()
	l.s, l.crash = open(t, l.cfg)
	l.s.faults = func(id, point string) error {
		l.mu.Lock()
		fault := l.faults[id]
		l.mu.Unlock()
		if fault == nil {
			return nil
		}
		return fault(point)
	}
}

func (l *faultLab) arm(id string, fault func(point string) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults[id] = fault
}

func marks(word string) string {
	return fmt.Sprintf("echo %s > mark; sync mark; echo %s > /dev/shm/mark", word, word)
}

// victim makes one, in the state that the operation wants.
func (l *faultLab) victim(t *testing.T, op faultyOperation) *victim {
	t.Helper()
	req := request()
	req.Source = &agentv1.Source{Moment: &agentv1.Source_SnapshotId{SnapshotId: l.snapshot}}
	v := &victim{id: req.Id, checkpoint: wrenn.NewID(wrenn.PrefixCheckpoint)}
	if _, err := l.s.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(op.name, "rollback") {
		if _, err := l.s.Checkpoint(t.Context(), v.id, newOp(), v.checkpoint); err != nil {
			t.Fatal(err)
		}
	}
	shell(t, l.s, v.id, marks("second"))
	if op.paused {
		if _, err := l.s.Pause(t.Context(), &agentv1.PauseSandboxRequest{Id: v.id, OperationId: newOp()}); err != nil {
			t.Fatal(err)
		}
	}
	return v
}

// settled waits until the sandbox is in a state that lasts. Nil: there is no such sandbox.
func (l *faultLab) settled(t *testing.T, id string, want func(*agentv1.Sandbox) bool) *agentv1.Sandbox {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		sb, err := l.s.Get(id)
		if wrenn.KindOf(err) == wrenn.KindNotFound {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		if want(sb) {
			return sb
		}
		if time.Now().After(deadline) {
			t.Fatalf("the sandbox stays %s: %s", sb.State, sb.Reason)
		}
	}
}

// vmLives is false as long as the agent has not noticed that it does not.
func (l *faultLab) vmLives(t *testing.T, id string) bool {
	t.Helper()
	sb, err := l.s.get(id)
	if err != nil {
		t.Fatal(err)
	}
	h := sb.snapshot().VM
	if h == nil {
		return false
	}
	state, err := l.s.driver.Inspect(t.Context(), *h)
	return err == nil && state != vm.StateGone
}

// check sees that the sandbox is wholly in its old state or in its new one, and can be worked with.
func (l *faultLab) check(t *testing.T, op faultyOperation, v *victim, memoryMayGo bool) {
	t.Helper()
	if op.name == "delete" { // there is no way back: it can be done again until it is
		if err := op.do(t.Context(), l.s, v); err != nil {
			t.Errorf("it cannot be deleted: %v", err)
		}
		return
	}
	sb := l.settled(t, v.id, func(sb *agentv1.Sandbox) bool {
		return sb.State == protoState[wrenn.SandboxPaused] || sb.State == protoState[wrenn.SandboxRunning] && l.vmLives(t, v.id)
	})
	if sb == nil {
		t.Error("the sandbox is gone")
		return
	}
	hadMemory := sb.State == protoState[wrenn.SandboxRunning] || sb.HasMemory
	if !hadMemory && !memoryMayGo {
		t.Errorf("the memory is lost: %s", sb.Reason)
	}
	if sb.State == protoState[wrenn.SandboxPaused] {
		if _, err := l.s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: v.id, OperationId: newOp()}); err != nil {
			t.Fatalf("it cannot be resumed: %v", err)
		}
	}
	disk := shell(t, l.s, v.id, "cat mark")
	if disk != "second" && (disk != "first" || !strings.HasPrefix(op.name, "rollback")) {
		t.Errorf("the disk says %q", disk)
	}
	if hadMemory {
		if got := shell(t, l.s, v.id, "cat /dev/shm/mark; kill -0 $(cat pid) && echo alive"); got != disk+"\nalive" {
			t.Errorf("the disk says %q, the memory %q", disk, got)
		}
	}
	if _, err := l.s.Pause(t.Context(), &agentv1.PauseSandboxRequest{Id: v.id, OperationId: newOp()}); err != nil {
		t.Errorf("it cannot be paused: %v", err)
	}
	if !op.paused {
		if _, err := l.s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: v.id, OperationId: newOp()}); err != nil {
			t.Errorf("it cannot be resumed again: %v", err)
		}
	}
	if err := op.do(t.Context(), l.s, v); err != nil {
		t.Errorf("the operation cannot be done afterwards: %v", err)
	}
	if err := l.s.Delete(t.Context(), v.id, newOp()); err != nil {
		t.Errorf("it cannot be deleted: %v", err)
	}
}

// nothingLeft looks for what no sandbox owns.
func (l *faultLab) nothingLeft(t *testing.T) {
	t.Helper()
	if list, _ := l.s.List(); len(list) > 0 {
		t.Errorf("%d sandboxes are left, the first: %v", len(list), list[0])
	}
	for _, dir := range []string{sandboxesDir, forksDir, warmDir, trashDir} {
		entries, err := os.ReadDir(filepath.Join(l.cfg.Sandboxes, dir))
		if err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, %v", dir, entries, err)
		}
	}
	unfinishedOnes, err := filepath.Glob(filepath.Join(l.cfg.Sandboxes, "snapshots", "*"+unfinished))
	if err != nil || len(unfinishedOnes) > 0 {
		t.Errorf("unfinished snapshots: %v, %v", unfinishedOnes, err)
	}
	if killed, err := killOrphans(l.cfg, nil); killed > 0 || err != nil {
		t.Errorf("%d VMMs of nobody, %v", killed, err)
	}
}

// soaking says that there is time for all of it: make soak.
func soaking() bool { return os.Getenv("WRENN_SOAK") != "" }

// TestFaults makes every operation fail at every named point: by a full disk, by a disk that does not
// work, by the end of its VM. A disk that is slow makes none fail.
func TestFaults(t *testing.T) {
	l := newFaultLab(t)
	bystander := create(t, l.s)
	t.Run("operations", func(t *testing.T) {
		places := make(chan struct{}, 3) // VMs at a time
		for _, op := range faultyOperations() {
			for i, point := range op.points {
				if soaking() || i%3 == 0 {
					t.Run(strings.ReplaceAll(op.name+"/"+point+"/slow disk", " ", "_"), func(t *testing.T) {
						t.Parallel()
						places <- struct{}{}
						defer func() { <-places }()
						l.trySlowDisk(t, op, point, bystander.Id)
					})
				}
				for kind, fault := range map[string]func(v *victim) error{
					"ENOSPC": func(*victim) error { return fmt.Errorf("injected: %w", unix.ENOSPC) },
					"EIO":    func(*victim) error { return fmt.Errorf("injected: %w", unix.EIO) },
					"VMM":    func(v *victim) error { return l.killVMM(v.id) },
				} {
					if !soaking() && kind == []string{"ENOSPC", "EIO"}[i%2] {
						continue // they take the same way back: one of them at each point, both in a soak
					}
					t.Run(strings.ReplaceAll(op.name+"/"+point+"/"+kind, " ", "_"), func(t *testing.T) {
						t.Parallel()
						places <- struct{}{}
						defer func() { <-places }()
						l.tryFault(t, op, point, kind, fault)
					})
				}
			}
		}
	})
	if err := l.s.Delete(t.Context(), bystander.Id, newOp()); err != nil {
		t.Error(err)
	}
	l.nothingLeft(t)
}

// trySlowDisk holds an operation up at a point for longer than its caller waits. Meanwhile the host serves others,
// and tells of this one; then the operation is done, once, as if its caller had waited.
func (l *faultLab) trySlowDisk(t *testing.T, op faultyOperation, point, bystander string) {
	v := l.victim(t, op)
	var hits atomic.Int32
	reached, works := make(chan struct{}), make(chan struct{})
	l.arm(v.id, func(at string) error {
		if at == point && hits.Add(1) == 1 {
			close(reached)
			<-works
		}
		return nil
	})
	v.repeated = strings.TrimPrefix(wrenn.NewID("x"), "x")
	waiting, leave := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- op.do(waiting, l.s, v) }()
	select {
	case <-reached:
	case err := <-done:
		t.Fatalf("it did not come to the point: %v", err)
	}
	leave()
	if got := shell(t, l.s, bystander, "echo served"); got != "served" {
		t.Errorf("another sandbox says %q", got)
	}
	if _, err := l.s.Get(v.id); err != nil {
		t.Errorf("the host does not tell of the sandbox: %v", err)
	}
	saved := map[string]string{"checkpoint": wrenn.PrefixCheckpoint, "snapshot": wrenn.PrefixSnapshot}[op.name] + v.repeated
	if being := l.saving(t, saved); being != (saved != v.repeated) {
		t.Errorf("that it is being saved is told: %v", being)
	}
	close(works)
	err := <-done
	if op.name != "fork" { // which answers its caller late, but answers
		if wrenn.KindOf(err) != wrenn.KindHostUnavailable {
			t.Errorf("its caller, who left, is told: %v", err)
		}
		err = op.do(t.Context(), l.s, v) // the same again finds it done, or waits for that
	}
	if err != nil || hits.Load() != 1 {
		t.Errorf("it came to the point %d times and ended with %v", hits.Load(), err)
	}
	if l.saving(t, saved) {
		t.Error("it is still being saved")
	}
	l.arm(v.id, nil)
	v.repeated = ""
	l.check(t, op, v, op.name == "pause of the disk")
}

// saving tells whether the host says that a moment is being saved.
func (l *faultLab) saving(t *testing.T, id string) bool {
	t.Helper()
	all, err := l.s.Moments()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(all, func(m *agentv1.ListMomentsResponse_Moment) bool { return m.Saving && m.Checkpoint.Id == id })
}

func (l *faultLab) tryFault(t *testing.T, op faultyOperation, point, kind string, fault func(v *victim) error) {
	v := l.victim(t, op)
	hits := 0
	l.arm(v.id, func(at string) error {
		if at != point || hits > 0 {
			return nil
		}
		hits++
		return fault(v)
	})
	err := op.do(t.Context(), l.s, v)
	if op.late == point {
		l.over(t, v.id)
	}
	l.arm(v.id, nil)
	if hits != 1 {
		t.Fatalf("the point was passed %d times; the operation: %v", hits, err)
	}
	switch {
	case op.late == point:
		if err != nil {
			t.Errorf("what fails after the answer is told: %v", err)
		}
	case kind == "ENOSPC" && wrenn.KindOf(err) != wrenn.KindDiskFull:
		t.Errorf("a full disk is told as %v", err)
	case kind == "EIO" && err == nil:
		t.Error("the failure is not told")
	}
	l.check(t, op, v, kind == "VMM" || op.name == "pause of the disk")
}

// over waits until an operation has done all that it left for after its answer.
func (l *faultLab) over(t *testing.T, id string) {
	t.Helper()
	sb, err := l.s.get(id)
	if err == nil {
		err = sb.do(t.Context(), newOp(), func(context.Context) error { return nil })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// killVMM ends the sandbox's VM as the OOM killer would. A sandbox that has none has lost nothing.
func (l *faultLab) killVMM(id string) error {
	sb, err := l.s.get(id)
	if err != nil {
		return err
	}
	h := sb.snapshot().VM
	if h == nil {
		return nil
	}
	if err := syscall.Kill(h.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return l.s.driver.Wait(context.Background(), *h)
}

// TestCrashes ends the agent while operations are at each of their named points, and looks at what the
// next agent makes of it.
func TestCrashes(t *testing.T) {
	l := newFaultLab(t)
	type attempt struct {
		op    faultyOperation
		point string
		v     *victim
	}
	var all []attempt
	for _, op := range faultyOperations() {
		for _, point := range op.points {
			all = append(all, attempt{op, point, nil})
		}
	}
	for part := range slices.Chunk(all, 12) { // so many VMs at a time
		never := make(chan struct{}) // a dead agent does nothing any more, also no undoing
		for i := range part {
			a := &part[i]
			a.v = l.victim(t, a.op)
			reached := make(chan struct{})
			l.arm(a.v.id, func(at string) error {
				if at == a.point {
					close(reached)
					<-never
				}
				return nil
			})
			failed := make(chan error, 1)
			go func(s *Sandboxes) { failed <- a.op.do(context.Background(), s, a.v) }(l.s)
			if a.op.late == a.point {
				if err := <-failed; err != nil {
					t.Fatalf("%s: %v", a.op.name, err)
				}
			}
			select {
			case <-reached:
			case err := <-failed:
				t.Fatalf("%s did not come to %s: %v", a.op.name, a.point, err)
			}
		}
		l.crash()
		l.faults = map[string]func(string) error{}
		l.open(t)
		for _, a := range part {
			t.Run(strings.ReplaceAll(a.op.name+"/"+a.point, " ", "_"), func(t *testing.T) {
				l.check(t, a.op, a.v, a.op.name == "pause of the disk")
			})
		}
		l.nothingLeft(t)
	}
	hierarchy, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	if pids, err := hierarchy.Cgroup(cgroupParent(l.cfg), "").PIDs(); err != nil || len(pids) > 0 {
		t.Errorf("processes left: %v, %v", pids, err)
	}
}

// TestPowerCut takes from the disk what a power cut may take: all that was not brought there. The end of the agent
// takes nothing of it, so both are told apart by the host's boot, which the test makes another one.
func TestPowerCut(t *testing.T) {
	cfg := testConfig(t)
	cfg.WarmVMs = 0
	s, crash := open(t, cfg)
	id := create(t, s).Id
	shell(t, s, id, "echo kept > kept; sync kept")
	dir := filepath.Join(cfg.Sandboxes, sandboxesDir, id)
	durable, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		t.Fatal(err)
	}
	pauseAndResume(t, s, id)
	reported, err := s.Pause(t.Context(), &agentv1.PauseSandboxRequest{Id: id, OperationId: newOp()})
	if err != nil {
		t.Fatal(err)
	}
	crash()
	m := machine(filepath.Join(dir, machineDir))
	man, err := m.load()
	if err != nil {
		t.Fatal(err)
	}
	boot := man.BootID
	man.Durable, man.BootID = false, "another boot"
	if err := errors.Join(
		m.writeManifest(thisBoot, *man),
		os.WriteFile(filepath.Join(dir, recordFile), []byte(strings.Replace(string(durable), boot, "another boot", 1)), 0o600),
		os.WriteFile(filepath.Join(dir, passingFile), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	s, _ = open(t, cfg)
	got, err := s.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if got.State != protoState[wrenn.SandboxPaused] || got.HasMemory || got.Reason == "" {
		t.Errorf("after a power cut: %v", got)
	}
	if got.Revision <= reported.Revision {
		t.Errorf("revision %d after %d: the control plane would take it for old", got.Revision, reported.Revision)
	}
	if _, err := s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: id, OperationId: newOp()}); err != nil {
		t.Fatal(err)
	}
	if got := shell(t, s, id, "cat kept"); got != "kept" {
		t.Errorf("the disk says %q", got)
	}
}
