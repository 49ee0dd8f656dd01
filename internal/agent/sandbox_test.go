package agent

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func TestOneOperationAtATimeAndRepeatsJoin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sb := &sandbox{id: "sb-x"}
		var now, most, runs atomic.Int32
		work := func(context.Context) error {
			most.Store(max(most.Load(), now.Add(1)))
			time.Sleep(time.Second)
			now.Add(-1)
			runs.Add(1)
			return nil
		}
		var all sync.WaitGroup
		for _, op := range []string{"a", "b", "a", "c", "a"} {
			all.Go(func() {
				if err := sb.do(t.Context(), op, work); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if most.Load() != 1 {
			t.Errorf("%d operations at a time", most.Load())
		}
		// Repeats that come while the first is in progress join it; later ones ask their own work to notice.
		if n := runs.Load(); n < 3 || n > 5 {
			t.Errorf("%d runs", n)
		}
	})
}

func TestACallerThatLeavesCancelsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sb := &sandbox{id: "sb-x"}
		ctx, cancel := context.WithCancel(t.Context())
		finished := make(chan struct{})
		go func() {
			synctest.Wait()
			cancel()
		}()
		err := sb.do(ctx, "a", func(ctx context.Context) error {
			defer close(finished)
			select {
			case <-ctx.Done():
				t.Error("the operation was cancelled with its caller")
			case <-time.After(time.Minute):
			}
			return nil
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the caller got %v", err)
		}
		<-finished
	})
}

func TestRecordSurvivesAndDamageIsSeen(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), wrenn.NewID(wrenn.PrefixSandbox))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := newRecord(&agentv1.CreateSandboxRequest{Id: filepath.Base(dir), OperationId: "op", Template: "minimal", Vcpus: 1, MemoryMb: 256})
	r.VM = &vm.Handle{Version: 1, PID: 7, Driver: "qemu"}
	if err := r.save(dir, forGood); err != nil {
		t.Fatal(err)
	}
	got, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&r, got); d != "" {
		t.Error(d)
	}
	path := filepath.Join(dir, recordFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"cut":           string(whole[:len(whole)/2]),
		"empty":         "",
		"newer version": strings.Replace(string(whole), `"version": 1`, `"version": 2`, 1),
		"other sandbox": strings.Replace(string(whole), r.ID, wrenn.NewID(wrenn.PrefixSandbox), 1),
		"no such state": strings.Replace(string(whole), `"creating"`, `"dancing"`, 1),
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := loadRecord(dir); err == nil {
			t.Errorf("%s: read as %+v", name, got)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("leftovers of saving: %v, %v", entries, err)
	}
}

// TestRecordOfThisBoot: what need not survive a power cut counts until there is one, and no longer than until
// something newer was written for good.
func TestRecordOfThisBoot(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), wrenn.NewID(wrenn.PrefixSandbox))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := newRecord(&agentv1.CreateSandboxRequest{Id: filepath.Base(dir), OperationId: "op", Template: "minimal", Vcpus: 1, MemoryMb: 256})
	passing := filepath.Join(dir, passingFile)
	var written []byte
	steps := []struct {
		name   string
		do     func() error
		reason string // that is read then
	}{
		{"for good", func() error { r.Reason = "first"; return r.save(dir, forGood) }, "first"},
		{"passing", func() error { r.Reason = "second"; return r.save(dir, thisBoot) }, "second"},
		{"passing again", func() error { r.Reason = "third"; return r.save(dir, thisBoot) }, "third"},
		{"a power cut", func() (err error) {
			if written, err = os.ReadFile(passing); err != nil {
				return err
			}
			return os.WriteFile(passing, bytes.Replace(written, []byte(r.BootID), []byte("another boot"), 1), 0o600)
		}, "first"},
		{"a power cut that left no content", func() error { return os.WriteFile(passing, make([]byte, len(written)), 0o600) }, "first"},
		{"no power cut", func() error { return os.WriteFile(passing, written, 0o600) }, "third"},
		{"for good again", func() error { r.Reason = "fourth"; return r.save(dir, forGood) }, "fourth"},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got, err := loadRecord(dir); err != nil || got.Reason != step.reason {
			t.Errorf("%s: %+v, %v; want %q", step.name, got, err, step.reason)
		}
	}
}

func TestActivity(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var a activity
		end := a.begin()
		time.Sleep(time.Hour)
		if open, last := a.state(); !open || time.Since(last) != 0 {
			t.Errorf("while open: %v, %v ago", open, time.Since(last))
		}
		end()
		end() // twice is once
		time.Sleep(time.Minute)
		if open, last := a.state(); open || time.Since(last) != time.Minute {
			t.Errorf("after: %v, %v ago", open, time.Since(last))
		}
	})
}

