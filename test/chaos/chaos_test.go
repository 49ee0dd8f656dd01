// Package chaos kills the parts of a running system, as `kill -9` does, while clients create, use and
// delete sandboxes, and then checks that nothing is lost and nothing is left over.
package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// setting reads a number from the environment.
func setting(t *testing.T, name string, fallback int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return fallback
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s is %q, not a number", name, v)
	}
	return n
}

// TestNothingIsLost runs WRENN_CHAOS_FAULTS faults (make chaos: 50) drawn with WRENN_CHAOS_SEED.
func TestNothingIsLost(t *testing.T) {
	in, err := stack.FindInputs()
	if err != nil {
		t.Skip(err)
	}
	faults := setting(t, "WRENN_CHAOS_FAULTS", 0)
	if faults == 0 {
		t.Skip("takes minutes: run `make chaos`")
	}
	seed := setting(t, "WRENN_CHAOS_SEED", int(time.Now().UnixNano()%1_000_000))
	t.Logf("WRENN_CHAOS_SEED=%d WRENN_CHAOS_FAULTS=%d", seed, faults)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(faults)*40*time.Second+5*time.Minute)
	defer cancel()
	s, err := stack.Start(ctx, in, t.TempDir())
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
	w := &world{t: t, s: s, kept: map[string]*wrenn.Sandbox{}}
	w.create(ctx) // boots the template: faults are to hit the many creates after it
	work, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	for i := range 3 {
		clients.Go(func() { w.client(work, rand.New(rand.NewPCG(uint64(seed), uint64(i)))) })
	}
	w.injectFaults(ctx, rand.New(rand.NewPCG(uint64(seed), 99)), faults)
	stop()
	clients.Wait()
	w.checkKept(ctx)
	w.checkNothingLeft(ctx)
}

// world is what the clients believe.
type world struct {
	t  *testing.T
	s  *stack.Stack
	mu sync.Mutex
	// kept holds the sandboxes that were created and not deleted; each has its id in /home/user/mark.
	kept    map[string]*wrenn.Sandbox
	created int
	used    int
	deleted int
}

// client creates, uses and deletes sandboxes until ctx ends. Requests may fail, as parts are killed; what
// was answered must be true.
func (w *world) client(ctx context.Context, rng *rand.Rand) {
	for ctx.Err() == nil {
		switch {
		case w.count() < 4 || rng.IntN(3) == 0 && w.count() < 8:
			w.create(ctx)
		case rng.IntN(3) > 0:
			w.use(ctx, rng)
		default:
			w.remove(ctx, rng)
		}
	}
}

func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.kept)
}

func (w *world) create(ctx context.Context) {
	sb, err := w.s.Client.CreateSandbox(ctx, wrenn.SandboxOptions{})
	if err != nil {
		return
	}
	res, err := sb.Shell(ctx, fmt.Sprintf("echo %s > mark && sync mark && cat mark", sb.ID))
	marked := err == nil && res.ExitCode == 0 && strings.TrimSpace(string(res.Stdout)) == sb.ID
	w.mu.Lock()
	w.created++
	if marked {
		w.kept[sb.ID] = sb
	}
	w.mu.Unlock()
	if !marked {
		_, _ = sb.Delete(ctx) // not counted on; what is left of it is removed at the end
	}
}

func (w *world) pick(rng *rand.Rand, take bool) *wrenn.Sandbox {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := rng.IntN(len(w.kept) + 1)
	for id, sb := range w.kept {
		if n--; n < 0 {
			if take {
				delete(w.kept, id)
			}
			return sb
		}
	}
	return nil
}

func (w *world) use(ctx context.Context, rng *rand.Rand) {
	sb := w.pick(rng, false)
	if sb == nil {
		return
	}
	res, err := sb.Shell(ctx, "cat mark")
	if err != nil {
		if wrenn.IsNotFound(err) && w.has(sb.ID) {
			w.t.Errorf("%s was never deleted, but the answer is: %v", sb.ID, err)
		}
		return
	}
	if got := strings.TrimSpace(string(res.Stdout)); res.ExitCode == 0 && got != sb.ID {
		w.t.Errorf("%s answers as %q", sb.ID, got)
	}
	w.mu.Lock()
	w.used++
	w.mu.Unlock()
}

