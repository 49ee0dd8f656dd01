package envd

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What the guest agent may take of a guest.
const (
	maxBinary   = 12 << 20
	maxResident = 15 << 20
)

// TestFootprint builds the program as `make build-envd` does and runs it: its size, and its resident
// memory when idle.
func TestFootprint(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("builds the program")
	}
	bin := filepath.Join(t.TempDir(), "envd")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", bin, "../../cmd/envd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	st, err := os.Stat(bin)
	if err != nil || st.Size() > maxBinary {
		t.Errorf("the program has %d bytes, at most %d are allowed (%v)", st.Size(), maxBinary, err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := lis.Addr().String()
	lis.Close()
	cmd := exec.Command(bin, "-listen", addr, "-state", "", "-cgroup", "")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	eventually(t, "the agent answers", func() bool {
		res, err := (&http.Client{Timeout: time.Second}).Get("http://" + addr + "/metrics")
		if err == nil {
			res.Body.Close()
		}
		return err == nil
	})
	status, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(status, []byte("VmRSS:"))
	kb, err := strconv.Atoi(strings.Fields(string(rest))[0])
	if err != nil || kb<<10 > maxResident {
		t.Errorf("%d KiB are resident, at most %d are allowed (%v)", kb, maxResident>>10, err)
	}
	t.Logf("program %d bytes, resident %d KiB", st.Size(), kb)
}

// The program must be told apart from the host's: it imports neither side's packages.
func TestImports(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", "../../cmd/envd").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		for _, foreign := range []string{"/internal/agent", "/internal/controlplane", "jackc/pgx", "redis/go-redis"} {
			if strings.Contains(line, foreign) {
				t.Errorf("envd depends on %s", line)
			}
		}
	}
}