func TestOnlyPublicGuestRoutesPass(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"/process.Process/Start": true, "/filesystem.Filesystem/Stat": true, "/files": true, "/files/compose": true, "/metrics": true,
		"/init": false, "/freeze": false, "/unfreeze": false, "/fsfreeze": false, "/fsthaw": false, "/shutdown": false, "/collapse": false,
		"": false, "/": false, "/filesx": false, "/files/../init": false, "//init": false, "/process.Process": false,
	} {
		if got := isGuestPath(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

func TestCreateRequestsAreBounded(t *testing.T) {
	t.Parallel()
	good := func() *agentv1.CreateSandboxRequest {
		return &agentv1.CreateSandboxRequest{Id: wrenn.NewID(wrenn.PrefixSandbox), OperationId: "op", Template: "minimal", Vcpus: 1, MemoryMb: 256}
	}
	if err := validateCreate(good()); err != nil {
		t.Fatal(err)
	}
	for field, spoil := range map[string]func(*agentv1.CreateSandboxRequest){
		"id":           func(r *agentv1.CreateSandboxRequest) { r.Id = "sb-../../etc/passwd" },
		"operation_id": func(r *agentv1.CreateSandboxRequest) { r.OperationId = "" },
		"template":     func(r *agentv1.CreateSandboxRequest) { r.Template = "../minimal" },
		"vcpus":        func(r *agentv1.CreateSandboxRequest) { r.Vcpus = 10_000 },
		"memory_mb":    func(r *agentv1.CreateSandboxRequest) { r.MemoryMb = 1 << 40 },
		"disk_mb":      func(r *agentv1.CreateSandboxRequest) { r.DiskMb = 1 << 50 },
	} {
		r := good()
		spoil(r)
		err := validateCreate(r)
		if wrenn.KindOf(err) != wrenn.KindInvalidRequest || wrenn.Public(err).Details["field"] != field {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]int64{"": 0, "1": 1, "5K": 5 << 10, "50G": 50 << 30, "50GiB": 50 << 30, "2t": 2 << 40, "7mb": 7 << 20} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"-1", "G", "1.5G", "9999999999G", "50X", "0"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) { // no input makes it panic or negative
		if n, err := parseSize(rapid.String().Draw(t, "size")); err == nil && n < 0 {
			t.Fatalf("%d", n)
		}
	})
}

func TestConfigSaysWhichVariableIsWrong(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]string{
		"AGENT_CP_URL": "cp-host:8000", "AGENT_LISTEN_ADDR": "50051", "AGENT_EGRESS": "some", "AGENT_STORAGE": "tape",
		"AGENT_VOLUME_SIZE": "big", "AGENT_MAX_SANDBOXES": "0", "AGENT_HEARTBEAT_SEC": "3600",
		"AGENT_FIRECRACKER_MEMORY": "disk",
	} {
		_, err := loadConfig(func(n string) string {
			if n == name {
				return value
			}
			return ""
		})
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), value) {
			t.Errorf("%s=%s: %v", name, value, err)
		}
	}
	cfg, err := loadConfig(func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TokenFile != "/var/lib/wrenn/host-token" || cfg.Listen != ":50051" {
		t.Errorf("defaults: %+v", cfg)
	}
}

func TestManifestSaysWhatDoesNotFit(t *testing.T) {
	t.Parallel()
	caps := vm.Capabilities{Driver: "qemu", Version: "7.2.22", Acceleration: "tcg", Arch: "amd64", CPUModel: "tcg-max"}
	man := manifest{needs: needsOf(caps)}
	if err := man.fits(caps); err != nil {
		t.Error(err)
	}
	caps.Version = "10.0.2"
	err := man.fits(caps)
	if wrenn.KindOf(err) != wrenn.KindInvalidState || !strings.Contains(err.Error(), "7.2.22") || !strings.Contains(err.Error(), "10.0.2") {
		t.Error(err)
	}
}

func TestHostOfToken(t *testing.T) {
	t.Parallel()
	for _, token := range []string{"", "a.b", "a.b.c", "e30.e30.e30", "x.eyJzdWIiOiJob3N0LWEiLCJ0eXAiOiJob3N0In0.y"} {
		if id, err := hostOf(token); err == nil {
			t.Errorf("%q gives %q", token, id)
		}
	}
}
