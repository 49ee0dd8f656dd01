package guest

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"
)

// slowGuest has a clock that it sets as envd does, and hears of each time after its transit.
type slowGuest struct {
	transits []time.Duration // of the messages, in order; further ones take none and are answered at once

	mu    sync.Mutex
	told  []string      // the paths of the messages
	clock time.Duration // the guest's, less the host's
	right chan struct{} // closed when a message was answered at once
}

func (g *slowGuest) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body initBody
	_ = json.NewDecoder(r.Body).Decode(&body)
	g.mu.Lock()
	defer g.mu.Unlock()
	n := len(g.told)
	g.told = append(g.told, r.URL.Path)
	if n < len(g.transits) {
		time.Sleep(g.transits[n]) // the network's time
	}
	if late := time.Until(body.Timestamp); r.URL.Path == "/init" || late > g.clock {
		g.clock = late
	}
	if n < len(g.transits) {
		time.Sleep(2 * clockTolerance) // no answer is quick enough for an end
	} else if n == len(g.transits) {
		close(g.right)
	}
	w.WriteHeader(http.StatusNoContent)
}

// The clock of a guest that hears of some times late is as right as the message that took least, whichever that was;
// it comes right when the guest has time to answer.
func TestClockOfASlowGuest(t *testing.T) {
	t.Parallel()
	g := &slowGuest{right: make(chan struct{})}
	for _, ms := range []time.Duration{300, 70, 200, 100, 250} {
		g.transits = append(g.transits, ms*time.Millisecond)
	}
	c := clientOf(t, g)
	if err := c.SyncClock(t.Context(), "token"); err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	if want := []string{"/init", "/clock", "/clock", "/clock", "/clock"}; !slices.Equal(g.told, want) || g.clock < -99*time.Millisecond || g.clock > 0 {
		t.Errorf("after %q its clock was off by %v", g.told, g.clock)
	}
	g.mu.Unlock()
	gone := make(chan struct{})
	ended := make(chan struct{})
	go func() { defer close(ended); c.KeepClock(t.Context(), gone) }()
	<-g.right
	g.mu.Lock()
	if g.clock < -clockTolerance || g.clock > 0 {
		t.Errorf("then its clock was off by %v", g.clock)
	}
	g.mu.Unlock()
	close(gone)
	<-ended
}

// A guest agent that is older than the route keeps what it was told first.
func TestClockOfAnOldGuest(t *testing.T) {
	t.Parallel()
	c := clientOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/init" {
			http.NotFound(w, r)
			return
		}
		time.Sleep(2 * clockTolerance)
		w.WriteHeader(http.StatusNoContent)
	}))
	if err := c.SyncClock(t.Context(), "token"); err != nil {
		t.Error(err)
	}
}

func clientOf(t *testing.T, guest http.Handler) *Client {
	t.Helper()
	srv := httptest.NewServer(guest)
	t.Cleanup(srv.Close)
	c := New("guest.invalid", func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
	})
	t.Cleanup(c.Close)
	return c
}
