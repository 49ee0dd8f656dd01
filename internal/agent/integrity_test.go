package agent

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// TestIntegrity changes memory and disk of a sandbox in which something else is always at work, saves and
// restores it in every way there is, and compares checksums that the guest makes of both. The disk is read
// past the guest's cache. WRENN_SOAK_ROUNDS makes it long (make soak).
func TestIntegrity(t *testing.T) {
	rounds, mib := 6, 12
	if n, err := strconv.Atoi(os.Getenv("WRENN_SOAK_ROUNDS")); err == nil && n > 0 {
		rounds, mib = n, 64
	}
	cfg := testConfig(t)
	cfg.WarmVMs = 0
	s, _ := open(t, cfg)
	g := &integrity{t: t, s: s, pages: mib << 8}
	g.id = create(t, s).Id
	shell(t, s, g.id, fmt.Sprintf(`dd if=/dev/urandom of=/dev/shm/m bs=1M count=%d status=none; cp /dev/shm/m d; sync d
(while :; do dd if=/dev/urandom of=/dev/shm/noise bs=64k count=8 status=none; dd if=/dev/shm/noise of=noise bs=64k conv=fsync status=none; sleep 0.1; done) > /dev/null 2>&1 &`, mib))
	for round := range rounds {
		want := g.change(g.id)
		way := []func(){g.pause, g.rollback, g.fork}[round%3]
		way()
		if got := g.sums(g.id); got != want {
			t.Fatalf("round %d: the checksums were\n%s\nand are\n%s", round, want, got)
		}
	}
}

type integrity struct {
	t     *testing.T
	s     *Sandboxes
	id    string
	pages int // of the file in memory, and of the one on disk
}

// change writes noise and zeroes at random places and gives the checksums of what is there now.
func (g *integrity) change(id string) string {
	g.t.Helper()
	at := func(count int) int { return rand.IntN(g.pages - count) }
	write := func(from string, count int) string {
		return fmt.Sprintf("dd if=/dev/%s of=/dev/shm/m bs=4k count=%d seek=%d conv=notrunc status=none; dd if=/dev/%s of=d bs=4k count=%d seek=%d conv=notrunc,fsync status=none\n",
			from, count, at(count), from, count, at(count))
	}
	shell(g.t, g.s, id, write("urandom", 100)+write("zero", 700)+write("urandom", 1)+write("zero", 3))
	return g.sums(id)
}

func (g *integrity) sums(id string) string {
	g.t.Helper()
	return shell(g.t, g.s, id, "sha256sum < /dev/shm/m; dd if=d bs=1M iflag=direct status=none | sha256sum")
}

func (g *integrity) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *integrity) pause() {
	g.t.Helper()
	_, err := g.s.Pause(g.t.Context(), &agentv1.PauseSandboxRequest{Id: g.id, OperationId: newOp()})
	g.must(err)
	_, err = g.s.Resume(g.t.Context(), &agentv1.ResumeSandboxRequest{Id: g.id, OperationId: newOp()})
	g.must(err)
}

func (g *integrity) rollback() {
	g.t.Helper()
	id := wrenn.NewID(wrenn.PrefixCheckpoint)
	_, err := g.s.Checkpoint(g.t.Context(), g.id, newOp(), id)
	g.must(err)
	g.change(g.id)
	_, err = g.s.Rollback(g.t.Context(), &agentv1.RollbackSandboxRequest{Id: g.id, OperationId: newOp(), CheckpointId: id})
	g.must(err)
	g.must(g.s.DeleteCheckpoint(g.t.Context(), g.id, newOp(), id))
}

// fork changes a child and leaves the parent as it is; the child starts with what the parent has.
func (g *integrity) fork() {
	g.t.Helper()
	want := g.sums(g.id)
	child := wrenn.NewID(wrenn.PrefixSandbox)
	results, err := g.s.Fork(g.t.Context(), &agentv1.ForkSandboxRequest{
		Id: g.id, OperationId: newOp(), Children: []*agentv1.ForkSandboxRequest_Child{{Id: child, OperationId: newOp()}},
	})
	g.must(err)
	if results[0].Sandbox == nil {
		g.t.Fatal(results[0].ErrorMessage)
	}
	if got := g.sums(child); got != want {
		g.t.Fatalf("the child's checksums are\n%s\nthe parent's\n%s", got, want)
	}
	g.change(child)
	g.must(g.s.Delete(g.t.Context(), child, newOp()))
}
