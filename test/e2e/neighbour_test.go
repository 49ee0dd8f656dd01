package e2e

import (
	"context"
	"slices"
	"testing"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
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
// Others may use this machine, too, so the comparison is with the time just before, and is made anew if it fails.
func TestNeighbourUnderAttack(t *testing.T) {
	ctx, s := start(t)
	neighbour := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	latency(ctx, t, neighbour) // its first commands are slower
	for name, script := range attacks() {
		t.Run(name, func(t *testing.T) {
			attacker := sandbox(ctx, t, s, wrenn.SandboxOptions{})
			const tries = 4
			for try := 1; ; try++ {
				before := latency(ctx, t, neighbour)
				// The attack outlives a bash that its own memory hunger kills.
				if _, err := attacker.Background(ctx, wrenn.ExecOptions{Cmd: "bash", Args: []string{"-c", script}}); err != nil && try == 1 {
					t.Fatalf("the attack did not begin: %v", err)
				}
				during := latency(ctx, t, neighbour)
				t.Logf("exec takes %s before, %s during", before, during)
				if during <= 2*before {
					break
				}
				if try == tries {
					t.Errorf("exec takes %s before the attack and %s during it", before, during)
					break
				}
			}
			if err := attacker.Refresh(ctx); err != nil {
				t.Errorf("the API does not answer: %v", err)
			}
			if host, err := s.Admin.Host(ctx, s.HostID); err != nil || host.Status != "online" {
				t.Errorf("the host is %s, %v", host.Status, err)
			}
		})
	}
}

// latency is the median time of a command that does nothing.
func latency(ctx context.Context, t *testing.T, sb *wrenn.Sandbox) time.Duration {
	t.Helper()
	var all []time.Duration
	for range 21 {
		begun := time.Now()
		if _, err := sb.Shell(ctx, "true"); err != nil {
			t.Fatalf("the neighbour does not answer: %v", err)
		}
		all = append(all, time.Since(begun))
	}
	slices.Sort(all)
	return all[len(all)/2].Round(time.Millisecond / 10)
}
