package api_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
)

type execResult struct {
	Stdout, Stderr, Encoding string
	ExitCode                 int  `json:"exit_code"`
	DurationMS               int  `json:"duration_ms"`
	StdoutTruncated          bool `json:"stdout_truncated"`
	StderrTruncated          bool `json:"stderr_truncated"`
	TimedOut                 bool `json:"timed_out"`
	Signal                   string
	PID                      int
}

// inSandbox is a user with a sandbox on a host.
func inSandbox(t *testing.T) (*planetest.Plane, *planetest.Host, planetest.User, string) {
	t.Helper()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	return p, h, u, "/v1/sandboxes/" + create(t, u, nil).ID
}

func TestExec(t *testing.T) {
	t.Parallel()
	_, h, u, sb := inSandbox(t)
	for name, c := range map[string]struct {
		body map[string]any
		want execResult
	}{
		"as given":    {map[string]any{"cmd": "/bin/echo", "args": []string{"a  b", "$HOME"}}, execResult{Stdout: "a  b $HOME\n"}},
		"by a shell":  {map[string]any{"cmd": "echo $((6*7)); echo no >&2; exit 3", "shell": true}, execResult{Stdout: "42\n", Stderr: "no\n", ExitCode: 3}},
		"shell args":  {map[string]any{"cmd": "echo $0-$1", "shell": true, "args": []string{"x", "y z"}}, execResult{Stdout: "x-y z\n"}},
		"env and cwd": {map[string]any{"cmd": "echo $X; pwd", "shell": true, "env": map[string]string{"X": "1 2"}, "cwd": "/"}, execResult{Stdout: "1 2\n/\n"}},
		"stdin":       {map[string]any{"cmd": "wc", "args": []string{"-c"}, "stdin": strings.Repeat("x", 300_000)}, execResult{Stdout: "300000\n"}},
		"no stdin":    {map[string]any{"cmd": "cat"}, execResult{}},
		"empty stdin": {map[string]any{"cmd": "cat", "stdin": ""}, execResult{}},
		"binary":      {map[string]any{"cmd": `printf '\377\000'`, "shell": true}, execResult{Stdout: "/wA=", Encoding: "base64"}},
		"by a signal": {map[string]any{"cmd": "kill -KILL $$", "shell": true}, execResult{ExitCode: 137, Signal: "SIGKILL"}},
		"over time":   {map[string]any{"cmd": "echo before; sleep 60", "shell": true, "timeout_sec": 1}, execResult{Stdout: "before\n", ExitCode: -1, TimedOut: true}},
		"in time":     {map[string]any{"cmd": "echo quick", "shell": true, "timeout_sec": 20}, execResult{Stdout: "quick\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got execResult
			u.Do("POST", sb+"/exec", c.body).Want(t, 200, &got)
			if c.want.Encoding == "" {
				c.want.Encoding = "utf-8"
			}
			if c.body["timeout_sec"] == 1 && (got.DurationMS < 900 || got.DurationMS > 20_000) {
				t.Errorf("took %d ms", got.DurationMS)
			}
			got.DurationMS = 0
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
	t.Run("refusals", func(t *testing.T) {
		t.Parallel()
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "/no/such/program"}).WantError(t, 404, "not_found")
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "true", "user": "nobody_here"}).WantError(t, 400, "invalid_request")
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "true", "env": map[string]string{"A=B": "1"}}).WantError(t, 400, "invalid_request")
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "a\x00b"}).WantError(t, 400, "invalid_request")
	})
	t.Run("too much output", func(t *testing.T) {
		t.Parallel()
		var got execResult
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "yes é | head -c 20000000; echo end >&2", "shell": true}).Want(t, 200, &got)
		if !got.StdoutTruncated || got.StderrTruncated || got.Stderr != "end\n" || got.Encoding != "utf-8" || len(got.Stdout) < 16<<20-4 || len(got.Stdout) > 16<<20 {
			t.Errorf("kept %d bytes, %s, truncated %v %v", len(got.Stdout), got.Encoding, got.StdoutTruncated, got.StderrTruncated)
		}
	})
	t.Run("background", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(h.Home, "background")
		var got execResult
		u.Do("POST", sb+"/exec", map[string]any{"cmd": "cat > " + file + "; exec sleep 300", "shell": true, "background": true, "stdin": "text"}).Want(t, 202, &got)
		if got.PID == 0 {
			t.Fatal("no pid")
		}
		planetest.Eventually(t, "it does its work", func() bool { b, _ := os.ReadFile(file); return string(b) == "text" })
		var list struct {
			Processes []struct {
				PID int
				Cmd string
			}
		}
		u.Do("GET", sb+"/processes", nil).Want(t, 200, &list)
		found := false
		for _, pr := range list.Processes {
			found = found || pr.PID == got.PID && pr.Cmd == "/bin/bash"
		}
		if !found {
			t.Errorf("process %d is not in %+v", got.PID, list)
		}
		path := fmt.Sprintf("%s/processes/%d/signal", sb, got.PID)
		u.Do("POST", path, map[string]any{"signal": "SIGNONSENSE"}).WantError(t, 400, "invalid_request")
		u.Do("POST", path, map[string]any{"signal": "99"}).WantError(t, 400, "invalid_request")
		u.Do("POST", path, map[string]any{"signal": "TERM"}).Want(t, 204, nil)
		planetest.Eventually(t, "it is gone", func() bool {
			return u.Do("POST", path, map[string]any{"signal": "15"}).Status == 404
		})
	})
}

