// Package planetest runs a whole control plane for a test: the real API, fleet and loops on a database of
// the test's own and a real Redis, and hosts whose agent is a small one of ours that speaks the real RPC over
// mutual TLS and has the real guest agent behind it. Only tests may import it.
package planetest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/api"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Secret signs the tokens of every plane.
const Secret = "a secret of the tests, 32 bytes and more"

// Patience bounds every wait; nothing waits that long when it works.
const Patience = 30 * time.Second

// Options of a plane; the zero value is a plane of its own.
type Options struct {
	DatabaseURL string // default: a new database
	RedisURL    string
	Times       func(*fleet.Times)
	Deps        func(*api.Deps)
	NoLoops     bool // the fleet's loops do not run
}

// Plane is a running control plane.
type Plane struct {
	URL     string
	Handler http.Handler // what answers at URL
	Store   *store.Store
	Redis   *ephemeral.Redis
	Fleet   *fleet.Fleet
	Tokens  *auth.Tokens
	Admin   User
	Log     *Log

	t        testing.TB
	Database string
	stop     func()
	once     sync.Once
}

// Log collects what the plane logs.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// String is all that was logged.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Times are short periods for tests.
func Times() fleet.Times {
	return fleet.Times{
		HostSilence: 90 * time.Second, MonitorEvery: 50 * time.Millisecond, ReconcileEvery: 50 * time.Millisecond, ReconcileAge: time.Hour,
		Lease: time.Second, CreateLimit: 20 * time.Second, DeleteLimit: 10 * time.Second, RetryFor: 2 * time.Second, GiveUpAfter: time.Minute, HostCredentials: 24 * time.Hour,
	}
}

// New starts a plane with an admin.
func New(t testing.TB, o Options) *Plane {
	t.Helper()
	p := Start(t, o)
	p.Admin = p.makeAdmin()
	return p
}

