package api_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
)

type sse struct {
	ID      int64
	Type    string
	Subject string
	Data    map[string]any
}

// follow reads a team's events; the channel is closed when the stream ends.
func follow(t *testing.T, p *planetest.Plane, u planetest.User, query string, header ...string) <-chan sse {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), planetest.Patience)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL+"/v1/events"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = u.Header()
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("status %d, %s", res.StatusCode, res.Header.Get("Content-Type"))
	}
	out := make(chan sse, 1000)
	lines := bufio.NewScanner(res.Body)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), ":") {
		t.Errorf("the stream begins with %q", lines.Text())
	}
	go func() {
		defer close(out)
		defer res.Body.Close()
		for lines.Scan() {
			text, ok := strings.CutPrefix(lines.Text(), "data: ")
			var e sse
			if ok && json.Unmarshal([]byte(text), &e) == nil {
				out <- e
			}
		}
	}()
	return out
}

func next(t *testing.T, events <-chan sse) sse {
	t.Helper()
	select {
	case e, ok := <-events:
		if !ok {
			t.Fatal("the stream ended")
		}
		return e
	case <-time.After(planetest.Patience):
		t.Fatal("no event came")
	}
	return sse{}
}

// A team follows what happens to its own things, in order, on any replica, and goes on where it was.
func TestEvents(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	p.AddHost()
	u, other := p.NewUser(), p.NewUser()
	live, foreign := follow(t, p, u, ""), follow(t, p, other, "?after=0")
	sb := create(t, u, nil)
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/pause", nil).Want(t, 200, nil)
	mine := create(t, other, nil)

	var last sse
	for i, want := range []string{"sandbox.creating", "sandbox.running", "sandbox.pausing", "sandbox.paused"} {
		e := next(t, live)
		if e.Type != want || e.Subject != sb.ID || e.ID <= last.ID {
			t.Errorf("event %d is %+v, want %s after %d", i, e, want, last.ID)
		}
		last = e
	}
	if e := next(t, foreign); e.Subject != mine.ID {
		t.Errorf("another team sees %+v", e)
	}

	// From the beginning, from an id by either way, and of one thing only.
	all := follow(t, p, u, "?after=0")
	first := next(t, all)
	if first.Type != "sandbox.creating" || first.Data["host_id"] != sb.HostID {
		t.Errorf("the first is %+v", first)
	}
	if e := next(t, follow(t, p, u, "?after=0", "Last-Event-ID", strconv.FormatInt(first.ID, 10))); e.Type != "sandbox.running" {
		t.Errorf("after the first comes %+v", e)
	}
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/checkpoints", nil).Want(t, 201, nil)
	of := follow(t, p, u, "?after=0&subject="+sb.ID)
	for _, want := range []string{"sandbox.creating", "sandbox.running", "sandbox.pausing", "sandbox.paused", "checkpoint.saving", "checkpoint.ready"} {
		if e := next(t, of); e.Type != want {
			t.Errorf("of the sandbox: %+v, want %s", e, want)
		}
	}
	p.Do("GET", "/v1/events", nil).WantError(t, 401, "unauthorized")
	u.Do("GET", "/v1/events?after=x", nil).WantError(t, 400, "invalid_request")
}

// A slow operation says where it is, to those of its team who follow now, on any replica: not too often, not what
// a host must not say, nothing once it is over, and nothing that is kept.
func TestProgress(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	second := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	h := p.AddHost()
	u, other := p.NewUser(), p.NewUser()
	sb, quick := create(t, u, nil), create(t, other, nil)
	live, foreign := follow(t, second, u, "?subject="+sb.ID), follow(t, second, other, "")

	told, release := make(chan struct{}), make(chan struct{})
	h.OnPause(func(id string) error {
		if id == sb.ID {
			<-release
		}
		return nil
	})
	h.OnWatch(func(ctx context.Context, _ string, tell func(*agentv1.Progress) error) error {
		for _, bad := range []*agentv1.Progress{{}, {Step: "<b>"}, {Step: "saving", Done: 2, Total: 1, Unit: "bytes"}, {Step: "saving", Done: 1, Total: 2, Unit: "USD"}} {
			if err := tell(bad); err != nil {
				return err
			}
		}
		for n := uint64(1); n <= 1000; n++ { // as fast as it can
			if err := tell(&agentv1.Progress{Step: "saving_memory", Done: n, Total: 1000, Unit: "bytes"}); err != nil {
				return err
			}
		}
		close(told)
		<-ctx.Done() // it is told when nobody listens any more
		return ctx.Err()
	})
	key := u.Header()
	key.Set("Idempotency-Key", "my own")
	began := time.Now()
	var wg sync.WaitGroup
	wg.Go(func() {
		if a, err := p.Try(context.Background(), "POST", "/v1/sandboxes/"+sb.ID+"/pause", nil, key); err != nil || a.Status != 200 {
			t.Errorf("pause: %s, %v", a.Body, err)
		}
	})
	first := next(t, live)
	for first.Type != "sandbox.progress" {
		first = next(t, live)
	}
	<-told
	close(release)
	wg.Wait()
	flood := time.Since(began)
	if first.ID != 0 || first.Data["operation"] != "pause" || first.Data["step"] != "saving_memory" ||
		first.Data["done"] != 1.0 || first.Data["total"] != 1000.0 || first.Data["unit"] != "bytes" || first.Data["operation_id"] == "" {
		t.Errorf("the first is %+v", first)
	}
	if sum := sha256.Sum256([]byte("my own")); first.Data["request"] != hex.EncodeToString(sum[:8]) {
		t.Errorf("of the request %v", first.Data["request"])
	}
	n := 1
	for e := next(t, live); e.Type != "sandbox.paused"; e = next(t, live) {
		if e.Type == "sandbox.progress" {
			n++
		}
	}
	if most := 1 + int(flood/(200*time.Millisecond)); n > most {
		t.Errorf("%d events within %v", n, flood)
	}

	// What is over at once says nothing, and nothing of it all can be read later.
	other.Do("POST", "/v1/sandboxes/"+quick.ID+"/pause", nil).Want(t, 200, nil)
	for e := next(t, foreign); e.Type != "sandbox.paused"; e = next(t, foreign) {
		if e.Type == "sandbox.progress" {
			t.Errorf("another team hears %+v", e)
		}
	}
	kept := follow(t, p, u, "?after=0&subject="+sb.ID)
	for e := next(t, kept); e.Type != "sandbox.paused"; e = next(t, kept) {
		if e.ID == 0 {
			t.Errorf("it is kept: %+v", e)
		}
	}
}

// An event that was committed later than one with a higher id is not passed over.
func TestEventsKeepTheirOrder(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	u := p.NewUser()
	live := follow(t, p, u, "")
	// The slow transaction takes its id first and commits last.
	done, inserted, commit := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		err := p.Store.Tx(t.Context(), func(tx store.Tx) error {
			err := tx.InsertEvent(t.Context(), db.InsertEventParams{Type: "slow", TeamID: &u.TeamID, Subject: "x", Data: []byte("{}")})
			close(inserted)
			<-commit
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}()
	<-inserted
	query(t, p, `INSERT INTO events (type, team_id, subject) VALUES ('fast', $1, 'x') RETURNING type`, u.TeamID)
	if e := next(t, live); e.Type != "fast" {
		t.Errorf("first comes %+v", e)
	}
	close(commit)
	<-done
	if e := next(t, live); e.Type != "slow" {
		t.Errorf("then comes %+v", e)
	}
}
