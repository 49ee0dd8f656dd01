package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	maxFrame     = 1 << 20          // of a client's message
	maxStdin     = 512 << 10        // of its data
	startTimeout = 30 * time.Second // for the client's `start`
	pingEvery    = 30 * time.Second // keeps proxies from cutting a silent stream
	pongTimeout  = 5 * time.Minute  // generous: a client that does not read is slow, not dead
)

// socket is a WebSocket whose messages are JSON texts. One message at a time is in memory in each
// direction: a slow reader holds up the command, and a slow command its input.
type socket struct {
	conn *websocket.Conn
	ctx  context.Context
	stop context.CancelFunc
	srv  *Server
}

// upgrade turns the request into a WebSocket; it answers by itself if that fails.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (*socket, bool) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		s.fail(w, r, wrenn.Errorf(wrenn.KindInvalidRequest, "this route speaks WebSocket; connect with a WebSocket client").With("field", "Upgrade"))
		return nil, false
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		s.log.Debug("websocket handshake", "request_id", requestID(r.Context()), "error", err)
		return nil, false
	}
	conn.SetReadLimit(-1) // receive has its own, which can be told
	ctx, stop := context.WithCancel(r.Context())
	sock := &socket{conn: conn, ctx: ctx, stop: stop, srv: s}
	go sock.keepAlive()
	return sock, true
}

// keepAlive pings, and closes the socket when the server goes down.
func (k *socket) keepAlive() {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-k.ctx.Done():
			return
		case <-k.srv.streams.Done():
			_ = k.conn.Close(websocket.StatusGoingAway, "the server is going down; connect again")
			k.stop()
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(k.ctx, pongTimeout)
		err := k.conn.Ping(ctx)
		cancel()
		if err != nil {
			k.stop()
			return
		}
	}
}

func (k *socket) send(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return k.conn.Write(k.ctx, websocket.MessageText, text)
}

// end says goodbye: with an error message first, if there is one.
func (k *socket) end(err error) {
	if err == nil || errors.Is(err, errGone) {
		_ = k.conn.Close(websocket.StatusNormalClosure, "")
	} else if k.ctx.Err() == nil {
		pub := public(err)
		note(k.ctx, pub)
		body := errorBody(k.ctx, pub)
		_ = k.send(gen.StreamServerMessage{Type: gen.StreamServerMessageTypeError, Error: &body})
		status := websocket.StatusInternalError
		if pub.Kind == wrenn.KindInvalidRequest || pub.Kind == wrenn.KindTooLarge {
			status = websocket.StatusPolicyViolation
		}
		_ = k.conn.Close(status, string(pub.Kind))
	}
	k.stop()
	_ = k.conn.CloseNow()
}

// errGone tells that the client went away; nobody is left to be told.
var errGone = errors.New("the client went away")

// receive reads one message and holds it against the contract.
func (k *socket) receive(ctx context.Context) (gen.StreamClientMessage, error) {
	kind, rd, err := k.conn.Reader(ctx)
	if err != nil {
		return gen.StreamClientMessage{}, errors.Join(errGone, err)
	}
	text, err := io.ReadAll(io.LimitReader(rd, maxFrame+1))
	if err != nil {
		return gen.StreamClientMessage{}, errors.Join(errGone, err)
	}
	if len(text) > maxFrame {
		return gen.StreamClientMessage{}, wrenn.Errorf(wrenn.KindTooLarge, "a message is at most %d bytes", maxFrame)
	}
	if kind != websocket.MessageText {
		return gen.StreamClientMessage{}, invalid("message", "must be a text")
	}
	return k.srv.spec.clientMessage(text)
}

// clientMessage decodes and checks a message of a stream's client.
func (sp *spec) clientMessage(text []byte) (gen.StreamClientMessage, error) {
	var m gen.StreamClientMessage
	value, err := decode(text)
	if err != nil {
		return m, err
	}
	if err := visit("", sp.doc.Components.Schemas["StreamClientMessage"].Value, value); err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, badRequest(err)
	}
	return m, checkEnv(m.Env)
}

// execStream runs a command over a WebSocket.
func (s *Server) execStream(w http.ResponseWriter, r *http.Request) {
	s.startStream(w, r, func(m gen.StreamClientMessage) (command, error) {
		if m.Cmd == nil || *m.Cmd == "" {
			return command{}, invalid("cmd", "is missing")
		}
		return startCommand(m, m.Tty), nil
	})
}

// Sizes of a terminal whose client did not say.
const (
	defaultCols = 80
	defaultRows = 24
)

// openPTY runs a command, or a login shell, in a terminal over a WebSocket.
func (s *Server) openPTY(w http.ResponseWriter, r *http.Request) {
	s.startStream(w, r, func(m gen.StreamClientMessage) (command, error) {
		tty := m.Tty
		if tty == nil {
			tty = &gen.TTYSize{Cols: defaultCols, Rows: defaultRows}
		}
		c := startCommand(m, tty)
		if c.cmd == "" {
			c.cmd, c.args, c.shell = "/bin/bash", []string{"-il"}, false
		}
		return c, nil
	})
}

func startCommand(m gen.StreamClientMessage, tty *gen.TTYSize) command {
	return command{
		cmd: or(m.Cmd, ""), args: or(m.Args, nil), shell: or(m.Shell, false), env: m.Env, cwd: m.Cwd, user: m.User,
		timeout: time.Duration(or(m.TimeoutSec, 0)) * time.Second, stdin: true, tty: tty,
	}
}

