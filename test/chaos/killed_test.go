package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// cutOperation is an operation in whose midst the control plane is killed, at each of its points (fleet.go).
type cutOperation struct {
	name   string
	points []string
	paused bool // it is done to a paused sandbox
	do     func(ctx context.Context, c *wrenn.Client, v *subject) error
}

// subject is a sandbox under test. Its disk and its memory say "first" at its checkpoint, "second" now.
type subject struct {
	*wrenn.Sandbox
	op         cutOperation
	point      string
	checkpoint string
	snapshot   string
	err        error         // of the operation that was cut off
	answered   chan struct{} // it has ended
}

var allPoints = []string{".begun", ".sent", ".asked", ".written"}

func cutOperations() []cutOperation {
	return []cutOperation{
		{name: "create", points: allPoints, do: func(ctx context.Context, c *wrenn.Client, _ *subject) error {
			sb, err := c.CreateSandbox(ctx, size)
			if err == nil {
				_, err = sb.Shell(ctx, "true")
			}
			return err
		}},
		{name: "pause", points: allPoints, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error { return v.Pause(ctx, true) }},
		{name: "resume", points: allPoints, paused: true, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error { return v.Resume(ctx) }},
		{name: "checkpoint", points: allPoints, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error {
			_, err := v.Checkpoint(ctx, "")
			return err
		}},
		{name: "rollback", points: allPoints, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error {
			_, err := v.Rollback(ctx, v.checkpoint, false)
			return err
		}},
		{name: "fork", points: allPoints, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error {
			children, err := v.Fork(ctx, api.ForkRequest{Count: 2})
			for _, child := range children {
				if child.Err != nil {
					err = errors.Join(err, child.Err)
				}
			}
			return err
		}},
		{name: "snapshot", points: allPoints, do: func(ctx context.Context, c *wrenn.Client, v *subject) error {
			_, err := c.CreateSnapshot(ctx, api.CreateSnapshotRequest{SandboxID: v.ID})
			return err
		}},
		{name: "delete_checkpoint", points: allPoints[:3], do: func(ctx context.Context, _ *wrenn.Client, v *subject) error {
			return gone(v.DeleteCheckpoint(ctx, v.checkpoint))
		}},
		{name: "delete_snapshot", points: allPoints[:3], do: func(ctx context.Context, c *wrenn.Client, v *subject) error {
			return gone(c.DeleteSnapshot(ctx, v.snapshot))
		}},
		{name: "delete", points: allPoints, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error {
			_, err := v.Delete(ctx)
			return gone(err)
		}},
		{name: "events", points: []string{".published"}, do: func(ctx context.Context, _ *wrenn.Client, v *subject) error { return v.Pause(ctx, true) }},
	}
}

// gone takes it for done that there is nothing to be deleted any more.
func gone(err error) error {
	if wrenn.IsNotFound(err) {
		return nil
	}
	return err
}

var size = wrenn.SandboxOptions{MemoryMB: 256}

// inCI are the points at which most is half done; one more is drawn. A soak takes all.
var inCI = []string{"pause.sent", "rollback.asked", "fork.written"}

// atOnce is how many operations are cut off before it is looked what became of them.
const atOnce = 6

// TestKilledControlPlane kills the control plane, as `kill -9` does, in the midst of operations, and looks at
// what becomes of them when it is started again.
func TestKilledControlPlane(t *testing.T) {
	in, err := stack.FindInputs()
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	fault := filepath.Join(t.TempDir(), "fault")
	in.Bin = faultyPrograms(ctx, t, in.Bin)
	s, err := stack.Start(ctx, in, t.TempDir(), "WRENN_FAULT_FILE="+fault)
	if err != nil {
		t.Fatal(err, s.Logs())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(s.Logs())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for part := range slices.Chunk(chosen(t), atOnce) {
		k := &killer{t: t, s: s, fault: fault}
		for _, v := range part {
			k.prepare(ctx, v)
		}
		for _, v := range part {
			k.cut(ctx, v)
		}
		for _, v := range part {
			k.check(ctx, v)
		}
		k.nothingLeft(ctx)
	}
}

// chosen are the cases of this run: WRENN_CHAOS_POINT, if that is set, else as said above.
func chosen(t *testing.T) []*subject {
	t.Helper()
	var all []*subject
	for _, op := range cutOperations() {
		for _, point := range op.points {
			all = append(all, &subject{op: op, point: op.name + point, answered: make(chan struct{})})
		}
	}
	if os.Getenv("WRENN_SOAK") != "" {
		return all
	}
	seed := setting(t, "WRENN_CHAOS_SEED", int(time.Now().UnixNano()%1_000_000))
	drawn := rand.New(rand.NewPCG(uint64(seed), 0)).IntN(len(all))
	t.Logf("WRENN_CHAOS_SEED=%d draws %s", seed, all[drawn].point)
	only := os.Getenv("WRENN_CHAOS_POINT")
	var some []*subject
	for i, v := range all {
		if only == v.point || only == "" && (i == drawn || slices.Contains(inCI, v.point)) {
			some = append(some, v)
		}
	}
	return some
}

// faultyPrograms are the built programs, but for a control plane that can be killed at a point.
func faultyPrograms(ctx context.Context, t *testing.T, bin string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(ctx, "go", "build", "-tags", "faults", "-o", filepath.Join(dir, "wrenn-cp"), "github.com/wrenn-sandbox/wrenn/cmd/wrenn-cp")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build wrenn-cp: %v\n%s", err, out)
	}
	if err := os.Symlink(filepath.Join(bin, "wrenn-agent"), filepath.Join(dir, "wrenn-agent")); err != nil {
		t.Fatal(err)
	}
	return dir
}

