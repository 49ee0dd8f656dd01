package e2e

import (
	"context"
	"os"
	"slices"
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
		"packet flood": `while :; do printf '%1400s' x > /dev/udp/172.31.255.1/9 2>/dev/null; done`,
		"busy CPU":     `for i in 1 2 3 4; do (while :; do :; done) & done; wait`,
	}
}

// TestNeighbourUnderAttack holds a sandbox's exec latency against what it is while another is attacked from within.
// Others use a machine, too, so each comparison is with the time just before, and is made anew if it fails; and it is
// made only where somebody says that the machine is quiet.
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
			latency(ctx, t, neighbour) // its first commands are slower
			const tries = 3
			for try := 1; ; try++ {
				before, during := attack(ctx, t, s, neighbour, script)
				t.Logf("exec takes %s before, %s during", before, during)
				if during <= 2*before {
					break
				}
				if try == tries {
					t.Fatalf("exec takes %s before the attack and %s during it", before, during)
				}
			}
			if host, err := s.Admin.Host(ctx, s.HostID); err != nil || host.Status != "online" {
				t.Errorf("the host is %s, %v", host.Status, err)
			}
		})
	}
}

// attack measures a neighbour without and with an attack in another sandbox, which is deleted then.
func attack(ctx context.Context, t *testing.T, s *stack.Stack, neighbour *wrenn.Sandbox, script string) (before, during time.Duration) {
	t.Helper()
	attacker := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	before = latency(ctx, t, neighbour)
	if _, err := attacker.Background(ctx, wrenn.ExecOptions{Cmd: "bash", Args: []string{"-c", script}}); err != nil {
		t.Fatalf("the attack did not begin: %v", err)
	}
	during = latency(ctx, t, neighbour)
	if err := attacker.Refresh(ctx); err != nil {
		t.Errorf("the API does not answer: %v", err)
	}
	if _, err := attacker.Delete(ctx); err != nil {
		t.Errorf("the attacker cannot be deleted: %v", err)
	}
	return before, during
}

// latency is the median time of a command that does nothing.
func latency(ctx context.Context, t *testing.T, sb *wrenn.Sandbox) time.Duration {
	t.Helper()
	var all []time.Duration
	for range 15 {
		begun := time.Now()
		if _, err := sb.Shell(ctx, "true"); err != nil {
			t.Fatalf("the neighbour does not answer: %v", err)
		}
		all = append(all, time.Since(begun))
	}
	slices.Sort(all)
	return all[len(all)/2].Round(time.Millisecond / 10)
}
