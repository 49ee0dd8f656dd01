package wrenn

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

const (
	// stdinChunk is how much input one message carries.
	stdinChunk = 32 << 10
	// maxMessage bounds a message from the server.
	maxMessage = 2 << 20
)

// TTYSize is the size of a terminal in characters.
type TTYSize struct{ Cols, Rows int }

// StartOptions describe a command that is worked with while it runs.
type StartOptions struct {
	Cmd     string
	Args    []string
	Shell   bool
	Env     map[string]string
	Cwd     string
	User    string
	Timeout time.Duration
	// TTY runs the command in a terminal of this size; its output is all Stdout then.
	TTY *TTYSize
	// Stdin is read until its end, which is then passed on. Nil leaves the input open, for Write and
	// CloseStdin.
	Stdin io.Reader
	// Stdout and Stderr take the output as it comes; nil discards it. A slow writer slows the command.
	Stdout, Stderr io.Writer
}

// Exit is how a command ended.
type Exit struct {
	// Code is 128 + n if signal n ended the command, -1 if it ran out of time.
	Code     int
	Signal   string
	TimedOut bool
	Duration time.Duration
}

// Process is a command in a sandbox with a connection to it. If the connection is lost or closed the
// command goes on; Attach finds it again by its PID.
type Process struct {
	PID int

	conn   *websocket.Conn
	opts   StartOptions
	ctx    context.Context //nolint:containedctx // the stream's own life
	cancel context.CancelFunc
	done   chan struct{}
	exit   *Exit
	err    error
	send   sync.Mutex
}

// Start runs a command and gives it back as soon as it runs. ctx covers the connection, not the command.
func (s *Sandbox) Start(ctx context.Context, o StartOptions) (*Process, error) {
	return s.open(ctx, "/exec/stream", o, o.start())
}

// Terminal opens a terminal with a command, or with the user's login shell if o.Cmd is empty.
func (s *Sandbox) Terminal(ctx context.Context, o StartOptions) (*Process, error) {
	if o.TTY == nil {
		o.TTY = &TTYSize{Cols: 80, Rows: 24}
	}
	return s.open(ctx, "/pty", o, o.start())
}

// Attach connects to a command that runs. Of o only Stdin, Stdout and Stderr count; the output comes
// from this moment on.
func (s *Sandbox) Attach(ctx context.Context, pid int, o StartOptions) (*Process, error) {
	return s.open(ctx, "/processes/"+strconv.Itoa(pid)+"/attach", o, nil)
}

func (o StartOptions) start() *api.StreamClientMessage {
	m := &api.StreamClientMessage{Type: api.StreamClientMessageTypeStart, Cmd: o.Cmd, Args: o.Args, Shell: o.Shell,
		Env: o.Env, Cwd: o.Cwd, User: o.User, TimeoutSec: seconds(o.Timeout)}
	if o.TTY != nil {
		m.TTY = o.TTY.wire()
	}
	return m
}

func (t TTYSize) wire() api.TTYSize { return api.TTYSize{Cols: int32(t.Cols), Rows: int32(t.Rows)} }

func (s *Sandbox) open(ctx context.Context, path string, o StartOptions, first *api.StreamClientMessage) (*Process, error) {
	conn, err := s.client.dial(ctx, s.path(path), nil)
	if err != nil {
		return nil, err
	}
	own, cancel := context.WithCancel(ctx)
	p := &Process{conn: conn, opts: o, ctx: own, cancel: cancel, done: make(chan struct{})}
	if first != nil {
		if err := p.write(*first); err != nil {
			p.Close()
			return nil, err
		}
	}
	m, err := p.read()
	if err == nil && m.Type != api.StreamServerMessageTypeStart {
		err = fmt.Errorf("wrenn: the server began a stream with %q", m.Type)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	p.PID = int(m.PID)
	go p.receive()
	if o.Stdin != nil {
		go p.pump(o.Stdin)
	}
	return p, nil
}

// dial opens a WebSocket. A refusal comes as an ordinary answer with an error in it.
func (c *Client) dial(ctx context.Context, path string, query url.Values) (*websocket.Conn, error) {
	u := *c.base
	u.Path += path
	u.RawQuery = query.Encode()
	header := http.Header{}
	c.authorize(header, asTeam)
	conn, res, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: header,
		CompressionMode: websocket.CompressionDisabled})
	if err == nil {
		conn.SetReadLimit(maxMessage)
		return conn, nil
	}
	if res != nil && res.Body != nil {
		defer res.Body.Close()
	}
	if res != nil && res.StatusCode >= 300 {
		return nil, readError(res)
	}
	return nil, c.connectionError(ctx, err)
}