type killer struct {
	t     *testing.T
	s     *stack.Stack
	fault string // the file that names the point
}

// shell runs a command in a subject that runs.
func (k *killer) shell(ctx context.Context, v *subject, script string) string {
	k.t.Helper()
	res, err := v.Shell(ctx, script)
	if err != nil {
		k.t.Fatalf("%s: %q: %v", v.point, script, err)
	}
	return strings.TrimSpace(string(res.Stdout))
}

func (k *killer) must(v *subject, err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatalf("%s: %v", v.point, err)
	}
}

// prepare makes the subject as its operation wants it.
func (k *killer) prepare(ctx context.Context, v *subject) {
	var err error
	v.Sandbox, err = k.s.Client.CreateSandbox(ctx, size)
	k.must(v, err)
	k.shell(ctx, v, mark("first"))
	if v.op.name == "rollback" || v.op.name == "delete_checkpoint" {
		c, err := v.Checkpoint(ctx, "")
		k.must(v, err)
		v.checkpoint = c.ID
	}
	if v.op.name == "delete_snapshot" {
		s, err := k.s.Client.CreateSnapshot(ctx, api.CreateSnapshotRequest{SandboxID: v.ID})
		k.must(v, err)
		v.snapshot = s.Name
	}
	k.shell(ctx, v, mark("second"))
	if v.op.paused {
		k.must(v, v.Pause(ctx, true))
	}
}

func mark(word string) string {
	return fmt.Sprintf("echo %s > mark; sync mark; echo %s > /dev/shm/mark", word, word)
}

// cut has the operation begin and the control plane killed when it comes to the point, and starts that again.
// The client repeats its request meanwhile, as it does.
func (k *killer) cut(ctx context.Context, v *subject) {
	k.must(v, os.WriteFile(k.fault, []byte(v.point), 0o600))
	go func() {
		defer close(v.answered)
		v.err = v.op.do(ctx, k.s.Client, v)
	}()
	select {
	case <-k.s.ControlPlane.Ended():
	case <-ctx.Done():
		k.t.Fatalf("%s: the control plane was not killed", v.point)
	case <-time.After(time.Minute):
		k.t.Fatalf("%s: the control plane was not killed; the operation: %v", v.point, v.err)
	}
	k.must(v, k.s.StartControlPlane(ctx))
}

// settleWithin is how long a sandbox may be in the state of an operation that was cut off: a lease, and some.
const settleWithin = 30 * time.Second

// check sees that a subject is in its old state or its new one, and can be worked with.
func (k *killer) check(ctx context.Context, v *subject) {
	<-v.answered
	began, deleted := time.Now(), false
	err := stack.Eventually(ctx, settleWithin, func() error {
		err := v.Refresh(ctx)
		if deleted = wrenn.IsNotFound(err); deleted {
			return nil
		}
		if err == nil && v.Status != api.SandboxStatusRunning && v.Status != api.SandboxStatusPaused {
			err = fmt.Errorf("it is still %s", v.Status)
		}
		return err
	})
	k.t.Logf("%s: answered with %v, %s after %v", v.point, v.err, v.Status, time.Since(began).Round(time.Millisecond))
	switch {
	case err != nil:
		k.t.Errorf("%s: %v", v.point, err)
	case v.op.name == "delete":
		k.must(v, v.op.do(ctx, k.s.Client, v))
	case deleted:
		k.t.Errorf("%s: the sandbox is gone", v.point)
	default:
		k.use(ctx, v)
	}
}

