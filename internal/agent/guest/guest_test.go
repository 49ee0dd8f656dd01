package guest

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

// A guest whose every answer takes a while still gets the right time: it is told one that is ahead by half of that.
func TestClockOfASlowGuest(t *testing.T) {
	t.Parallel()
	const transit = 20 * time.Millisecond // each way: together more than the tolerance
	var mu sync.Mutex
	var off []time.Duration // of the guest's clock, as it was set
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body initBody
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		time.Sleep(transit)
		mu.Lock()
		off = append(off, time.Until(body.Timestamp))
		mu.Unlock()
		time.Sleep(transit)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer srv.Close()
	c := New("guest.invalid", func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
	})
	defer c.Close()
	if err := c.SyncClock(t.Context(), "token"); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(off) == clockAttempts {
		t.Fatalf("it was told %d times: %v", len(off), off)
	}
	if last := off[len(off)-1]; last < -clockTolerance || last > clockTolerance || len(off) < 2 {
		t.Errorf("its clock was off by %v", off)
	}
}