func TestFiles(t *testing.T) {
	t.Parallel()
	p, h, u, sb := inSandbox(t)
	content := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	put := func(path string, body io.Reader) planetest.Answer {
		t.Helper()
		a, err := p.Try(t.Context(), "PUT", sb+"/files?path="+url.QueryEscape(path), body, u.Header(), http.Header{"Content-Type": {"application/octet-stream"}})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	var entry struct {
		Name, Type, Path, Permissions string
		Size                          int
	}
	put("dir/a b.bin", bytes.NewReader(content)).Want(t, 200, &entry)
	if entry.Name != "a b.bin" || entry.Type != "file" || entry.Size != len(content) || entry.Path != filepath.Join(h.Home, "dir/a b.bin") {
		t.Errorf("written: %+v", entry)
	}
	file := sb + "/files?path=" + url.QueryEscape("dir/a b.bin")
	a := u.Do("GET", file, nil)
	if a.Status != 200 || sha256.Sum256(a.Body) != sha256.Sum256(content) || a.Header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("read %d bytes, %d, %v", len(a.Body), a.Status, a.Header)
	}
	a = u.Do("GET", file, nil, http.Header{"Range": {"bytes=16-31"}})
	if a.Status != 206 || string(a.Body) != "0123456789abcdef" || a.Header.Get("Content-Range") != fmt.Sprintf("bytes 16-31/%d", len(content)) {
		t.Errorf("range: %d %q %v", a.Status, a.Body, a.Header)
	}
	u.Do("GET", file, nil, http.Header{"Range": {"bytes=99999999-"}}).WantError(t, 416, "invalid_request")
	a = u.Do("HEAD", file, nil)
	if a.Status != 200 || len(a.Body) != 0 || a.Header.Get("Content-Length") != fmt.Sprint(len(content)) {
		t.Errorf("head: %d %v", a.Status, a.Header)
	}
	put("empty", http.NoBody).Want(t, 200, &entry)
	if entry.Size != 0 {
		t.Errorf("an empty file has %d bytes", entry.Size)
	}

	var list struct{ Entries []struct{ Name, Type string } }
	u.Do("GET", sb+"/files/list?path=.&depth=2", nil).Want(t, 200, &list)
	if len(list.Entries) != 3 {
		t.Errorf("list: %+v", list)
	}
	u.Do("POST", sb+"/files/mkdir", map[string]any{"path": "x/y"}).Want(t, 201, &entry)
	if entry.Type != "directory" {
		t.Errorf("mkdir: %+v", entry)
	}
	u.Do("POST", sb+"/files/mkdir", map[string]any{"path": "x/y"}).WantError(t, 409, "already_exists")
	u.Do("POST", sb+"/files/move", map[string]any{"source": "empty", "destination": "x/y/moved"}).Want(t, 200, nil)
	u.Do("GET", sb+"/files/stat?path=empty", nil).WantError(t, 404, "not_found")
	u.Do("GET", sb+"/files/stat?path=x/y/moved", nil).Want(t, 200, &entry)
	u.Do("DELETE", sb+"/files?path=x", nil).Want(t, 204, nil)
	u.Do("GET", sb+"/files?path=x/y/moved", nil).WantError(t, 404, "not_found")
	u.Do("GET", sb+"/files", nil).WantError(t, 400, "invalid_request")
	u.Do("GET", sb+"/files?path=", nil).WantError(t, 400, "invalid_request")
	u.Do("GET", sb+"/files?path=a%00b", nil).WantError(t, 400, "invalid_request")
	u.Do("GET", sb+"/files?path=a&user=../x", nil).WantError(t, 400, "invalid_request")
	u.Do("GET", sb+"/files/list?path=.&depth=1000", nil).WantError(t, 400, "invalid_request")
}