// use works with a subject that is in one of its states.
func (k *killer) use(ctx context.Context, v *subject) {
	want := map[string]api.SandboxStatus{"pause": api.SandboxStatusPaused, "resume": api.SandboxStatusRunning, "rollback": api.SandboxStatusRunning}[v.op.name]
	if v.err == nil && want != "" && v.Status != want {
		k.t.Errorf("%s: it was answered, but the sandbox is %s", v.point, v.Status)
	}
	if v.Status == api.SandboxStatusPaused {
		k.must(v, v.Resume(ctx))
	}
	now := k.shell(ctx, v, "cat mark")
	if shm := k.shell(ctx, v, "cat /dev/shm/mark"); shm != now {
		k.t.Errorf("%s: the disk says %q, the memory %q", v.point, now, shm)
	}
	if want := "second"; now != want && (v.op.name != "rollback" || now != "first") || v.op.name == "rollback" && v.err == nil && now != "first" {
		k.t.Errorf("%s: it says %q; the operation ended with %v", v.point, now, v.err)
	}
	k.must(v, v.Pause(ctx, true))
	if !v.op.paused {
		k.must(v, v.Resume(ctx))
	}
	k.must(v, v.op.do(ctx, k.s.Client, v)) // it can be done now
	k.sameCheckpoints(ctx, v)
}

// sameCheckpoints sees that the host has the checkpoints that the API tells of, and no others.
func (k *killer) sameCheckpoints(ctx context.Context, v *subject) {
	err := stack.Eventually(ctx, settleWithin, func() error {
		list, err := v.Checkpoints(ctx)
		if err != nil {
			return err
		}
		told := map[string]bool{}
		for _, c := range list {
			told[c.ID] = !c.Missing
		}
		dirs, err := filepath.Glob(filepath.Join(k.s.Dir, "sandboxes", "sandboxes", v.ID, "checkpoints", "*"))
		for _, dir := range dirs {
			if id := filepath.Base(dir); !told[id] {
				err = errors.Join(err, fmt.Errorf("only the host has %s", id))
			}
			delete(told, filepath.Base(dir))
		}
		if len(told) > 0 {
			err = errors.Join(err, fmt.Errorf("only the API has %v", told))
		}
		return err
	})
	if err != nil {
		k.t.Errorf("%s: %v", v.point, err)
	}
}

// nothingLeft deletes all there is, and looks for what is left on the host and in the database.
func (k *killer) nothingLeft(ctx context.Context) {
	c := k.s.Client
	err := stack.Eventually(ctx, 2*settleWithin, func() error {
		var wg sync.WaitGroup
		for sb, err := range c.Sandboxes(ctx, wrenn.SandboxFilter{}) {
			if err != nil {
				return err
			}
			wg.Go(func() { _, _ = sb.Delete(ctx) }) // one that is at work is deleted next time
		}
		wg.Wait()
		for s, err := range c.Snapshots(ctx, api.SnapshotTypeSnapshot) {
			if err != nil {
				return err
			}
			if err := c.DeleteSnapshot(ctx, s.Name); err != nil {
				return err
			}
		}
		return errors.Join(k.rowsLeft(ctx), k.filesLeft(), k.s.CheckIdle())
	})
	if err != nil {
		k.t.Error(err)
	}
}

func (k *killer) filesLeft() (err error) {
	for _, dir := range []string{"sandboxes", "snapshots", "forks", "trash"} {
		left, one := filepath.Glob(filepath.Join(k.s.Dir, "sandboxes", dir, "*"))
		if err = errors.Join(err, one); len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("left on the host: %v", left))
		}
	}
	return err
}

// rowsLeft tells of rows that still stand for something.
func (k *killer) rowsLeft(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, k.s.Postgres.URL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, `SELECT id || ' ' || status FROM sandboxes WHERE deleted_at IS NULL OR cleanup_pending
		UNION ALL SELECT id || ' ' || status FROM checkpoints WHERE deleted_at IS NULL
		UNION ALL SELECT id || ' ' || status FROM snapshots WHERE deleted_at IS NULL
		UNION ALL SELECT 'event ' || type FROM events WHERE published_at IS NULL`)
	if err != nil {
		return err
	}
	left, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("rows left: %v", left)
	}
	return err
}
