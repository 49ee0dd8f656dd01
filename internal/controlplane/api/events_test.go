package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
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
