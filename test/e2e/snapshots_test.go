package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

const (
	begin  = "echo first > note; sleep 1000 > /dev/null 2>&1 & echo $! > pid"
	stands = "cat note; kill -0 $(cat pid) && echo alive"
)

func TestForkGoesOnFromThisMoment(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	src := sandbox(ctx, t, s, wrenn.SandboxOptions{MemoryMB: 256, Env: map[string]string{"COLOR": "green"}})
	shell(ctx, t, src, begin)
	children, err := src.Fork(ctx, api.ForkRequest{Count: 3, Name: "kid", Env: map[string]string{"ROLE": "child"}})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{shell(ctx, t, src, "cat /etc/machine-id; hostname"): true}
	for i, c := range children {
		if c.Err != nil {
			t.Fatalf("child %d: %v", i, c.Err)
		}
		t.Cleanup(func() { _, _ = c.Sandbox.Delete(t.Context()) })
		if got := shell(ctx, t, c.Sandbox, stands+"; echo $COLOR $ROLE"); got != "first\nalive\ngreen child" {
			t.Errorf("child %d: %q", i, got)
		}
		seen[shell(ctx, t, c.Sandbox, "cat /etc/machine-id; hostname")] = true
	}
	if len(seen) != 4 {
		t.Errorf("twins: %v", seen)
	}
	shell(ctx, t, children[0].Sandbox, "echo changed > note")
	if got := shell(ctx, t, src, stands); got != "first\nalive" {
		t.Errorf("the source: %q", got)
	}
}

func TestCheckpointsGoBackAndForth(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{MemoryMB: 256})
	shell(ctx, t, sb, begin)
	first, err := sb.Checkpoint(ctx, "first")
	if err != nil {
		t.Fatal(err)
	}
	shell(ctx, t, sb, "echo second > note; kill $(cat pid)")
	leftAs, err := sb.Rollback(ctx, first.ID, false)
	if err != nil || sb.Status != api.SandboxStatusRunning {
		t.Fatalf("rollback: %v, %s", err, sb.Status)
	}
	if got := shell(ctx, t, sb, stands); got != "first\nalive" {
		t.Errorf("after a rollback: %q", got)
	}
	list, err := sb.Checkpoints(ctx)
	if err != nil || len(list) != 2 || list[1].ID != leftAs || list[1].ParentID != first.ID || !list[0].Memory || list[0].SizeBytes == 0 {
		t.Errorf("checkpoints: %+v, %v", list, err)
	}

	// A sandbox of its own from the state that was left.
	other := sandbox(ctx, t, s, wrenn.SandboxOptions{From: leftAs})
	if got := shell(ctx, t, other, "cat note"); got != "second" {
		t.Errorf("from a checkpoint: %q", got)
	}

	// What is not needed any more goes, and nothing breaks. A paused one is saved and taken back as well.
	if err := sb.DeleteCheckpoint(ctx, first.ID); err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(ctx, true); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Rollback(ctx, leftAs, true); err != nil {
		t.Fatal(err)
	}
	if got := shell(ctx, t, sb, "cat note"); got != "second" {
		t.Errorf("forward again: %q", got)
	}
	use, err := sb.Storage(ctx)
	if err != nil || use.Disk.SizeBytes == 0 || len(use.Checkpoints) != 1 || use.Total.OwnBytes > use.Total.SizeBytes {
		t.Errorf("storage: %+v, %v", use, err)
	}
}

func TestSnapshotIsATemplateOfTheTeam(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	src := sandbox(ctx, t, s, wrenn.SandboxOptions{MemoryMB: 256})
	shell(ctx, t, src, begin)
	snap, err := s.Client.CreateSnapshot(ctx, api.CreateSnapshotRequest{SandboxID: src.ID, Name: "e2e-ready"})
	if err != nil {
		t.Fatal(err)
	}
	shell(ctx, t, src, "echo later > note")
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{Template: snap.Name})
	if got := shell(ctx, t, sb, stands); got != "first\nalive" || sb.MemoryMB != 256 {
		t.Errorf("from a snapshot: %q, %d MB", got, sb.MemoryMB)
	}
	if err := s.Client.DeleteSnapshot(ctx, snap.Name); wrenn.CodeOf(err) != wrenn.CodeInUse {
		t.Errorf("a snapshot in use: %v", err)
	}
	if _, err := sb.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Client.DeleteSnapshot(ctx, snap.Name); err != nil {
		t.Errorf("a snapshot that nobody uses: %v", err)
	}
	if got := shell(ctx, t, src, "cat note"); got != "later" {
		t.Errorf("the source: %q", got)
	}
}