// receive passes output on until the command has ended or the connection has.
func (p *Process) receive() {
	defer close(p.done)
	defer p.cancel()
	for {
		m, err := p.read()
		if err != nil {
			p.err = err
			_ = p.conn.CloseNow()
			return
		}
		switch m.Type {
		case api.StreamServerMessageTypeStdout:
			err = deliver(p.opts.Stdout, m.Data)
		case api.StreamServerMessageTypeStderr:
			err = deliver(p.opts.Stderr, m.Data)
		case api.StreamServerMessageTypeExit:
			p.exit = &Exit{Code: int(m.ExitCode), Signal: m.Signal, TimedOut: m.TimedOut,
				Duration: time.Duration(m.DurationMS) * time.Millisecond}
			_ = p.conn.Close(websocket.StatusNormalClosure, "")
			return
		}
		if err != nil {
			p.err = err
			_ = p.conn.CloseNow()
			return
		}
	}
}

func deliver(w io.Writer, data string) error {
	raw, err := base64.StdEncoding.DecodeString(data)
	if err != nil {
		return fmt.Errorf("wrenn: the server sent output that is not base64: %w", err)
	}
	if w == nil {
		return nil
	}
	_, err = w.Write(raw)
	return err
}

// read gives the next message; an error message of the server is an error.
func (p *Process) read() (*api.StreamServerMessage, error) {
	_, raw, err := p.conn.Read(p.ctx)
	if err != nil {
		if p.ctx.Err() != nil {
			return nil, p.ctx.Err()
		}
		return nil, fmt.Errorf("the connection to the command was lost (it goes on in the sandbox): %w", err)
	}
	var m api.StreamServerMessage
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("wrenn: a message of the stream is not understood: %w", err)
	}
	if m.Type == api.StreamServerMessageTypeError {
		e := &APIError{}
		e.fill(m.Error)
		return nil, e
	}
	return &m, nil
}

func (p *Process) write(m api.StreamClientMessage) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	p.send.Lock()
	defer p.send.Unlock()
	return p.conn.Write(p.ctx, websocket.MessageText, raw)
}

// pump sends what r gives and then the end of the input. Failing to send is left to receive to report.
func (p *Process) pump(r io.Reader) {
	buf := make([]byte, stdinChunk)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := p.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			_ = p.CloseStdin()
			return
		}
	}
}

// Write sends input to the command.
func (p *Process) Write(data []byte) (int, error) {
	for sent := 0; sent < len(data); sent += stdinChunk {
		chunk := data[sent:min(sent+stdinChunk, len(data))]
		m := api.StreamClientMessage{Type: api.StreamClientMessageTypeStdin, Data: base64.StdEncoding.EncodeToString(chunk)}
		if err := p.write(m); err != nil {
			return sent, err
		}
	}
	return len(data), nil
}

// CloseStdin ends the command's input.
func (p *Process) CloseStdin() error {
	return p.write(api.StreamClientMessage{Type: api.StreamClientMessageTypeClose})
}

// Resize tells the command's terminal its new size.
func (p *Process) Resize(size TTYSize) error {
	return p.write(api.StreamClientMessage{Type: api.StreamClientMessageTypeResize, TTY: size.wire()})
}

// Signal sends a signal, named with or without SIG.
func (p *Process) Signal(name string) error {
	return p.write(api.StreamClientMessage{Type: api.StreamClientMessageTypeSignal, Signal: name})
}

// Wait returns when the command has ended and all its output was written. A command that failed is
// not an error.
func (p *Process) Wait() (*Exit, error) {
	<-p.done
	if p.exit != nil {
		return p.exit, nil
	}
	return nil, p.err
}

// Close drops the connection; the command goes on.
func (p *Process) Close() {
	p.cancel()
	_ = p.conn.CloseNow()
}

// Run starts a command, waits for its end and gives how it ended.
func (s *Sandbox) Run(ctx context.Context, o StartOptions) (*Exit, error) {
	p, err := s.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	return p.Wait()
}
