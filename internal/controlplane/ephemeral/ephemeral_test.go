package ephemeral

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/localstack/stacktest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func TestMain(m *testing.M) { os.Exit(stacktest.Main(m)) }

func open(t *testing.T, url string) *Redis {
	t.Helper()
	r, err := Open(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestHostTokenIsTakenOnce(t *testing.T) {
	t.Parallel()
	r := open(t, os.Getenv("TEST_REDIS_URL"))
	hash := []byte(wrenn.NewID("x"))
	if err := r.PutHostToken(t.Context(), hash, "host-1", time.Minute); err != nil {
		t.Fatal(err)
	}
	var got atomic.Int32
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			id, err := r.TakeHostToken(t.Context(), hash)
			if err != nil {
				t.Error(err)
			}
			if id == "host-1" {
				got.Add(1)
			}
		})
	}
	wg.Wait()
	if got.Load() != 1 {
		t.Errorf("%d callers got the token", got.Load())
	}
	other := []byte(wrenn.NewID("x"))
	if err := r.PutHostToken(t.Context(), other, "host-2", time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := r.DropHostTokens(t.Context(), [][]byte{other}); err != nil {
		t.Fatal(err)
	}
	if id, err := r.TakeHostToken(t.Context(), other); id != "" || err != nil {
		t.Errorf("a dropped token gave %q %v", id, err)
	}
}

func TestLimit(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{"redis": os.Getenv("TEST_REDIS_URL"), "no redis": "redis://127.0.0.1:1/0"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := open(t, url)
			l := Limit{Name: "test", Events: 3, Window: time.Minute}
			subject := wrenn.NewID("x")
			for i := range 5 {
				if ok, _ := r.Check(t.Context(), l, subject); ok != (i < 3) {
					t.Errorf("before event %d: %v", i, ok)
				}
				ok, wait := r.Allow(t.Context(), l, subject)
				if ok != (i < 3) || wait <= 0 || wait > time.Minute {
					t.Errorf("event %d: %v, wait %s", i, ok, wait)
				}
			}
			if ok, _ := r.Allow(t.Context(), l, subject+"other"); !ok {
				t.Error("another subject was limited")
			}
		})
	}
}

func TestWindowsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWindows()
	now := time.Unix(0, 0)
	for range maxWindows + 10 {
		w.add(wrenn.NewID("x"), 1, time.Minute, now)
	}
	if len(w.m) > maxWindows {
		t.Errorf("%d windows", len(w.m))
	}
	if n, _ := w.add("k", 1, time.Minute, now); n != 1 {
		t.Errorf("first count %d", n)
	}
	if n, _ := w.add("k", 1, time.Minute, now.Add(59*time.Second)); n != 2 {
		t.Errorf("second count %d", n)
	}
	if n, _ := w.add("k", 1, time.Minute, now.Add(time.Minute)); n != 1 {
		t.Errorf("count of the next window %d", n)
	}
}

func TestUnavailable(t *testing.T) {
	t.Parallel()
	r := open(t, "redis://127.0.0.1:1/0")
	if _, err := r.TakeHostToken(t.Context(), []byte("x")); !IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if IsUnavailable(nil) {
		t.Error("nothing is unavailable")
	}
	if _, err := Open("http://nonsense"); err == nil {
		t.Error("took a URL that is not Redis's")
	}
}

func TestPublish(t *testing.T) {
	t.Parallel()
	r := open(t, os.Getenv("TEST_REDIS_URL"))
	channel := wrenn.NewID("x")
	got, err := r.Subscribe(t.Context(), channel)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Publish(t.Context(), channel, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-got:
		if m != "hello" {
			t.Errorf("got %q", m)
		}
	case <-time.After(30 * time.Second):
		t.Error("nothing came")
	}
}