// Fifty requests at once wake a sandbox once: with its memory, and from its disk alone.
func TestRequestsWakeASandbox(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{AutoResume: true, MemoryMB: 256})
	shell(ctx, t, sb, begin)
	for _, memory := range []bool{true, false} {
		if err := sb.Pause(ctx, memory); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if res, err := sb.Exec(ctx, "cat", "note"); err != nil || string(res.Stdout) != "first\n" {
					t.Errorf("memory %v: %v, %v", memory, res, err)
				}
			})
		}
		all.Wait()
		t.Logf("memory %v: 50 requests were answered within %v", memory, time.Since(began))
	}
	if _, err := sb.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	woken := 0
	for e, err := range s.Client.Events(ctx, wrenn.EventOptions{All: true, Subject: sb.ID}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Type == "sandbox.resuming" {
			woken++
		}
		if e.Type == "sandbox.deleted" {
			break
		}
	}
	if woken != 2 {
		t.Errorf("it was woken %d times, paused twice", woken)
	}

	pause := sandbox(ctx, t, s, wrenn.SandboxOptions{AutoResume: true, MemoryMB: 256, TimeoutSec: 2})
	err := stack.Eventually(ctx, time.Minute, func() error {
		if err := pause.Refresh(ctx); err != nil || pause.Status != api.SandboxStatusPaused {
			return fmt.Errorf("it is %s (%w)", pause.Status, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pause.Files().Mkdir(ctx, "woken"); err != nil {
		t.Errorf("a file request: %v", err)
	}
}

// What takes its time says where it is: the first create of a size, a checkpoint of much memory, a fork.
func TestProgressOfSlowOperations(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	var mu sync.Mutex
	var told []api.Progress
	showing := wrenn.WithProgress(ctx, func(p api.Progress) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, p)
	})
	// taken gives what was told since the last time, and checks that it is of one operation.
	taken := func(operation api.ProgressOperation) map[string]api.Progress {
		mu.Lock()
		defer mu.Unlock()
		steps := map[string]api.Progress{} // the last of each
		for _, p := range told {
			if p.Operation != operation || p.OperationID != told[0].OperationID || p.Request == "" || p.Done > p.Total {
				t.Errorf("of a %s: %+v", operation, p)
			}
			steps[p.Step] = p
		}
		t.Logf("%s: %d events: %+v", operation, len(told), told)
		told = nil
		return steps
	}

	listening, stop := context.WithCancel(ctx)
	defer stop()
	order := make(chan api.Event, 1000)
	go func() {
		defer close(order)
		for e, err := range s.Client.Events(listening, wrenn.EventOptions{}) {
			if err != nil {
				return
			}
			order <- e
		}
	}()
	sb := sandbox(showing, t, s, wrenn.SandboxOptions{MemoryMB: 640})
	if !sb.Cold {
		t.Error("it is of a size that was there before")
	}
	if steps := taken(api.ProgressOperationCreate); steps["booting"].Step == "" {
		t.Errorf("a create that booted its template told %v", steps)
	}
	booting := false
	for e := range order {
		if p, ok := wrenn.ProgressOf(e); ok && e.Subject == sb.ID && p.Step == "booting" {
			booting = true
		}
		if e.Subject == sb.ID && e.Type == "sandbox.running" {
			break
		}
	}
	stop()
	if !booting {
		t.Error("nothing was told before the sandbox ran")
	}

	shell(ctx, t, sb, "head -c 280M /dev/urandom > /dev/shm/data")
	if _, err := sb.Checkpoint(showing, ""); err != nil {
		t.Fatal(err)
	}
	if steps := taken(api.ProgressOperationCheckpoint); len(steps) == 0 {
		t.Error("a checkpoint of 280 MB told nothing")
	} else if p := steps["saving_memory"]; p.Step != "" && (p.Unit != api.ProgressUnitBytes || p.Total != 640<<20) {
		t.Errorf("saving memory: %+v", p)
	}

	small := sandbox(ctx, t, s, wrenn.SandboxOptions{MemoryMB: 256})
	children, err := small.Fork(showing, api.ForkRequest{Count: 5})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range children {
		if c.Err != nil {
			t.Error(c.Err)
			continue
		}
		t.Cleanup(func() { _, _ = c.Sandbox.Delete(context.WithoutCancel(ctx)) })
	}
	if p := taken(api.ProgressOperationFork)["starting_children"]; p.Total != 5 || p.Unit != api.ProgressUnitSandboxes {
		t.Errorf("of a fork into 5: %+v", p)
	}
}

// Whichever way a machine came to run, what it draws by chance is its own and its clock is right.
func TestClonesAreNobodysTwins(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	const draw = `head -c 16 /dev/urandom | od -An -tx1; uuidgen 2>/dev/null || cat /proc/sys/kernel/random/uuid; python3 -c 'import random; print(random.getrandbits(64))'`
	seen := map[string]string{} // what was drawn, by whom
	look := func(way string, sb *wrenn.Sandbox) {
		t.Helper()
		for _, drawn := range strings.Split(shell(ctx, t, sb, draw), "\n") {
			if before, twice := seen[drawn]; twice || len(drawn) < 8 {
				t.Errorf("%s draws %q, as %s", way, drawn, before)
			}
			seen[drawn] = way
		}
		checkClock(ctx, t, way, sb)
	}
	a := sandbox(ctx, t, s, wrenn.SandboxOptions{Template: "base", MemoryMB: 256})
	look("a create", a)
	look("another create", sandbox(ctx, t, s, wrenn.SandboxOptions{Template: "base", MemoryMB: 256}))
	point, err := a.Checkpoint(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	look("after a checkpoint", a)
	children, err := a.Fork(ctx, api.ForkRequest{Count: 2})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range children {
		if c.Err != nil {
			t.Fatal(c.Err)
		}
		t.Cleanup(func() { _, _ = c.Sandbox.Delete(context.WithoutCancel(ctx)) })
		look("a fork", c.Sandbox)
	}
	look("from a checkpoint", sandbox(ctx, t, s, wrenn.SandboxOptions{From: point.ID}))
	for range 2 {
		if _, err := a.Rollback(ctx, point.ID, true); err != nil {
			t.Fatal(err)
		}
		look("after a rollback", a)
	}
	for _, memory := range []bool{true, false} {
		if err := errors.Join(a.Pause(ctx, memory), a.Resume(ctx)); err != nil {
			t.Fatal(err)
		}
		look("after a resume", a)
	}
}