func (w *world) has(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.kept[id] != nil
}

func (w *world) remove(ctx context.Context, rng *rand.Rand) {
	sb := w.pick(rng, true)
	if sb == nil {
		return
	}
	if _, err := sb.Delete(ctx); err == nil {
		w.mu.Lock()
		w.deleted++
		w.mu.Unlock()
	}
}

// injectFaults kills one part at a time and starts it again, at random moments.
func (w *world) injectFaults(ctx context.Context, rng *rand.Rand, n int) {
	parts := []struct {
		name string
		kill func(context.Context) error
	}{
		{"wrenn-agent", w.s.RestartAgent}, {"wrenn-cp", w.s.RestartControlPlane},
		{"postgres", w.s.RestartPostgres}, {"redis", w.s.RestartRedis},
	}
	counts := map[string]int{}
	for i := range n {
		w.awaitProgress(ctx)
		select { // the moment is random on purpose: faults must hit every step
		case <-ctx.Done():
			w.t.Fatalf("fault %d: %v", i, ctx.Err())
		case <-time.After(time.Duration(rng.IntN(2000)) * time.Millisecond):
		}
		part := parts[rng.IntN(len(parts))]
		counts[part.name]++
		if err := part.kill(ctx); err != nil {
			w.t.Fatalf("fault %d: %s does not come back: %v", i, part.name, err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t.Logf("killed %v; created %d, used %d times, deleted %d", counts, w.created, w.used, w.deleted)
	if w.created == 0 || w.used == 0 {
		w.t.Errorf("the clients got nothing done: created %d, used %d times", w.created, w.used)
	}
}

// awaitProgress waits until the clients have got something done since it was called: a system that is
// killed again before it has healed shows nothing.
func (w *world) awaitProgress(ctx context.Context) {
	done := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.created + w.used + w.deleted
	}
	before := done()
	err := stack.Eventually(ctx, 2*time.Minute, func() error {
		if done() == before {
			return errors.New("the clients get nothing done any more")
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// checkKept makes sure that every sandbox that was created and not deleted runs and has its data.
func (w *world) checkKept(ctx context.Context) {
	if err := w.s.WaitOnline(ctx); err != nil {
		w.t.Fatal(err)
	}
	for id, sb := range w.kept {
		// The last fault may still be healing: a host that is just starting cannot be reached.
		err := stack.Eventually(ctx, time.Minute, func() error { return stillThere(ctx, sb) })
		if err != nil {
			w.t.Errorf("%s: %v", id, err)
		}
	}
}

func stillThere(ctx context.Context, sb *wrenn.Sandbox) error {
	if err := sb.Refresh(ctx); err != nil {
		return err
	}
	if sb.Status != "running" {
		return fmt.Errorf("it is %s", sb.Status)
	}
	res, err := sb.Shell(ctx, "cat mark")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(res.Stdout)); got != sb.ID {
		return fmt.Errorf("its file says %q", got)
	}
	return nil
}

// checkNothingLeft deletes all sandboxes and looks for leftovers on the host: the records, the virtual
// machines and the network namespaces must be those of the sandboxes that the API knows.
func (w *world) checkNothingLeft(ctx context.Context) {
	err := stack.Eventually(ctx, 2*time.Minute, func() error {
		var left error
		for sb, err := range w.s.Client.Sandboxes(ctx, wrenn.SandboxFilter{}) {
			if err != nil {
				return err
			}
			// A create that was cut off is still being finished; it can be deleted after that.
			_, err := sb.Delete(ctx)
			left = errors.Join(left, fmt.Errorf("%s is still %s (%w)", sb.ID, sb.Status, err))
		}
		return errors.Join(left, w.s.CheckIdle())
	})
	if err != nil {
		w.t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(w.s.Dir, "sandboxes", "*", "sb-*"))
	if err != nil || len(left) > 0 {
		w.t.Errorf("left on disk: %v, %v", left, err)
	}
}
