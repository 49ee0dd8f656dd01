package api_test

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// wire is the way to a server, which a test can cut.
type wire struct {
	t      *testing.T
	target string
	addr   string

	mu    sync.Mutex
	ln    net.Listener
	conns map[net.Conn]bool
}

// newWire gives a URL that leads to the server of raw through a wire.
func newWire(t *testing.T, raw string) (*wire, string) {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{t: t, target: u.Host, addr: "127.0.0.1:0", conns: map[net.Conn]bool{}}
	w.mend()
	t.Cleanup(w.cut)
	u.Host = w.addr
	return w, u.String()
}

func (w *wire) mend() {
	w.t.Helper()
	var ln net.Listener
	planetest.Eventually(w.t, "the wire's port is free", func() bool {
		var err error
		ln, err = net.Listen("tcp", w.addr)
		return err == nil
	})
	w.mu.Lock()
	w.ln, w.addr = ln, ln.Addr().String()
	w.mu.Unlock()
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", w.target)
			if err != nil {
				near.Close()
				continue
			}
			w.mu.Lock()
			w.conns[near], w.conns[far] = true, true
			w.mu.Unlock()
			go func() { _, _ = io.Copy(far, near); far.Close() }()
			go func() { _, _ = io.Copy(near, far); near.Close() }()
		}
	}()
}

func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ln.Close()
	for c := range w.conns {
		c.Close()
	}
	clear(w.conns)
}

func TestDatabaseOutage(t *testing.T) {
	t.Parallel()
	direct := storetest.Database(t)
	w, through := newWire(t, direct)
	p := planetest.New(t, planetest.Options{DatabaseURL: through})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	w.cut()
	for _, r := range []struct {
		method, path string
		body         any
		header       http.Header
	}{
		{"GET", "/v1/sandboxes", nil, u.Header()}, {"POST", "/v1/sandboxes", "{}", u.Header()}, {"DELETE", "/v1/sandboxes/" + sb.ID, nil, u.Header()},
		{"POST", "/v1/auth/login", map[string]any{"email": "a@b.c", "password": "xxxxxxxx"}, nil},
		{"POST", "/v1/hosts/" + h.ID + "/heartbeat", "{}", hostToken(h.Token)},
	} {
		a := p.Do(r.method, r.path, r.body, r.header).WantError(t, 503, "unavailable")
		if a.Header.Get("Retry-After") == "" {
			t.Errorf("%s %s does not say when to try again", r.method, r.path)
		}
	}
	p.Do("GET", "/healthz", nil).Want(t, 200, nil)
	p.Do("GET", "/readyz", nil).Want(t, 503, nil)
	p.Do("GET", "/metrics", nil).Want(t, 200, nil)
	w.mend()
	planetest.Eventually(t, "it is ready again", func() bool { return p.Do("GET", "/readyz", nil).Status == 200 })
	if got := get(t, u, sb.ID); got.Status != "running" || !h.Has(sb.ID) {
		t.Errorf("after the outage: %+v", got)
	}
	create(t, u, nil)
	// The loops lead again, too: a host's report arrives.
	h.Set(sb.ID, nil)
	h.Heartbeat(nil)
	planetest.Eventually(t, "the loops run again", func() bool { return get(t, u, sb.ID).Reason != "" })
}

func TestRedisOutage(t *testing.T) {
	t.Parallel()
	w, through := newWire(t, storetest.Redis(t))
	p := planetest.New(t, planetest.Options{RedisURL: through})
	h := p.AddHost()
	email := wrenn.NewID("x") + "@example.com"
	login := map[string]any{"email": email, "password": planetest.Password}
	p.Do("POST", "/v1/auth/signup", login).Want(t, 201, nil)
	var made newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &made)
	w.cut()

	// What needs no Redis goes on, logging in among it; one-time tokens cannot be made or spent.
	p.Do("POST", "/v1/auth/login", login).Want(t, 200, nil)
	h.Heartbeat(nil).Want(t, 204, nil)
	create(t, p.NewUser(), nil)
	p.Do("POST", "/v1/hosts/register", registration(made.Token)).WantError(t, 503, "unavailable")
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).WantError(t, 503, "unavailable")
	p.Admin.Do("POST", "/v1/hosts/"+made.Host.ID+"/token", nil).WantError(t, 503, "unavailable")
	p.Do("GET", "/readyz", nil).Want(t, 503, nil)
	var list struct{ Hosts []hostJSON }
	p.Admin.Do("GET", "/v1/hosts", nil).Want(t, 200, &list)
	if len(list.Hosts) != 2 {
		t.Errorf("a host whose token could not be kept was made: %d hosts", len(list.Hosts))
	}

	w.mend()
	planetest.Eventually(t, "it is ready again", func() bool { return p.Do("GET", "/readyz", nil).Status == 200 })
	p.Do("POST", "/v1/hosts/register", registration(made.Token)).Want(t, 201, nil)
}

// The outbox waits for Redis; nothing that happened is lost.
func TestEventsReachRedis(t *testing.T) {
	t.Parallel()
	w, through := newWire(t, storetest.Redis(t))
	p := planetest.New(t, planetest.Options{RedisURL: through})
	p.AddHost()
	u := p.NewUser()
	w.cut()
	sb := create(t, u, nil)
	if n := query(t, p, `SELECT type FROM events WHERE subject = $1 ORDER BY id`, sb.ID); len(n) != 2 || n[0] != "sandbox.creating" || n[1] != "sandbox.running" {
		t.Errorf("events %v", n)
	}
	w.mend()
	planetest.Eventually(t, "all events are published", func() bool {
		return len(query(t, p, `SELECT type FROM events WHERE published_at IS NULL`)) == 0
	})
}

// A body that trickles in does not hold the server.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("waits for the server's 30 seconds")
	}
	p := planetest.New(t, planetest.Options{})
	rd, wr := io.Pipe()
	defer wr.Close()
	go func() { _, _ = io.WriteString(wr, `{"email":`) }()
	start := time.Now()
	a, err := p.Try(t.Context(), "POST", "/v1/auth/login", rd)
	if err == nil {
		a.WantError(t, 400, "invalid_request")
	}
	if took := time.Since(start); took > 45*time.Second {
		t.Errorf("took %s (%v)", took, err)
	}
}
