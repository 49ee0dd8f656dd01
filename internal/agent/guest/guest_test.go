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

// The clock of a guest that hears of some times late is as right as the message that took least, whichever that was.
func TestClockOfASlowGuest(t *testing.T) {
	t.Parallel()
	transits := []time.Duration{300 * time.Millisecond, 10 * time.Millisecond, 200 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond}
	var mu sync.Mutex
	var clock time.Duration // the guest's, less the host's
	told := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body initBody
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		time.Sleep(transits[told]) // the network's time
		told++
		if late := time.Until(body.Timestamp); !body.ClockAdvance || late > clock {
			clock = late
		}
		time.Sleep(2 * clockTolerance) // no answer is quick enough for an end
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
	if told != clockAttempts || clock < -90*time.Millisecond || clock > 0 {
		t.Errorf("after %d times told its clock was off by %v", told, clock)
	}
}
