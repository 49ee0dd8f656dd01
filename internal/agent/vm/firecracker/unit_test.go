//go:build linux

package firecracker

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func TestVersionsAreOrdered(t *testing.T) {
	t.Parallel()
	var all []version
	for _, s := range []string{"v1.16.1", "v1.7.0", "v1.17.0-dev", "v1.17.0", "v1.16.0"} {
		v, ok := parseVersion("Firecracker " + s + "\n")
		if !ok || "v"+v.String() != s {
			t.Fatalf("%s is read as %+v", s, v)
		}
		all = append(all, v)
	}
	slices.SortFunc(all, version.compare)
	if got := fmt.Sprint(all); got != "[1.7.0 1.16.0 1.16.1 1.17.0-dev 1.17.0]" {
		t.Error(got)
	}
	if _, ok := parseVersion("Firecracker of today"); ok {
		t.Error("a version was found where there is none")
	}
}

// program makes a program that tells a version as Firecracker and its jailer do.
func program(t *testing.T, path, name, version, format string) {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\ncase $1 in\n--version) echo '%s v%s';;\n--snapshot-version) echo v%s;;\nesac\n", name, version, format)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
}

func TestBinariesSideBySide(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	program(t, in("firecracker"), "Firecracker", "1.16.1", "10.0.0")
	program(t, in("jailer"), "Jailer", "1.16.1", "0")
	program(t, in("firecracker-v1.14.0-x86_64"), "Firecracker", "1.14.0", "8.0.0")
	program(t, in("jailer-v1.14.0-x86_64"), "Jailer", "1.13.0", "0") // of another release
	program(t, in("release-v1.12.0-x86_64/firecracker-v1.12.0-x86_64"), "Firecracker", "1.12.0", "6.0.0")
	program(t, in("release-v1.12.0-x86_64/jailer-v1.12.0-x86_64"), "Jailer", "1.12.0", "0")
	program(t, in("firecracker-v1.6.0-x86_64"), "Firecracker", "1.6.0", "5.0.0") // too old
	program(t, in("firecracker-v1.16.1.debug"), "Firecracker", "1.16.1", "10.0.0")
	program(t, in("firecracker-notes"), "Notes", "9.9.9", "9.0.0")
	all, err := find(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, b := range all {
		got = append(got, b.Version+" "+b.Format+" "+filepath.Base(b.Jailer))
	}
	if want := []string{"1.16.1 10.0.0 jailer", "1.14.0 8.0.0 .", "1.12.0 6.0.0 jailer-v1.12.0-x86_64"}; !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}

	d := New(Verdict{Binaries: all}, Options{})
	if caps := d.Capabilities(); caps.Version != "1.16.1" || len(caps.Others) != 2 || caps.Others[1].Version != "1.12.0" {
		t.Errorf("capabilities are %+v", caps)
	}
	for saved, want := range map[[2]string]string{
		{"1.12.0", "6.0.0"}: "1.12.0", {"1.16.0", "10.0.0"}: "1.16.1", {"1.16.1", "10.0.0"}: "1.16.1",
	} {
		if b, err := d.fitting(stateHeader{Version: saved[0], Format: saved[1]}); err != nil || b.Version != want {
			t.Errorf("a snapshot of %v is loaded by %s, %v; want %s", saved, b.Version, err, want)
		}
	}
	_, err = d.fitting(stateHeader{Version: "1.9.1", Format: "4.0.0"})
	if wrenn.KindOf(err) != wrenn.KindInvalidRequest || !strings.Contains(err.Error(), "1.9.1") {
		t.Errorf("a snapshot of a version that is not here: %v", err)
	}
}

func TestProbeSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	reason := func(dir, device string, unjailed bool) string {
		v, err := Probe(t.Context(), ProbeOptions{Dir: dir, Kernel: kernel, Unjailed: unjailed, device: device})
		if err != nil || v.Works {
			t.Errorf("%+v, %v", v, err)
		}
		return v.Reason
	}
	dir := t.TempDir()
	if got := reason(dir, "/dev/null", false); !strings.Contains(got, "no Firecracker 1.7") {
		t.Error(got)
	}
	program(t, filepath.Join(dir, "firecracker"), "Firecracker", "1.16.1", "10.0.0")
	if got := reason(dir, "/dev/null", false); !strings.Contains(got, "no jailer") || !strings.Contains(got, "AGENT_ALLOW_UNJAILED=1") {
		t.Error(got)
	}
	if got := reason(dir, "/nonexistent/kvm", true); !strings.Contains(got, "no KVM") {
		t.Error(got)
	}
}

func TestStateHeaderComesBack(t *testing.T) {
	t.Parallel()
	want := stateHeader{Version: "1.16.1", Format: "10.0.0", CPUTemplate: noTemplate, Arch: "amd64", CPUModel: "x", VCPUs: 2, MemoryMB: 256, Disks: 1}
	raw, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, headerSize)
	copy(page, stateMagic+string(raw)+"\n")
	if got, err := parseHeader(page); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{"", "\n", stateMagic + "\n", "wrenn-qemu-2 {}\n", stateMagic + "{}"} {
		if _, err := parseHeader([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add([]byte(stateMagic + `{"version":"1.16.1"}` + "\n"))
	f.Fuzz(func(_ *testing.T, page []byte) { _, _ = parseHeader(page) })
}

func TestAGuestCannotFillTheAgentsLog(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	log := slog.New(slog.NewTextHandler(&text, nil))
	var w warnings
	for range 1000 {
		w.logLine(log, []byte("2026-01-01T00:00:00 [sb-x:fc_vcpu 0:ERROR] Received signal 13, code 0."))
	}
	if got := strings.Count(text.String(), "signal 13"); got != warningsMost {
		t.Errorf("%d lines in the log, want %d", got, warningsMost)
	}
}

func TestMetricsTellOfTroubleOnly(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	log := slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: slog.LevelDebug}))
	logMetrics(log, []byte(`{"block":{"execute_fails":0,"read_count":7,"read_agg":{"min_us":1}},"seccomp":{"num_faults":2},"utc_timestamp_ms":1}`))
	logMetrics(log, []byte(`{"block":{"execute_fails":0}}`))
	logMetrics(log, []byte(`{"block":`))
	logMetrics(log, []byte(`{"net":{"rx_fails":3}}`))
	if got := text.String(); strings.Contains(got, "read_count") || strings.Contains(got, "execute_fails") || !strings.Contains(got, "net.rx_fails=3") || !strings.Contains(got, "seccomp.num_faults=2") {
		t.Error(got)
	}
}

func TestOnlyRestoredVMsOfNewReleasesHaveAPageServer(t *testing.T) {
	t.Parallel()
	restored := vm.Config{MemoryMB: 1000, VCPUs: 1, Restore: &vm.SnapshotFiles{}}
	for _, c := range []struct {
		memory string
		cfg    vm.Config
		minor  int
		want   bool
	}{
		{MemoryUffd, restored, 12, true}, {MemoryUffd, restored, 11, false}, {MemoryUffd, vm.Config{}, 12, false},
		{MemoryFile, restored, 12, false}, {"", restored, 12, false},
	} {
		s := &starting{driver: &Driver{opts: Options{Memory: c.memory}}, cfg: c.cfg, binary: Binary{version: version{Major: 1, Minor: c.minor}}}
		if got := s.paged(); got != c.want {
			t.Errorf("%q, release 1.%d: %v", c.memory, c.minor, got)
		}
	}
}

func TestWhereAProcessWrites(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "memory")
	to, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := to.Write(make([]byte, 12345)); err != nil {
		t.Fatal(err)
	}
	if at, ok := writesAt(os.Getpid(), path); !ok || at != 12345 {
		t.Errorf("%d, %v", at, ok)
	}
	to.Close()
	if at, ok := writesAt(os.Getpid(), path); ok {
		t.Errorf("a file that is only read is written at %d", at)
	}
}
