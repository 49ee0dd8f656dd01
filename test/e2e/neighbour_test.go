package e2e

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// attacks are what a hostile guest does with all its might, each until it is stopped.
func attacks() map[string]string {
	return map[string]string{
		"fork bomb":    `bomb() { bomb | bomb & }; bomb; sleep 1000`,
		"memory bomb":  `while :; do head -c 2G /dev/zero | tail >/dev/null; done`,
		"full disk":    `while :; do cat /dev/zero > "$HOME/fill" 2>/dev/null; rm -f "$HOME/fill"; done`,
		"fsync":        `while :; do dd if=/dev/zero of="$HOME/sync" bs=4k count=2000 oflag=dsync 2>/dev/null; done`,
		"packet flood": `exec 3>/dev/udp/172.31.255.1/9; while :; do dd if=/dev/zero bs=1400 >&3 2>/dev/null; done`,
		"busy CPU":     `for i in 1 2 3 4; do (while :; do :; done) & done; wait`,
	}
}

const (
	rounds    = 6                       // of a time without and a time with the attack
	roundTime = 1500 * time.Millisecond // each
)

// TestNeighbourUnderAttack holds a sandbox's exec latency against what it is while another is attacked from within.
// Others use a machine, too: times without and with the attack take turns, and the medians of all of them are
// compared. Only where somebody says that the machine is quiet.
func TestNeighbourUnderAttack(t *testing.T) {
	if os.Getenv("WRENN_TEST_ATTACK") == "" {
		t.Skip("measures latency: use make test-attack on a machine that has nothing else to do")
	}
	_, s := start(t)
	for name, script := range attacks() {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(5*time.Minute))
			defer cancel()
			neighbour := sandbox(ctx, t, s, wrenn.SandboxOptions{})
			latencies(ctx, t, neighbour) // its first commands are slower
			var before, during []time.Duration
			for range rounds {
				b, d := attack(ctx, t, s, neighbour, script)
				before, during = append(before, b...), append(during, d...)
			}
			t.Logf("exec takes %s without and %s with the attack (9 of 10: %s and %s; %d and %d commands)",
				quantile(before, 0.5), quantile(during, 0.5), quantile(before, 0.9), quantile(during, 0.9), len(before), len(during))
			if quantile(during, 0.5) > 2*quantile(before, 0.5) {
				t.Errorf("the attack makes a neighbour's exec %.1f times as slow", float64(quantile(during, 0.5))/float64(quantile(before, 0.5)))
			}
			if host, err := s.Admin.Host(ctx, s.HostID); err != nil || host.Status != "online" {
				t.Errorf("the host is %s, %v", host.Status, err)
			}
		})
	}
}

// attack measures a neighbour without and with an attack in another sandbox, which is deleted then.
func attack(ctx context.Context, t *testing.T, s *stack.Stack, neighbour *wrenn.Sandbox, script string) (before, during []time.Duration) {
	t.Helper()
	attacker := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	before = latencies(ctx, t, neighbour)
	if _, err := attacker.Background(ctx, wrenn.ExecOptions{Cmd: "bash", Args: []string{"-c", script}}); err != nil {
		t.Fatalf("the attack did not begin: %v", err)
	}
	used, begun := vmTime(t, s, attacker.ID), time.Now()
	during = latencies(ctx, t, neighbour)
	if share := float64(vmTime(t, s, attacker.ID)-used) / float64(time.Since(begun)); share < 0.03 {
		t.Errorf("the attacker's VM used only %.0f %% of a CPU: that is no attack", 100*share)
	} else {
		t.Logf("the attacker's VM uses %.0f %% of a CPU", 100*share)
	}
	// The agent answers: it makes a sandbox beside the attacker's, and ends both.
	begun = time.Now()
	other := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	for _, sb := range []*wrenn.Sandbox{other, attacker} {
		if _, err := sb.Delete(ctx); err != nil {
			t.Errorf("a sandbox cannot be deleted: %v", err)
		}
	}
	t.Logf("during the attack a sandbox was made, and both deleted, in %s", time.Since(begun).Round(time.Millisecond))
	return before, during
}

// latencies are the times of commands that do nothing, one after the other.
func latencies(ctx context.Context, t *testing.T, sb *wrenn.Sandbox) []time.Duration {
	t.Helper()
	var all []time.Duration
	for end := time.Now().Add(roundTime); time.Now().Before(end); {
		begun := time.Now()
		if _, err := sb.Shell(ctx, "true"); err != nil {
			t.Fatalf("the neighbour does not answer: %v", err)
		}
		all = append(all, time.Since(begun))
	}
	return all
}

func quantile(all []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[int(float64(len(sorted)-1)*q)].Round(time.Millisecond / 10)
}

var pidPattern = regexp.MustCompile(`"pid":\s*(\d+)`)

// vmTime is the CPU time of a sandbox's VMM so far; its agent's record tells the process.
func vmTime(t *testing.T, s *stack.Stack, id string) time.Duration {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(s.Dir, "sandboxes", "sandboxes", id, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range records {
		record, err := os.ReadFile(path)
		m := pidPattern.FindSubmatch(record)
		if err != nil || m == nil {
			continue
		}
		return cpuTime(t, string(m[1]))
	}
	t.Fatalf("no VMM in the records %q of %s", records, id)
	return 0
}

// cpuTime is that of a process (proc(5), /proc/PID/stat: utime and stime).
func cpuTime(t *testing.T, pid string) time.Duration {
	t.Helper()
	const tick = 10 * time.Millisecond // USER_HZ
	stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var sum int
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatalf("%s: %v", stat, err)
		}
		sum += n
	}
	return time.Duration(sum) * tick
}
