// Package guest is the agent's client of envd's internal routes: waiting for a guest to answer, and
// giving a fresh or restored guest its identity and the time. It starts nothing by itself.
package guest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Port is where envd listens in every guest.
const Port = 49983

// TokenHeader carries the access token to envd.
const TokenHeader = "X-Access-Token"

// Dial opens a connection to an address as the guest's host side sees it.
type Dial func(ctx context.Context, network, addr string) (net.Conn, error)

// Client talks to one guest. Transport may be shared with a proxy.
type Client struct {
	Transport *http.Transport
	base      string

	late chan string // has the token of a guest whose clock may not be right yet

	mu     sync.Mutex
	open   map[*guestConn]struct{}
	closed bool
}

// New makes a client of the guest at ip that dials with dial.
func New(ip string, dial Dial) *Client {
	c := &Client{base: "http://" + net.JoinHostPort(ip, strconv.Itoa(Port)), late: make(chan string, 1), open: map[*guestConn]struct{}{}}
	c.Transport = &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if limit, ok := ctx.Value(dialLimit{}).(time.Duration); ok {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, limit)
				defer cancel()
			}
			conn, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return c.keep(conn)
		},
		MaxIdleConnsPerHost:   32,
		IdleConnTimeout:       90 * time.Second,
		DisableCompression:    true,
		ResponseHeaderTimeout: 0, // a command may think as long as it likes
	}
	return c
}

// guestConn is a connection that ends with its Client: nothing answers for a VM that is gone, not even
// by a reset.
type guestConn struct {
	net.Conn
	client *Client
}

func (c *Client) keep(conn net.Conn) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.Join(errors.New("the virtual machine is gone"), conn.Close())
	}
	g := &guestConn{conn, c}
	c.open[g] = struct{}{}
	return g, nil
}

func (g *guestConn) Close() error {
	g.client.mu.Lock()
	delete(g.client.open, g)
	g.client.mu.Unlock()
	return g.Conn.Close()
}

// Host is the authority of the guest's URLs.
func (c *Client) Host() string { return c.base[len("http://"):] }

// Close ends all connections, also those in use: it is for a VM that ends.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	open := slices.Collect(maps.Keys(c.open))
	c.mu.Unlock()
	for _, g := range open {
		_ = g.Close()
	}
	c.Transport.CloseIdleConnections()
}

// Identity is what makes a guest itself. See envd's /init.
type Identity struct {
	Token       string
	Hostname    string
	MachineID   string
	Env         map[string]string
	DefaultUser string
	Nameservers []string
	DiskBytes   int64 // size of its disk, to which it grows its file system
}

type initBody struct {
	AccessToken string            `json:"accessToken,omitempty"`
	Timestamp   time.Time         `json:"timestamp"`
	Hostname    string            `json:"hostname,omitempty"`
	MachineID   string            `json:"machineId,omitempty"`
	Entropy     string            `json:"entropy,omitempty"`
	EnvVars     map[string]string `json:"envVars,omitempty"`
	DefaultUser string            `json:"defaultUser,omitempty"`
	Nameservers []string          `json:"nameservers,omitempty"`
	DiskBytes   int64             `json:"diskBytes,omitempty"`
}

// Init gives the guest its identity, 64 bytes of fresh entropy and the host's clock, as SyncClock does.
// currentToken is the token that the guest knows now, empty for one that never had any.
func (c *Client) Init(ctx context.Context, currentToken string, id Identity) error {
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy) // never fails
	body, err := json.Marshal(initBody{
		AccessToken: id.Token, Timestamp: time.Now().UTC(), Hostname: id.Hostname, MachineID: id.MachineID,
		Entropy: base64.StdEncoding.EncodeToString(entropy), EnvVars: id.Env, DefaultUser: id.DefaultUser,
		Nameservers: id.Nameservers, DiskBytes: id.DiskBytes,
	})
	if err != nil {
		return err
	}
	began := time.Now()
	if err := c.post(ctx, "/init", currentToken, body); err != nil || time.Since(began) <= clockTolerance {
		return err
	}
	return c.advanceClock(ctx, cmp.Or(id.Token, currentToken))
}

// Freeze stops user processes until the next Init or Thaw.
func (c *Client) Freeze(ctx context.Context, token string) error {
	return c.post(ctx, "/freeze", token, nil)
}

// Catchup lets user processes run on after Freeze, and sets the clock of a guest that stood still.
func (c *Client) Catchup(ctx context.Context, token string) error {
	_, err := c.tellTime(ctx, "/init", token)
	return err
}

// tellTime has a route set the clock. took bounds the age that the time had when the guest heard it.
func (c *Client) tellTime(ctx context.Context, path, token string) (took time.Duration, err error) {
	began := time.Now()
	body, err := json.Marshal(initBody{Timestamp: began.UTC()})
	if err != nil {
		return 0, err
	}
	err = c.post(ctx, path, token, body)
	return time.Since(began), err
}

// Bounds of SyncClock and KeepClock.
const (
	clockTolerance = 30 * time.Millisecond
	clockAttempts  = 5
	clockPatience  = time.Minute
)

// SyncClock lets user processes run on, as Catchup does, and sets the guest's clock. The time that it is told has passed
// when it hears of it, and a guest that has just been restored takes long for its first answers; it is told again until
// one takes at most clockTolerance, and keeps the latest of the times told: that of the message that took least. If none
// is that quick, KeepClock goes on.
func (c *Client) SyncClock(ctx context.Context, token string) error {
	took, err := c.tellTime(ctx, "/init", token)
	if err != nil || took <= clockTolerance {
		return err
	}
	return c.advanceClock(ctx, token)
}

