package agent

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

func TestWarmPoolKeepsWhatWasAskedForLast(t *testing.T) {
	t.Parallel()
	p := newWarmPool(2)
	if sh, wanted := p.next(); wanted {
		t.Errorf("nobody asked for anything, and %v is wanted", sh)
	}
	ask := func(name string) (*readyVM, []*readyVM) {
		v, soon, drop := p.take(shape{template: machine(name)})
		if soon != nil {
			t.Error("nothing is being made, and is promised")
		}
		return v, drop
	}
	fill := func() (made []string) {
		for sh, wanted := p.next(); wanted; sh, wanted = p.next() {
			p.start(sh)
			if !p.put(sh, &readyVM{dir: string(sh.template)}) {
				t.Fatalf("%s is wanted and not taken", sh.template)
			}
			made = append(made, string(sh.template))
		}
		return made
	}
	if v, _ := ask("a"); v != nil {
		t.Errorf("an empty pool gave %v", v)
	}
	ask("b")
	if d := cmp.Diff([]string{"b", "b", "a", "a"}, fill()); d != "" {
		t.Error(d)
	}
	if v, drop := ask("a"); v == nil || v.dir != "a" || len(drop) > 0 {
		t.Errorf("got %v, dropped %v", v, drop)
	}
	_, drop := ask("c") // a third: b was asked for longest ago
	if len(drop) != 2 || drop[0].dir != "b" {
		t.Errorf("dropped %v", drop)
	}
	p.start(shape{template: "b"})
	if p.put(shape{template: "b"}, &readyVM{}) {
		t.Error("what was made for a forgotten template is kept")
	}
	if d := cmp.Diff([]string{"c", "c", "a"}, fill()); d != "" {
		t.Error(d)
	}
	if v := p.oldest(); v == nil || v.dir != "a" {
		t.Errorf("the oldest is %v", v)
	}
}

func TestACreateWaitsForTheVMThatIsBeingMade(t *testing.T) {
	t.Parallel()
	p := newWarmPool(2)
	a := shape{template: "a"}
	p.start(a)
	_, soon, _ := p.take(a)
	if _, again, _ := p.take(a); soon == nil || again != nil {
		t.Error("not exactly one waits for what is being made")
	}
	if _, other, _ := p.take(shape{template: "b"}); other != nil {
		t.Error("a VM of another template is promised")
	}
	if !p.put(a, &readyVM{dir: "made"}) {
		t.Error("what is waited for is not wanted")
	}
	if v := <-soon; v == nil || v.dir != "made" {
		t.Errorf("got %v", v)
	}
	p.start(a)
	_, soon, _ = p.take(a)
	p.fail()
	if v := <-soon; v != nil {
		t.Errorf("got %v of what failed", v)
	}
	if v, soon, _ := p.take(a); v != nil || soon != nil {
		t.Error("what was given away is still there")
	}
}

func TestReadyVMsAreMadeWhenCreatesLeaveTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newWarmPool(1)
		waited := func() time.Duration {
			began := time.Now()
			p.yield(t.Context())
			return time.Since(began)
		}
		if d := waited(); d != 0 {
			t.Errorf("waited %v for nobody", d)
		}
		first, second := p.begin(0), p.begin(0)
		time.AfterFunc(time.Second, first)
		time.AfterFunc(2*time.Second, second)
		if d := waited(); d != 2*time.Second {
			t.Errorf("waited %v", d)
		}
		end := p.begin(0)
		if d := waited(); d != maxYield {
			t.Errorf("waited %v for a create that takes long", d)
		}
		end()
		p.begin(lull)()
		if d := waited(); d != lull {
			t.Errorf("waited %v after an operation that another may follow", d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		defer p.begin(0)()
		p.yield(ctx)
	})
}

func TestWhatCreatesTakeIsReplacedAtOnceWhenFewAreLeft(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		size, ready int
		want        time.Duration
	}{{1, 1, 0}, {2, 2, lull}, {2, 1, 0}, {16, 9, lull}, {16, 8, 0}, {16, 0, 0}, {0, 0, 0}} {
		p := newWarmPool(c.size)
		p.ready["t"] = make([]*readyVM, c.ready)
		if got := p.afterCreate("t"); got != c.want {
			t.Errorf("with %d of %d ready a create is followed by a lull of %v, want %v", c.ready, c.size, got, c.want)
		}
	}
}

func TestAReadyVMBecomesASandbox(t *testing.T) {
	cfg := testConfig(t)
	cfg.WarmVMs = 1
	s, crash := open(t, cfg)
	create(t, s)
	awaitReady(t, s)
	ready := func() *readyVM {
		s.warm.mu.Lock()
		defer s.warm.mu.Unlock()
		for _, all := range s.warm.ready {
			return all[0]
		}
		return nil
	}
	v := ready()
	sb := create(t, s)
	got, err := s.get(sb.Id)
	if err != nil {
		t.Fatal(err)
	}
	if pid := got.snapshot().VM.PID; pid != v.handle.PID {
		t.Errorf("the sandbox's VM is %d, that which was ready was %d", pid, v.handle.PID)
	}
	if host := shell(t, s, sb.Id, "hostname; cat /etc/hostname"); host != sb.Id[3:]+"\n"+sb.Id[3:] {
		t.Errorf("its host name is %q", host)
	}
	pauseAndResume(t, s, sb.Id)

	// One that died is no loss.
	awaitReady(t, s)
	v = ready()
	if err := syscall.Kill(v.handle.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := s.driver.Wait(t.Context(), v.handle); err != nil {
		t.Fatal(err)
	}
	shell(t, s, create(t, s).Id, "true")

	// They end with the agent.
	awaitReady(t, s)
	v = ready()
	crash()
	if state, err := s.driver.Inspect(t.Context(), v.handle); err != nil || state != vm.StateGone {
		t.Errorf("without its agent a ready VM is %s, %v", state, err)
	}
	if left, err := os.ReadDir(filepath.Join(cfg.Sandboxes, warmDir)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
