package wrenn_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

const someID = "sb-abcdefghijklmnopqrstuvwxy"

// serve runs a server of the wire protocol and a client of it.
func serve(t *testing.T, h http.Handler, opts ...wrenn.Option) *wrenn.Client {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	c, err := wrenn.New(append([]wrenn.Option{wrenn.WithURL(srv.URL), wrenn.WithAPIKey("wrn_test")}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func apiError(code, message string) api.Error {
	return api.Error{Error: api.ErrorBody{Code: code, Message: message, RequestID: "req-1"}}
}

func TestMutationIsRepeatedWithOneKey(t *testing.T) {
	t.Parallel()
	var keys []string
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		keys = append(keys, r.Header.Get("Idempotency-Key"))
		switch len(keys) {
		case 1: // the connection breaks after the request was read
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
		case 2:
			w.Header().Set("Retry-After", "0")
			answer(w, http.StatusServiceUnavailable, apiError("unavailable", "starting"))
		default:
			answer(w, http.StatusCreated, api.Sandbox{ID: someID, Status: "running"})
		}
	}))
	sb, err := c.CreateSandbox(context.Background(), wrenn.SandboxOptions{Template: "base"})
	if err != nil {
		t.Fatal(err)
	}
	if sb.ID != someID || sb.Status != api.SandboxStatusRunning {
		t.Errorf("got %+v", sb.Sandbox)
	}
	if len(keys) != 3 || keys[0] == "" || keys[0] != keys[1] || keys[1] != keys[2] {
		t.Errorf("idempotency keys of the attempts: %q, want one key three times", keys)
	}
}

func TestWhatIsNotRepeated(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		status     int
		code, wait string
	}{
		{http.StatusServiceUnavailable, wrenn.CodeNoCapacity, ""},
		{http.StatusTooManyRequests, wrenn.CodeRateLimited, "3600"},
		{http.StatusBadRequest, wrenn.CodeInvalidRequest, ""},
		{http.StatusConflict, wrenn.CodeConflict, ""},
		{http.StatusInternalServerError, wrenn.CodeInternal, ""},
	} {
		t.Run(tc.code, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				calls.Add(1)
				w.Header().Set("Retry-After", tc.wait)
				answer(w, tc.status, apiError(tc.code, "no"))
			}))
			_, err := c.CreateSandbox(context.Background(), wrenn.SandboxOptions{})
			var e *wrenn.APIError
			if !errors.As(err, &e) || e.Code != tc.code || e.Status != tc.status || e.RequestID != "req-1" {
				t.Fatalf("error %#v", err)
			}
			if tc.wait != "" && e.RetryAfter != time.Hour {
				t.Errorf("RetryAfter %v", e.RetryAfter)
			}
			if calls.Load() != 1 {
				t.Errorf("%d requests, want 1", calls.Load())
			}
		})
	}
}

func TestAnswerFromSomethingElse(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "<html>not here</html>", http.StatusNotFound)
	}))
	_, err := c.GetSandbox(context.Background(), someID)
	if !wrenn.IsNotFound(err) || !strings.Contains(err.Error(), "404") {
		t.Errorf("error %v", err)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	c := serve(t, http.NotFoundHandler(), wrenn.WithURL("http://127.0.0.1:1"))
	_, err := c.Ready(context.Background())
	var lost *wrenn.ConnectionError
	if !errors.As(err, &lost) || !strings.Contains(err.Error(), "http://127.0.0.1:1") {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.GetSandbox(ctx, someID); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancelling: %v", err)
	}
}

func TestBadAddress(t *testing.T) {
	t.Parallel()
	for _, u := range []string{"localhost:8000", "ftp://x", "http://", "::"} {
		if _, err := wrenn.New(wrenn.WithURL(u)); err == nil {
			t.Errorf("%q was accepted", u)
		}
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got := r.Header.Get("X-API-Key") + "|" + r.Header.Get("Authorization")
		want := map[string]string{"/v1/auth/login": "|", "/v1/me": "|Bearer jwt", "/v1/templates": "wrn_test|"}[r.URL.Path]
		if got != want {
			t.Errorf("%s: credentials %q, want %q", r.URL.Path, got, want)
		}
		answer(w, http.StatusOK, map[string]any{"token": "jwt"})
	}))
	ctx := context.Background()
	if _, err := c.Login(ctx, "a@b", "secret"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Me(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Templates(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("status") != "running" || q["metadata"][0] != "team=blue" {
			t.Errorf("query %v", q)
		}
		switch q.Get("cursor") {
		case "":
			answer(w, 200, api.SandboxList{Sandboxes: []api.Sandbox{{ID: "1"}, {ID: "2"}}, NextCursor: "two"})
		case "two":
			answer(w, 200, api.SandboxList{Sandboxes: []api.Sandbox{{ID: "3"}}})
		}
	}))
	var ids []string
	for sb, err := range c.Sandboxes(context.Background(), wrenn.SandboxFilter{Status: "running", Metadata: map[string]string{"team": "blue"}}) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, sb.ID)
	}
	if strings.Join(ids, "") != "123" {
		t.Errorf("ids %v", ids)
	}
}