// advanceClock goes on with SyncClock after a first time was told. A guest agent older than the route keeps that.
func (c *Client) advanceClock(ctx context.Context, token string) error {
	for range clockAttempts - 1 {
		took, err := c.tellTime(ctx, "/clock", token)
		if errors.Is(err, errNoRoute) || err == nil && took <= clockTolerance {
			return nil
		}
		if err != nil {
			return err
		}
	}
	select {
	case c.late <- token:
	default: // it goes on already
	}
	return nil
}

// KeepClock goes on telling guests the time that SyncClock could not tell soon enough, at growing intervals for about
// twice clockPatience; it ends with ctx, or with gone.
func (c *Client) KeepClock(ctx context.Context, gone <-chan struct{}) {
	for {
		var token string
		select {
		case token = <-c.late:
		case <-gone:
			return
		case <-ctx.Done():
			return
		}
		for wait := clockPatience / 256; wait <= clockPatience; wait *= 2 {
			select {
			case <-time.After(wait):
			case <-gone:
				return
			case <-ctx.Done():
				return
			}
			if took, err := c.tellTime(ctx, "/clock", token); err != nil || took <= clockTolerance {
				break // an error: it is no more who it was, or it is going
			}
		}
	}
}

// FreezeFS flushes and freezes the guest's root file system (FIFREEZE).
func (c *Client) FreezeFS(ctx context.Context, token string) error {
	return c.post(ctx, "/fsfreeze", token, nil)
}

// ThawFS undoes FreezeFS (FITHAW).
func (c *Client) ThawFS(ctx context.Context, token string) error {
	return c.post(ctx, "/fsthaw", token, nil)
}

// WaitReady returns when envd answers /health. It tries again at short intervals until ctx ends;
// gone, if closed, says that the VM ended and waiting is useless.
func (c *Client) WaitReady(ctx context.Context, gone <-chan struct{}) error {
	return c.wait(ctx, gone, func(ctx context.Context) error { return c.do(ctx, http.MethodGet, "/health", "", nil) })
}

// WaitHeld is WaitReady for a guest whose user processes are to stand still until Init: that they do is the first thing
// it is asked for. They do so already in one that was saved by a pause, and what its next pause takes is then in memory.
// A guest that knows another token has answered, too.
func (c *Client) WaitHeld(ctx context.Context, token string, gone <-chan struct{}) error {
	return c.wait(ctx, gone, func(ctx context.Context) error {
		if err := c.Freeze(ctx, token); !errors.Is(err, errRefused) {
			return err
		}
		return nil
	})
}

func (c *Client) wait(ctx context.Context, gone <-chan struct{}, ask func(context.Context) error) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	var last error
	for {
		select {
		case <-ctx.Done():
			return wrenn.Wrap(errors.Join(ctx.Err(), last), wrenn.KindAgentError, "the sandbox did not become ready in time")
		case <-gone:
			return wrenn.Wrap(last, wrenn.KindAgentError, "the sandbox's virtual machine ended before it was ready")
		case <-tick.C:
		}
		if last = c.attempt(ctx, ask); last == nil {
			return nil
		}
		tick.Reset(5 * time.Millisecond)
	}
}

// dialLimit is the key of a context's limit for making a connection.
type dialLimit struct{}

func (c *Client) attempt(ctx context.Context, ask func(context.Context) error) error {
	// A guest that is still booting drops packets: a short limit for the connection makes the next attempt come
	// soon. One that was just restored answers late, because the host is busy: asking again would cost it more.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return ask(context.WithValue(ctx, dialLimit{}, 250*time.Millisecond))
}

func (c *Client) post(ctx context.Context, path, token string, body []byte) error {
	return c.do(ctx, http.MethodPost, path, token, body)
}

// errRefused is in the errors of calls that the guest answered, but would not do; errNoRoute in those that it does not know.
var (
	errRefused = errors.New("refused")
	errNoRoute = fmt.Errorf("%w: no such route", errRefused)
)

// callTimeout bounds a call of an internal route: what it does in the guest takes milliseconds.
const callTimeout = 30 * time.Second

func (c *Client) do(ctx context.Context, method, path, token string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set(TokenHeader, token)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.Transport.RoundTrip(req)
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's guest agent does not answer")
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's guest agent broke off its answer")
	}
	if res.StatusCode >= 300 {
		why := errRefused
		if res.StatusCode == http.StatusNotFound {
			why = errNoRoute
		}
		return wrenn.Wrap(fmt.Errorf("%w: %s %s: %s: %s", why, method, path, res.Status, text), wrenn.KindAgentError,
			"the sandbox's guest agent refused a request of its host")
	}
	return nil
}

// NewToken makes an access token: 64 hex, 256 random bits.
func NewToken() string { return randomHex(32) }

// NewMachineID makes a machine-id (machine-id(5)): 32 hex.
func NewMachineID() string { return randomHex(16) }

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Do makes a Client usable as the HTTP client of generated Connect clients, with the given token.
func (c *Client) Do(req *http.Request, token string) (*http.Response, error) {
	req.Header.Set(TokenHeader, token)
	return c.Transport.RoundTrip(req)
}
