package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// testConfig is an agent on this machine in a directory of its own, or a reason to skip.
func testConfig(t testing.TB) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: virtual machines get namespaces, mounts and cgroups")
	}
	env := map[string]string{"AGENT_EGRESS": "none", "AGENT_WARM_SLOTS": "2", "AGENT_WARM_VMS": "1", "AGENT_VOLUME_SIZE": "20G"}
	for variable, from := range map[string][2]string{
		"AGENT_KERNEL_PATH": {"WRENN_TEST_KERNEL", "../../.wrenn/kernels/vmlinuz"},
		"AGENT_IMAGES_PATH": {"WRENN_TEST_IMAGES", "../../.wrenn/images"},
	} {
		if env[variable] = os.Getenv(from[0]); env[variable] == "" {
			env[variable] = from[1]
		}
		if !exists(env[variable]) {
			t.Skipf("needs %s: run `make images`", env[variable])
		}
	}
	dir, err := os.MkdirTemp("", "wrenn-agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	env["AGENT_SANDBOXES_PATH"] = filepath.Join(dir, "sandboxes")
	for _, variable := range []string{"AGENT_FIRECRACKER_DIR", "AGENT_PROBE_SEC"} {
		env[variable] = os.Getenv(variable)
	}
	cfg, err := loadConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := killOrphans(cfg, nil)
		if err := errors.Join(err, network.Remove(context.Background(), cfg.Instance), storage.Unmount(cfg.Sandboxes), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return cfg
}

// open starts an agent without its RPC; the returned function ends it as a crash would: nothing is told.
func open(t testing.TB, cfg Config) (*Sandboxes, func()) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	h, err := openHost(t.Context(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	close := sync.OnceFunc(h.Close)
	t.Cleanup(close)
	return h.sandboxes, close
}

func request() *agentv1.CreateSandboxRequest {
	return &agentv1.CreateSandboxRequest{
		Id: wrenn.NewID(wrenn.PrefixSandbox), OperationId: wrenn.NewID(wrenn.PrefixOperation), Template: "minimal", Vcpus: 1, MemoryMb: 256,
		Env: map[string]string{"COLOR": "green"},
	}
}

func create(t testing.TB, s *Sandboxes) *agentv1.Sandbox {
	t.Helper()
	began := time.Now()
	sb, err := s.Create(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("create took %v (cold %v)", time.Since(began), sb.Cold)
	return sb
}

// shell runs a script in a sandbox as its default user and gives what it printed.
func shell(t *testing.T, s *Sandboxes, id, script string) string {
	t.Helper()
	sb, err := s.get(id)
	if err != nil {
		t.Fatal(err)
	}
	client, token, err := sb.running()
	if err != nil {
		t.Fatal(err)
	}
	procs := processconnect.NewProcessClient(guestHTTP{client, token}, "http://"+client.Host())
	stream, err := procs.Start(t.Context(), connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-lc", script}}}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var out strings.Builder
	for stream.Receive() {
		switch e := stream.Msg().Event.Event.(type) {
		case *process.ProcessEvent_Data:
			out.Write(e.Data.GetStdout())
			out.Write(e.Data.GetStderr())
		case *process.ProcessEvent_End:
			if e.End.ExitCode != 0 {
				t.Fatalf("%q: exit %d: %s", script, e.End.ExitCode, out.String())
			}
			return strings.TrimSpace(out.String())
		}
	}
	t.Fatalf("%q: the stream ended: %v", script, stream.Err())
	return ""
}

func TestLifeOfASandbox(t *testing.T) {
	cfg := testConfig(t)
	s, crash := open(t, cfg)
	sb := create(t, s)
	if got := shell(t, s, sb.Id, "echo $COLOR; id -un; hostname"); got != "green\nuser\n"+strings.TrimPrefix(sb.Id, "sb-") {
		t.Errorf("in the sandbox: %q", got)
	}
	other := create(t, s)
	if a, b := shell(t, s, sb.Id, "cat /etc/machine-id"), shell(t, s, other.Id, "cat /etc/machine-id"); a == b {
		t.Errorf("both have machine-id %s", a)
	}
	shell(t, s, sb.Id, "echo kept > kept; sleep 1000 > /dev/null 2>&1 & echo $! > pid")

	// The next agent takes over what runs.
	crash()
	s, crash = open(t, cfg)
	if got := shell(t, s, sb.Id, "cat kept; kill -0 $(cat pid) && echo alive"); got != "kept\nalive" {
		t.Errorf("after the agent was gone: %q", got)
	}

	pauseAndResume(t, s, sb.Id)
	if got := shell(t, s, sb.Id, "cat kept; kill -0 $(cat pid) && echo alive"); got != "kept\nalive" {
		t.Errorf("after a pause: %q", got)
	}

	if err := s.Delete(t.Context(), other.Id, "op-delete"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(other.Id); wrenn.KindOf(err) != wrenn.KindNotFound {
		t.Errorf("after delete: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(cfg.Sandboxes, "*", other.Id+"*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left on disk: %v, %v", left, err)
	}
	crash()
}

func pauseAndResume(t *testing.T, s *Sandboxes, id string) {
	t.Helper()
	began := time.Now()
	sb, err := s.Pause(t.Context(), &agentv1.PauseSandboxRequest{Id: id, OperationId: wrenn.NewID(wrenn.PrefixOperation)})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("pause took %v", time.Since(began))
	if sb.State != protoState[wrenn.SandboxPaused] || !sb.HasMemory {
		t.Errorf("paused: %v", sb)
	}
	began = time.Now()
	sb, err = s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: id, OperationId: newOp()})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("resume took %v", time.Since(began))
	if sb.State != protoState[wrenn.SandboxRunning] {
		t.Errorf("resumed: %v", sb)
	}
}

// Memory that nothing here can load any more does not cost the disk, which is booted on demand: of a paused sandbox,
// and of a checkpoint.
func TestMemoryThatDoesNotFit(t *testing.T) {
	cfg := testConfig(t)
	s, _ := open(t, cfg)
	sb := create(t, s)
	shell(t, s, sb.Id, "echo kept > kept; sleep 1000 > /dev/null 2>&1 & echo $! > pid; sync")
	id := wrenn.NewID(wrenn.PrefixCheckpoint)
	if _, err := s.Checkpoint(t.Context(), sb.Id, newOp(), id); err != nil {
		t.Fatal(err)
	}
	paused, err := s.Pause(t.Context(), &agentv1.PauseSandboxRequest{Id: sb.Id, OperationId: newOp()})
	if err != nil || !paused.HasMemory {
		t.Fatalf("pause: %v, %v", paused, err)
	}
	box, err := s.get(sb.Id)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []machine{box.machine(), (&moment{dir: filepath.Join(box.dir, checkpointsDir, id)}).machine()} {
		man, err := m.load()
		if err != nil {
			t.Fatal(err)
		}
		man.VMMVersion = "of another host"
		if err := m.writeManifest(forGood, *man); err != nil {
			t.Fatal(err)
		}
	}
	doesNotFit := func(err error) {
		t.Helper()
		if wrenn.KindOf(err) != wrenn.KindInvalidState || !strings.Contains(err.Error(), "of another host") {
			t.Errorf("with memory that does not fit: %v", err)
		}
	}
	_, err = s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: sb.Id, OperationId: newOp()})
	doesNotFit(err)
	if now, err := s.Get(sb.Id); err != nil || now.State != protoState[wrenn.SandboxPaused] || !now.HasMemory {
		t.Fatalf("after it: %v, %v", now, err)
	}
	op := newOp()
	for range 2 { // the second is a repeat
		now, err := s.Resume(t.Context(), &agentv1.ResumeSandboxRequest{Id: sb.Id, OperationId: op, DiskOnly: true})
		if err != nil || now.State != protoState[wrenn.SandboxRunning] {
			t.Fatalf("a resume without it: %v, %v", now, err)
		}
	}
	isBooted := func(id string) {
		t.Helper()
		if got := shell(t, s, id, "cat kept; kill -0 $(cat pid) 2>/dev/null || echo booted; hostname"); got != "kept\nbooted\n"+strings.TrimPrefix(id, "sb-") {
			t.Errorf("in the sandbox: %q", got)
		}
	}
	isBooted(sb.Id)
	pauseAndResume(t, s, sb.Id)

	req := request()
	req.Source = &agentv1.Source{Moment: &agentv1.Source_Checkpoint{Checkpoint: &agentv1.CheckpointRef{SandboxId: sb.Id, CheckpointId: id}}}
	_, err = s.Create(t.Context(), req)
	doesNotFit(err)
	req.Source.DiskOnly = true
	if child, err := s.Create(t.Context(), req); err != nil || !child.Cold {
		t.Fatalf("from a checkpoint's disk: %v, %v", child, err)
	}
	isBooted(req.Id)
}

func TestForkCheckpointAndRollback(t *testing.T) {
	cfg := testConfig(t)
	s, _ := open(t, cfg)
	parent := create(t, s)
	shell(t, s, parent.Id, "echo first > note; sleep 1000 > /dev/null 2>&1 & echo $! > pid")
	op := func() string { return wrenn.NewID(wrenn.PrefixOperation) }

	first := wrenn.NewID(wrenn.PrefixCheckpoint)
	began := time.Now()
	saved, err := s.Checkpoint(t.Context(), parent.Id, op(), first)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("checkpoint took %v: %v", time.Since(began), saved)
	if !saved.HasMemory || saved.SizeBytes == 0 || saved.OwnBytes > saved.SizeBytes {
		t.Errorf("checkpoint: %v", saved)
	}
	shell(t, s, parent.Id, "echo second > note")

	began = time.Now()
	children := []*agentv1.ForkSandboxRequest_Child{
		{Id: wrenn.NewID(wrenn.PrefixSandbox), OperationId: op()}, {Id: wrenn.NewID(wrenn.PrefixSandbox), OperationId: op()},
	}
	results, err := s.Fork(t.Context(), &agentv1.ForkSandboxRequest{Id: parent.Id, OperationId: op(), Children: children})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("fork into %d took %v", len(children), time.Since(began))
	source, err := s.Get(parent.Id)
	if err != nil {
		t.Fatal(err)
	}
	identities, tokens := map[string]bool{shell(t, s, parent.Id, "cat /etc/machine-id; hostname"): true}, map[string]bool{source.AccessToken: true}
	for i, r := range results {
		if r.Sandbox == nil {
			t.Fatalf("child %d: %s", i, r.ErrorMessage)
		}
		if got := shell(t, s, r.Sandbox.Id, "cat note; kill -0 $(cat pid) && echo alive"); got != "second\nalive" {
			t.Errorf("child %d: %q", i, got)
		}
		identities[shell(t, s, r.Sandbox.Id, "cat /etc/machine-id; hostname")] = true
		tokens[r.Sandbox.AccessToken] = true
	}
	if len(identities) != 3 || len(tokens) != 3 || tokens[""] {
		t.Errorf("twins: %v, %d tokens", identities, len(tokens))
	}

	left := wrenn.NewID(wrenn.PrefixCheckpoint)
	began = time.Now()
	if _, err := s.Rollback(t.Context(), &agentv1.RollbackSandboxRequest{Id: parent.Id, OperationId: op(), CheckpointId: first, KeepAs: left}); err != nil {
		t.Fatal(err)
	}
	t.Logf("rollback took %v", time.Since(began))
	if got := shell(t, s, parent.Id, "cat note; kill -0 $(cat pid) && echo alive"); got != "first\nalive" {
		t.Errorf("after a rollback: %q", got)
	}
	if _, err := s.Rollback(t.Context(), &agentv1.RollbackSandboxRequest{Id: parent.Id, OperationId: op(), CheckpointId: left}); err != nil {
		t.Fatal(err)
	}
	if got := shell(t, s, parent.Id, "cat note"); got != "second" {
		t.Errorf("forward again: %q", got)
	}
	if err := s.DeleteCheckpoint(t.Context(), parent.Id, op(), first); err != nil {
		t.Fatal(err)
	}
	list, err := s.Checkpoints(parent.Id)
	if err != nil || len(list) != 1 || list[0].Id != left || list[0].ParentId != first {
		t.Errorf("checkpoints: %v, %v", list, err)
	}

	// Another sandbox from the checkpoint that is left.
	req := request()
	req.Source = &agentv1.Source{Moment: &agentv1.Source_Checkpoint{Checkpoint: &agentv1.CheckpointRef{SandboxId: parent.Id, CheckpointId: left}}}
	again, err := s.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if got := shell(t, s, again.Id, "cat note"); got != "second" {
		t.Errorf("created from a checkpoint: %q", got)
	}
}

// TestARepeatedForkHasTheSameChildren repeats a fork while it is under way.
func TestARepeatedForkHasTheSameChildren(t *testing.T) {
	s, _ := open(t, testConfig(t))
	parent := create(t, s)
	req := &agentv1.ForkSandboxRequest{Id: parent.Id, OperationId: newOp()}
	for range 2 {
		req.Children = append(req.Children, &agentv1.ForkSandboxRequest_Child{Id: wrenn.NewID(wrenn.PrefixSandbox), OperationId: newOp()})
	}
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			results, err := s.Fork(t.Context(), req)
			if err != nil {
				t.Error(err)
				return
			}
			for i, r := range results {
				if r.Sandbox.GetId() != req.Children[i].Id {
					t.Errorf("child %d: %v", i, r)
				}
			}
		})
	}
	both.Wait()
	if list, _ := s.List(); len(list) != 3 {
		t.Errorf("%d sandboxes", len(list))
	}
}

// BenchmarkCreate measures a create to a guest that knows who it is: from a prepared template, and with a
// VM that is ready.
func BenchmarkCreate(b *testing.B) {
	for _, warm := range []int{0, 1} {
		b.Run(fmt.Sprintf("warm=%d", warm), func(b *testing.B) {
			cfg := testConfig(b)
			cfg.WarmVMs = warm
			s, _ := open(b, cfg)
			create(b, s)
			for b.Loop() {
				b.StopTimer()
				awaitReady(b, s)
				b.StartTimer()
				sb, err := s.Create(b.Context(), request())
				b.StopTimer()
				if err == nil {
					err = s.Delete(b.Context(), sb.Id, "op")
				}
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// awaitReady returns when the agent keeps as many VMs ready as it may.
func awaitReady(t testing.TB, s *Sandboxes) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, wanted := s.warm.next(); !wanted {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no virtual machine became ready")
		}
	}
}