func TestFindByName(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		list := api.SandboxList{}
		switch r.URL.Query().Get("name") {
		case "one":
			list.Sandboxes = []api.Sandbox{{ID: someID}}
		case "twice":
			list.Sandboxes = []api.Sandbox{{ID: someID}, {ID: someID}}
		}
		answer(w, 200, list)
	}))
	ctx := context.Background()
	if sb, err := c.FindSandbox(ctx, "one"); err != nil || sb.ID != someID {
		t.Errorf("one: %v", err)
	}
	if _, err := c.FindSandbox(ctx, "none"); !wrenn.IsNotFound(err) {
		t.Errorf("none: %v", err)
	}
	if _, err := c.FindSandbox(ctx, "twice"); err == nil || wrenn.IsNotFound(err) {
		t.Errorf("twice: %v", err)
	}
}

func TestExecDecodesBothEncodings(t *testing.T) {
	t.Parallel()
	raw := []byte{0xff, 0x00, '\n'}
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req api.ExecRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			t.Error(err)
		}
		if req.TimeoutSec != 1 {
			t.Errorf("timeout of half a second became %d", req.TimeoutSec)
		}
		if req.Cmd == "binary" {
			answer(w, 200, api.ExecResult{Encoding: "base64", Stdout: base64.StdEncoding.EncodeToString(raw), ExitCode: 3})
			return
		}
		answer(w, 200, api.ExecResult{Encoding: "utf-8", Stdout: "grüß\n", DurationMS: 1500})
	}))
	ctx, sb := context.Background(), c.Sandbox(someID)
	res, err := sb.ExecWith(ctx, wrenn.ExecOptions{Cmd: "binary", Timeout: time.Second / 2})
	if err != nil || !bytes.Equal(res.Stdout, raw) || res.ExitCode != 3 {
		t.Errorf("binary: %+v %v", res, err)
	}
	res, err = sb.ExecWith(ctx, wrenn.ExecOptions{Cmd: "text", Timeout: time.Second / 2})
	if err != nil || string(res.Stdout) != "grüß\n" || res.Duration != 1500*time.Millisecond {
		t.Errorf("text: %+v %v", res, err)
	}
}

// echoServer speaks the server's side of exec/stream: it echoes stdin to stdout, tells resizes and
// signals on stderr, and ends with the number of bytes modulo 256.
func echoServer(t *testing.T) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.CloseNow() }()
		conn.SetReadLimit(1 << 20)
		ctx := r.Context()
		send := func(m api.StreamServerMessage) { _ = wsjson.Write(ctx, conn, m) }
		total := 0
		for {
			var m api.StreamClientMessage
			if wsjson.Read(ctx, conn, &m) != nil {
				return
			}
			switch m.Type {
			case "start":
				if m.Cmd == "nope" {
					send(api.StreamServerMessage{Type: "error", Error: api.ErrorBody{Code: "invalid_request", Message: "no such program"}})
					return
				}
				send(api.StreamServerMessage{Type: "start", PID: 42})
			case "stdin":
				raw, _ := base64.StdEncoding.DecodeString(m.Data)
				total += len(raw)
				send(api.StreamServerMessage{Type: "stdout", Data: m.Data})
			case "resize":
				text := fmt.Sprintf("%dx%d ", m.TTY.Cols, m.TTY.Rows)
				send(api.StreamServerMessage{Type: "stderr", Data: base64.StdEncoding.EncodeToString([]byte(text))})
			case "signal":
				send(api.StreamServerMessage{Type: "stderr", Data: base64.StdEncoding.EncodeToString([]byte(m.Signal))})
			case "close":
				send(api.StreamServerMessage{Type: "exit", ExitCode: int32(total % 256), DurationMS: 5})
				_ = conn.Close(websocket.StatusNormalClosure, "")
				return
			}
		}
	})
}