// message is any message of a stream.
type message struct {
	Type       string            `json:"type"`
	Cmd        string            `json:"cmd,omitempty"`
	Args       []string          `json:"args,omitempty"`
	Shell      bool              `json:"shell,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	TimeoutSec int               `json:"timeout_sec,omitempty"`
	TTY        *tty              `json:"tty,omitempty"`
	Signal     string            `json:"signal,omitempty"`
	Data       string            `json:"data,omitempty"`
	PID        int               `json:"pid,omitempty"`
	ExitCode   *int              `json:"exit_code,omitempty"`
	TimedOut   bool              `json:"timed_out,omitempty"`
	Error      *struct {
		Code    string
		Message string
		Details map[string]any
	} `json:"error,omitempty"`
	Event string `json:"event,omitempty"`
	Name  string `json:"name,omitempty"`
}

type tty struct {
	Cols int `json:"cols"`
	Rows int `json:"rows"`
}

// stream is a WebSocket of a test.
type stream struct {
	t    *testing.T
	conn *websocket.Conn
	ctx  context.Context
}

func dial(t *testing.T, p *planetest.Plane, u planetest.User, path string) *stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*planetest.Patience)
	t.Cleanup(cancel)
	conn, _, err := websocket.Dial(ctx, strings.Replace(p.URL, "http", "ws", 1)+path, &websocket.DialOptions{HTTPHeader: u.Header()})
	if err != nil {
		t.Fatal(err)
	}
	conn.SetReadLimit(4 << 20)
	t.Cleanup(func() { _ = conn.CloseNow() })
	return &stream{t, conn, ctx}
}

func (s *stream) send(m message) {
	s.t.Helper()
	raw, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	s.raw(string(raw))
}

func (s *stream) raw(text string) {
	s.t.Helper()
	if err := s.conn.Write(s.ctx, websocket.MessageText, []byte(text)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stream) next() message {
	s.t.Helper()
	_, raw, err := s.conn.Read(s.ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	var m message
	if err := json.Unmarshal(raw, &m); err != nil {
		s.t.Fatal(err)
	}
	return m
}

func (m message) bytes(t *testing.T) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rest reads to the end and gives what was printed.
func (s *stream) rest() (stdout, stderr string, last message) {
	s.t.Helper()
	var out, errs bytes.Buffer
	for {
		m := s.next()
		switch m.Type {
		case "stdout":
			out.Write(m.bytes(s.t))
		case "stderr":
			errs.Write(m.bytes(s.t))
		case "exit", "error":
			return out.String(), errs.String(), m
		default:
			s.t.Fatalf("unexpected %+v", m)
		}
	}
}

func (s *stream) until(text string) {
	s.t.Helper()
	var out bytes.Buffer
	for !strings.Contains(out.String(), text) {
		m := s.next()
		if m.Type != "stdout" && m.Type != "stderr" {
			s.t.Fatalf("%+v before %q in %q", m, text, out.String())
		}
		out.Write(m.bytes(s.t))
	}
}

func data(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

func TestExecStream(t *testing.T) {
	t.Parallel()
	p, h, u, sb := inSandbox(t)
	t.Run("input, output, exit", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "tr a-z A-Z; echo $X >&2; exit 5", Shell: true, Env: map[string]string{"X": "y"}})
		if m := s.next(); m.Type != "start" || m.PID == 0 {
			t.Fatalf("first: %+v", m)
		}
		s.send(message{Type: "stdin", Data: data("hello ")})
		s.send(message{Type: "stdin", Data: data("you")})
		s.send(message{Type: "close"})
		stdout, stderr, last := s.rest()
		if stdout != "HELLO YOU" || stderr != "y\n" || last.Type != "exit" || *last.ExitCode != 5 {
			t.Errorf("%q %q %+v", stdout, stderr, last)
		}
		if _, _, err := s.conn.Read(s.ctx); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
			t.Errorf("closed with %v", err)
		}
	})
	t.Run("more than fits in memory", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "head", Args: []string{"-c", "50000000", "/dev/zero"}})
		s.next()
		stdout, _, last := s.rest()
		if len(stdout) != 50_000_000 || *last.ExitCode != 0 {
			t.Errorf("%d bytes, %+v", len(stdout), last)
		}
	})
	t.Run("signal behind input that nobody reads", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "sleep", Args: []string{"300"}})
		s.next()
		s.send(message{Type: "stdin", Data: data(strings.Repeat("x", 500_000))})
		s.send(message{Type: "signal", Signal: "INT"})
		if _, _, last := s.rest(); last.Type != "exit" || *last.ExitCode != 130 {
			t.Errorf("%+v", last)
		}
	})
	t.Run("time limit", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "echo a; sleep 60", Shell: true, TimeoutSec: 1})
		s.next()
		if stdout, _, last := s.rest(); stdout != "a\n" || !last.TimedOut || *last.ExitCode != -1 {
			t.Errorf("%q %+v", stdout, last)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/pty")
		s.send(message{Type: "start", Cmd: "/bin/bash", Args: []string{"--norc"}, TTY: &tty{100, 30}})
		s.next()
		s.send(message{Type: "stdin", Data: data("stty size\n")})
		s.until("30 100")
		s.send(message{Type: "resize", TTY: &tty{90, 20}})
		s.send(message{Type: "stdin", Data: data("stty size\n")})
		s.until("20 90")
		s.send(message{Type: "stdin", Data: data("exit 4\n")})
		if _, _, last := s.rest(); last.Type != "exit" || *last.ExitCode != 4 {
			t.Errorf("%+v", last)
		}
	})
	t.Run("end of input in a terminal", func(t *testing.T) {
		t.Parallel()
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "cat", TTY: &tty{80, 24}})
		s.next()
		s.send(message{Type: "stdin", Data: data("line\n")})
		s.until("line\r\nline\r\n")    // its echo, and cat's
		s.send(message{Type: "close"}) // becomes Ctrl-D
		if _, _, last := s.rest(); last.Type != "exit" || *last.ExitCode != 0 {
			t.Errorf("%+v", last)
		}
	})
	t.Run("leave and attach", func(t *testing.T) {
		t.Parallel()
		fifo := filepath.Join(h.Home, "go")
		s := dial(t, p, u, sb+"/exec/stream")
		s.send(message{Type: "start", Cmd: "until [ -e " + fifo + " ]; do sleep 0.05; done; cat; echo done", Shell: true})
		pid := s.next().PID
		_ = s.conn.CloseNow()
		a := dial(t, p, u, fmt.Sprintf("%s/processes/%d/attach", sb, pid))
		if m := a.next(); m.Type != "start" || m.PID != pid {
			t.Fatalf("attached: %+v", m)
		}
		if err := os.WriteFile(fifo, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		a.send(message{Type: "stdin", Data: data("again ")})
		a.send(message{Type: "close"})
		if stdout, _, last := a.rest(); stdout != "again done\n" || last.Type != "exit" || *last.ExitCode != 0 {
			t.Errorf("%q %+v", stdout, last)
		}
	})
	t.Run("watch", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(h.Home, "watched")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		s := dial(t, p, u, sb+"/files/watch?path=watched&recursive=true")
		if m := s.next(); m.Type != "start" {
			t.Fatalf("first: %+v", m)
		}
		if err := os.WriteFile(filepath.Join(dir, "new"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if m := s.next(); m.Type != "event" || m.Event != "create" || m.Name != "new" {
			t.Errorf("%+v", m)
		}
	})
}

func TestStreamRefusals(t *testing.T) {
	t.Parallel()
	p, _, u, sb := inSandbox(t)
	u.Do("GET", sb+"/exec/stream", nil).WantError(t, 400, "invalid_request")
	for name, c := range map[string]struct{ path, text, code, field string }{
		"not JSON":       {"/exec/stream", "{", "invalid_request", "body"},
		"not an object":  {"/exec/stream", "7", "invalid_request", "body"},
		"no type":        {"/exec/stream", "{}", "invalid_request", "type"},
		"unknown type":   {"/exec/stream", `{"type":"dance"}`, "invalid_request", "type"},
		"unknown field":  {"/exec/stream", `{"type":"start","cmd":"true","x":1}`, "invalid_request", "x"},
		"no start":       {"/exec/stream", `{"type":"stdin","data":""}`, "invalid_request", "type"},
		"no command":     {"/exec/stream", `{"type":"start"}`, "invalid_request", "cmd"},
		"bad terminal":   {"/pty", `{"type":"start","tty":{"cols":0,"rows":-1}}`, "invalid_request", "tty"},
		"NUL":            {"/exec/stream", `{"type":"start","cmd":"a\u0000"}`, "invalid_request", "cmd"},
		"too large":      {"/exec/stream", `{"type":"start","cmd":"` + strings.Repeat("x", 1<<20) + `"}`, "too_large", ""},
		"no program":     {"/exec/stream", `{"type":"start","cmd":"/no/such"}`, "not_found", ""},
		"no process":     {"/processes/4000000/attach", "", "not_found", ""},
		"no directory":   {"/files/watch?path=/no/such", "", "not_found", ""},
		"unknown signal": {"/exec/stream", `{"type":"start","cmd":"sleep","args":["300"],"timeout_sec":20}` + "\n" + `{"type":"signal","signal":"SIGFOO"}`, "invalid_request", "signal"},
		"not base64":     {"/exec/stream", `{"type":"start","cmd":"sleep","args":["300"],"timeout_sec":20}` + "\n" + `{"type":"stdin","data":"***"}`, "invalid_request", "data"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := dial(t, p, u, sb+c.path)
			for _, text := range strings.Split(c.text, "\n") {
				if text != "" {
					s.raw(text)
				}
			}
			m := s.next()
			if m.Type == "start" {
				m = s.next()
			}
			if m.Type != "error" || m.Error == nil || m.Error.Code != c.code || m.Error.Message == "" {
				t.Fatalf("got %+v, want an error %s", m, c.code)
			}
			if field, _ := m.Error.Details["field"].(string); !strings.HasPrefix(field, c.field) {
				t.Errorf("names the field %q, want %q", field, c.field)
			}
			if _, _, err := s.conn.Read(s.ctx); websocket.CloseStatus(err) == -1 {
				t.Errorf("not closed in order: %v", err)
			}
		})
	}
}

// A command whose client is gone goes on; nothing of the client's stays behind in the control plane.
func TestStreamsEndWithServer(t *testing.T) {
	t.Parallel()
	p, _, u, sb := inSandbox(t)
	s := dial(t, p, u, sb+"/exec/stream")
	s.send(message{Type: "start", Cmd: "sleep", Args: []string{"5"}})
	s.next()
	stopped := make(chan struct{})
	go func() {
		p.Stop()
		close(stopped)
	}()
	if _, _, err := s.conn.Read(s.ctx); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("closed with %v", err)
	}
	select {
	case <-stopped:
	case <-time.After(planetest.Patience):
		t.Error("the server did not stop")
	}
}