// Start starts a plane without making an admin, such as a second replica.
func Start(t testing.TB, o Options) *Plane {
	t.Helper()
	if o.DatabaseURL == "" {
		o.DatabaseURL = storetest.Database(t)
	}
	if o.RedisURL == "" {
		o.RedisURL = storetest.Redis(t)
	}
	p := &Plane{t: t, Log: &Log{}, Database: o.DatabaseURL}
	log := slog.New(slog.NewTextHandler(p.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	if p.Store, err = store.Open(ctx, o.DatabaseURL); err != nil {
		t.Fatal(err)
	}
	if p.Redis, err = ephemeral.Open(o.RedisURL); err != nil {
		t.Fatal(err)
	}
	ca, err := fleet.LoadAuthority(ctx, p.Store, bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if p.Tokens, err = auth.NewTokens([]byte(Secret), time.Now); err != nil {
		t.Fatal(err)
	}
	pool := agents.NewPool(ca, time.Now)
	times := Times()
	if o.Times != nil {
		o.Times(&times)
	}
	p.Fleet = fleet.New(fleet.Deps{Store: p.Store, Redis: p.Redis, Agents: pool, CA: ca, Tokens: p.Tokens, Policy: fleet.DefaultPolicy(), Times: times, Log: log})
	deps := api.Deps{Store: p.Store, Redis: p.Redis, Fleet: p.Fleet, Agents: pool, Tokens: p.Tokens, Passwords: auth.NewPasswords(), Secret: []byte(Secret), Log: log}
	if o.Deps != nil {
		o.Deps(&deps)
	}
	srv, err := api.New(ctx, deps)
	if err != nil {
		t.Fatal(err)
	}
	p.Handler = srv
	hs := srv.HTTPServer()
	ln, err := listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.URL = "http://" + ln.Addr().String()
	var wg sync.WaitGroup
	wg.Go(func() { _ = hs.Serve(ln) })
	if !o.NoLoops {
		wg.Go(func() { p.Fleet.Run(ctx) })
	}
	p.stop = func() {
		cancel()
		_ = hs.Close()
		wg.Wait()
		wait, done := context.WithTimeout(context.Background(), Patience)
		p.Fleet.Wait(wait)
		done()
		pool.Close()
		_ = p.Redis.Close()
		p.Store.Close()
	}
	t.Cleanup(func() {
		p.Stop()
		if t.Failed() {
			t.Logf("log of the control plane:\n%s", p.Log.String())
		}
	})
	return p
}

func listen(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	return lc.Listen(context.Background(), "tcp", addr)
}

// Stop ends the plane; requests under way are cut off, operations under way are finished.
func (p *Plane) Stop() { p.once.Do(p.stop) }

// User is an account with a token.
type User struct {
	ID, Email, Token, TeamID string
	plane                    *Plane
}

// Password of every user that planetest makes.
const Password = "correct horse battery"

func (p *Plane) makeAdmin() User {
	p.t.Helper()
	return p.account(api.Account{Email: "admin-" + unique() + "@example.com", IsAdmin: true})
}

// NewUser makes an account, without the price of a password.
func (p *Plane) NewUser() User {
	p.t.Helper()
	return p.account(api.Account{Email: "user-" + unique() + "@example.com"})
}

func (p *Plane) account(a api.Account) User {
	p.t.Helper()
	a.PasswordHash = "no password"
	u, team, err := api.NewAccount(context.Background(), p.Store, a, "")
	if err != nil {
		p.t.Fatal(err)
	}
	token, _, err := p.Tokens.SignUser(u.ID, team, u.Email, "owner")
	if err != nil {
		p.t.Fatal(err)
	}
	return User{u.ID, u.Email, token, team, p}
}

func unique() string { return wrenn.NewID("x")[2:14] }

// Header authenticates as the user.
func (u User) Header() http.Header { return http.Header{"Authorization": {"Bearer " + u.Token}} }

// Answer is what came back.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Code is the code of an error.
func (a Answer) Code() string {
	var e struct {
		Error struct {
			Code string `json:"code"`
		} `json:"error"`
	}
	_ = json.Unmarshal(a.Body, &e)
	return e.Error.Code
}

// Detail is one detail of an error.
func (a Answer) Detail(name string) any {
	var e struct {
		Error struct {
			Details map[string]any `json:"details"`
		} `json:"error"`
	}
	_ = json.Unmarshal(a.Body, &e)
	return e.Error.Details[name]
}

// Do sends a request. A body that is neither nil, a string nor an io.Reader is sent as JSON.
func (p *Plane) Do(method, path string, body any, header ...http.Header) Answer {
	p.t.Helper()
	a, err := p.Try(context.Background(), method, path, body, header...)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// Try is Do for requests that may fail to be answered.
func (p *Plane) Try(ctx context.Context, method, path string, body any, header ...http.Header) (Answer, error) {
	var rd io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		rd = strings.NewReader(b)
	case io.Reader:
		rd = b
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			return Answer{}, err
		}
		rd = bytes.NewReader(raw)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, p.URL+path, rd)
	if err != nil {
		return Answer{}, err
	}
	if rd != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range header {
		for k, v := range h {
			req.Header[k] = v
		}
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	return Answer{res.StatusCode, res.Header, raw}, err
}

// Do sends a request as the user.
func (u User) Do(method, path string, body any, header ...http.Header) Answer {
	u.plane.t.Helper()
	return u.plane.Do(method, path, body, append([]http.Header{u.Header()}, header...)...)
}

// Want fails the test unless the answer has the status, and decodes it into out if that is not nil.
func (a Answer) Want(t testing.TB, status int, out any) Answer {
	t.Helper()
	if a.Status != status {
		t.Fatalf("status %d, want %d: %s", a.Status, status, a.Body)
	}
	if out != nil {
		if err := json.Unmarshal(a.Body, out); err != nil {
			t.Fatalf("%v in %s", err, a.Body)
		}
	}
	return a
}

// WantError fails the test unless the answer is an error of the documented form, and no other.
func (a Answer) WantError(t testing.TB, status int, code string) Answer {
	t.Helper()
	var e struct {
		Error *struct {
			Code      string         `json:"code"`
			Message   string         `json:"message"`
			RequestID string         `json:"request_id"`
			Details   map[string]any `json:"details"`
		} `json:"error"`
	}
	dec := json.NewDecoder(bytes.NewReader(a.Body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil || e.Error == nil || e.Error.Message == "" {
		t.Fatalf("status %d, not an error of the documented form (%v): %s", a.Status, err, a.Body)
	}
	if a.Status != status || e.Error.Code != code {
		t.Fatalf("%d %s, want %d %s: %s", a.Status, e.Error.Code, status, code, a.Body)
	}
	if e.Error.RequestID == "" || e.Error.RequestID != a.Header.Get("X-Request-Id") {
		t.Errorf("request id %q, header %q", e.Error.RequestID, a.Header.Get("X-Request-Id"))
	}
	return a
}

// Eventually waits until ok; what happens inside the plane tells nobody when it is over.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", Patience, what)
		}
		<-tick.C
	}
}