func TestStream(t *testing.T) {
	t.Parallel()
	c := serve(t, echoServer(t))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	input := bytes.Repeat([]byte("0123456789"), 30_001) // several messages, the last one short
	var out bytes.Buffer
	exit, err := c.Sandbox(someID).Run(ctx, wrenn.StartOptions{Cmd: "cat", Stdin: bytes.NewReader(input), Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), input) {
		t.Errorf("%d bytes came back of %d", out.Len(), len(input))
	}
	if exit.Code != len(input)%256 || exit.Duration != 5*time.Millisecond {
		t.Errorf("exit %+v", exit)
	}

	var side bytes.Buffer
	p, err := c.Sandbox(someID).Start(ctx, wrenn.StartOptions{Cmd: "cat", Stderr: &side})
	if err != nil || p.PID != 42 {
		t.Fatalf("start: %v", err)
	}
	for _, step := range []func() error{
		func() error { return p.Resize(wrenn.TTYSize{Cols: 120, Rows: 40}) },
		func() error { return p.Signal("SIGINT") },
		p.CloseStdin,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if side.String() != "120x40 SIGINT" {
		t.Errorf("stderr %q", side.String())
	}
}

func TestStreamErrors(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := serve(t, echoServer(t)).Sandbox(someID).Start(ctx, wrenn.StartOptions{Cmd: "nope"})
	if wrenn.CodeOf(err) != wrenn.CodeInvalidRequest {
		t.Errorf("error inside the stream: %v", err)
	}
	refusing := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusConflict, apiError(wrenn.CodeInvalidState, "it is paused"))
	}))
	_, err = refusing.Sandbox(someID).Start(ctx, wrenn.StartOptions{Cmd: "true"})
	if wrenn.CodeOf(err) != wrenn.CodeInvalidState {
		t.Errorf("refused upgrade: %v", err)
	}
	cut := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		_, _, _ = conn.Read(r.Context())
		_ = wsjson.Write(r.Context(), conn, api.StreamServerMessage{Type: "start", PID: 7})
		_ = conn.CloseNow()
	}))
	_, err = cut.Sandbox(someID).Run(ctx, wrenn.StartOptions{Cmd: "sleep"})
	if err == nil || !strings.Contains(err.Error(), "lost") {
		t.Errorf("a lost connection: %v", err)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	stored := map[string][]byte{}
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, user := r.URL.Query().Get("path"), r.URL.Query().Get("user")
		switch r.Method {
		case http.MethodPut:
			stored[user+":"+path], _ = io.ReadAll(r.Body)
			answer(w, 200, api.FileEntry{Name: path, Size: int64(len(stored[user+":"+path]))})
		case http.MethodGet:
			data, ok := stored[user+":"+path]
			if !ok {
				answer(w, 404, apiError("not_found", "no such file"))
				return
			}
			_, _ = w.Write(data)
		}
	}))
	ctx, files := context.Background(), c.Sandbox(someID).Files()
	for _, body := range []string{"", "hello"} {
		info, err := files.As("root").Write(ctx, "/etc/ü & b", strings.NewReader(body))
		if err != nil || info.Size != int64(len(body)) {
			t.Fatalf("write %q: %+v %v", body, info, err)
		}
		got, err := files.As("root").Read(ctx, "/etc/ü & b")
		if err != nil || string(got) != body {
			t.Errorf("read %q %v, want %q", got, err, body)
		}
	}
	if _, err := files.Read(ctx, "/etc/ü & b"); !wrenn.IsNotFound(err) {
		t.Errorf("another user's view: %v", err)
	}
	broken := errors.New("disk on fire")
	if _, err := files.Write(ctx, "x", io.MultiReader(strings.NewReader("a"), failing{broken})); !errors.Is(err, broken) {
		t.Errorf("failing source: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestWatch(t *testing.T) {
	t.Parallel()
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if r.URL.Query().Get("recursive") != "true" {
			t.Errorf("query %v", r.URL.Query())
		}
		for _, m := range []api.WatchMessage{{Type: "start"}, {Type: "event", Event: "create", Name: "a"},
			{Type: "error", Error: api.ErrorBody{Code: "not_found", Message: "the directory is gone"}}} {
			_ = wsjson.Write(r.Context(), conn, m)
		}
		_ = conn.Close(websocket.StatusNormalClosure, "")
	}))
	events, err := c.Sandbox(someID).Files().Watch(context.Background(), ".", true)
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	var last error
	for e, err := range events {
		if err != nil {
			last = err
			break
		}
		seen = append(seen, string(e.Event)+" "+e.Name)
	}
	if len(seen) != 1 || seen[0] != "create a" || !wrenn.IsNotFound(last) {
		t.Errorf("events %v, then %v", seen, last)
	}
}