func (s *Server) startStream(w http.ResponseWriter, r *http.Request, build func(gen.StreamClientMessage) (command, error)) {
	g, err := s.guest(r.Context(), r.PathValue("id"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	k, ok := s.upgrade(w, r)
	if !ok {
		return
	}
	k.end(func() error {
		ctx, cancel := context.WithTimeout(k.ctx, startTimeout)
		defer cancel()
		m, err := k.receive(ctx)
		if err != nil {
			return err
		}
		if m.Type != gen.StreamClientMessageTypeStart {
			return invalid("type", "the first message must be start")
		}
		c, err := build(m)
		if err != nil {
			return err
		}
		// The client took its time: meanwhile the sandbox may have been paused.
		return k.run(g.id, c, func(client processconnect.ProcessClient) (events, error) {
			stream, err := client.Start(k.ctx, c.request())
			return started{stream}, err
		})
	}())
}

// attachProcess follows a process that runs already.
func (s *Server) attachProcess(w http.ResponseWriter, r *http.Request) {
	pid, err := pathPID(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	g, err := s.guest(r.Context(), r.PathValue("id"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	k, ok := s.upgrade(w, r)
	if !ok {
		return
	}
	k.end(k.run(g.id, command{}, func(client processconnect.ProcessClient) (events, error) {
		stream, err := client.Connect(k.ctx, connect.NewRequest(&process.ConnectRequest{Process: byPID(pid)}))
		return attached{stream}, err
	}))
}

// run opens a process's events and follows them to their end. A host that refuses does so before the first.
func (k *socket) run(id string, c command, open func(processconnect.ProcessClient) (events, error)) error {
	_, err := held(k.ctx, k.srv, id, func(g guest) (struct{}, error) {
		client := k.srv.Agents.Process(g.target, g.id)
		ev, err := open(client)
		if err != nil {
			return struct{}{}, guestError(err)
		}
		return struct{}{}, k.follow(client, ev, c)
	})
	return err
}

// events are what a process does, from a start or from an attach.
type events interface {
	next() (*process.ProcessEvent, bool)
	failure() error
	close()
}

type started struct {
	s *connect.ServerStreamForClient[process.StartResponse]
}

func (e started) next() (*process.ProcessEvent, bool) {
	ok := e.s.Receive()
	return e.s.Msg().GetEvent(), ok
}
func (e started) failure() error { return e.s.Err() }
func (e started) close()         { _ = e.s.Close() }

type attached struct {
	s *connect.ServerStreamForClient[process.ConnectResponse]
}

func (e attached) next() (*process.ProcessEvent, bool) {
	ok := e.s.Receive()
	return e.s.Msg().GetEvent(), ok
}
func (e attached) failure() error { return e.s.Err() }
func (e attached) close()         { _ = e.s.Close() }

// follow passes a process's events to the client and the client's messages to the process, until the
// process ends or the client goes away; the process then goes on.
func (k *socket) follow(client processconnect.ProcessClient, ev events, c command) error {
	defer ev.close()
	begin := time.Now()
	input := make(chan error, 1)
	var end *process.ProcessEvent_EndEvent
	for {
		e, ok := ev.next()
		if !ok {
			break
		}
		switch e := e.GetEvent().(type) {
		case *process.ProcessEvent_Start:
			pid := int32(e.Start.GetPid())
			if err := k.send(gen.StreamServerMessage{Type: gen.StreamServerMessageTypeStart, Pid: &pid}); err != nil {
				return nil
			}
			go func() {
				err := k.passInput(client, e.Start.GetPid(), c.tty != nil)
				input <- err
				if err != nil {
					k.closeInput(err)
				}
			}()
		case *process.ProcessEvent_Data:
			if err := k.sendData(e.Data); err != nil {
				return nil
			}
		case *process.ProcessEvent_End:
			end = e.End
		}
	}
	return k.finish(ev.failure(), input, end, time.Since(begin), c)
}

// closeInput ends the stream when the client's side of it is over. A client that broke the contract is told; the command
// goes on either way.
func (k *socket) closeInput(err error) {
	if !errors.Is(err, errGone) {
		k.end(err)
	}
	k.stop()
}

func (k *socket) finish(failure error, input <-chan error, end *process.ProcessEvent_EndEvent, took time.Duration, c command) error {
	select {
	case err := <-input: // the client went away, or was told what it did wrong
		k.srv.log.Debug("stream", "request_id", requestID(k.ctx), "ended_by", err)
		return nil
	default:
	}
	timedOut := c.timeout > 0 && connect.CodeOf(failure) == connect.CodeDeadlineExceeded
	switch {
	case failure != nil && !timedOut:
		return guestError(failure)
	case end == nil && !timedOut:
		return wrenn.Errorf(wrenn.KindAgentError, "the stream was cut off: the sandbox stopped answering")
	}
	code, sig := exit(end, timedOut)
	ms := took.Milliseconds()
	m := gen.StreamServerMessage{Type: gen.StreamServerMessageTypeExit, ExitCode: &code, Signal: sig, DurationMs: &ms}
	if timedOut {
		m.TimedOut = &timedOut
	}
	_ = k.send(m)
	return nil
}

func (k *socket) sendData(d *process.ProcessEvent_DataEvent) error {
	m := gen.StreamServerMessage{Type: gen.StreamServerMessageTypeStdout}
	var raw []byte
	switch out := d.GetOutput().(type) {
	case *process.ProcessEvent_DataEvent_Stdout:
		raw = out.Stdout
	case *process.ProcessEvent_DataEvent_Pty:
		raw = out.Pty
	case *process.ProcessEvent_DataEvent_Stderr:
		raw, m.Type = out.Stderr, gen.StreamServerMessageTypeStderr
	}
	if len(raw) == 0 {
		return nil
	}
	data := base64.StdEncoding.EncodeToString(raw)
	m.Data = &data
	return k.send(m)
}
