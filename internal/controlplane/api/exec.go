package api

import (
	"context"
	"encoding/base64"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"

	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	maxOutput  = 16 << 20         // kept of each stream of an exec
	timeGrace  = 15 * time.Second // for the guest to kill a command whose time is over, and to say so
	unaryLimit = time.Minute      // for a call into the guest that is over soon
)

// command is a process to be started in a guest.
type command struct {
	cmd     string
	args    []string
	shell   bool
	env     *gen.Env
	cwd     *string
	user    *string
	timeout time.Duration // 0: none
	stdin   bool
	tty     *gen.TTYSize
}

func (c command) request() *connect.Request[process.StartRequest] {
	cfg := &process.ProcessConfig{Cmd: c.cmd, Args: c.args, Cwd: c.cwd}
	if c.shell {
		cfg.Cmd, cfg.Args = "/bin/bash", append([]string{"-lc", c.cmd}, c.args...)
	}
	if c.env != nil {
		cfg.Envs = *c.env
	}
	msg := &process.StartRequest{Process: cfg, Stdin: &c.stdin}
	if c.tty != nil {
		msg.Pty = &process.PTY{Size: &process.PTY_Size{Cols: uint32(c.tty.Cols), Rows: uint32(c.tty.Rows)}}
	}
	req := connect.NewRequest(msg)
	asUser(req.Header(), c.user)
	if c.timeout > 0 {
		// The guest holds the limit and kills; were it our deadline, we would miss what it says of that.
		req.Header().Set("Connect-Timeout-Ms", strconv.FormatInt(c.timeout.Milliseconds(), 10))
	}
	return req
}

// ExecSandbox implements gen.StrictServerInterface.
func (s *Server) ExecSandbox(ctx context.Context, req gen.ExecSandboxRequestObject) (gen.ExecSandboxResponseObject, error) {
	if attemptOf(ctx).again {
		return nil, wrenn.Errorf(wrenn.KindConflict, "the first request with this Idempotency-Key was cut off; whether its command ran is not known; look, and use a new key")
	}
	b := req.Body
	if err := checkEnv(b.Env); err != nil {
		return nil, err
	}
	c := command{
		cmd: b.Cmd, args: or(b.Args, nil), shell: or(b.Shell, false), env: b.Env, cwd: b.Cwd, user: b.User,
		timeout: time.Duration(or(b.TimeoutSec, 0)) * time.Second, stdin: b.Stdin != nil,
	}
	return held(ctx, s, req.ID, func(g guest) (gen.ExecSandboxResponseObject, error) {
		run := &run{client: s.Agents.Process(g.target, g.id), input: []byte(or(b.Stdin, "")), start: time.Now()}
		return run.answer(ctx, c, or(b.Background, false))
	})
}

// answer runs the command, or starts it in the background.
func (r *run) answer(ctx context.Context, c command, background bool) (gen.ExecSandboxResponseObject, error) {
	if background {
		pid, err := r.background(ctx, c)
		if err != nil {
			return nil, err
		}
		return gen.ExecSandbox202JSONResponse{Pid: pid}, nil
	}
	if err := r.wait(ctx, c); err != nil {
		return nil, err
	}
	return gen.ExecSandbox200JSONResponse(r.result()), nil
}

// run is one command whose output is collected.
type run struct {
	client   processconnect.ProcessClient
	input    []byte
	start    time.Time
	took     time.Duration
	stdout   clipped
	stderr   clipped
	end      *process.ProcessEvent_EndEvent
	timedOut bool
}

// wait runs the command to its end.
func (r *run) wait(ctx context.Context, c command) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if c.timeout > 0 {
		defer time.AfterFunc(c.timeout+timeGrace, cancel).Stop()
	}
	stream, err := r.client.Start(ctx, c.request())
	if err != nil {
		return guestError(err)
	}
	defer stream.Close()
	for stream.Receive() {
		switch ev := stream.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			if c.stdin {
				go r.feed(ctx, ev.Start.GetPid())
			}
		case *process.ProcessEvent_Data:
			r.stdout.add(ev.Data.GetStdout())
			r.stderr.add(ev.Data.GetStderr())
		case *process.ProcessEvent_End:
			r.end = ev.End
		}
	}
	r.took = time.Since(r.start)
	err = stream.Err()
	switch {
	case c.timeout > 0 && r.took >= c.timeout && (connect.CodeOf(err) == connect.CodeDeadlineExceeded || ctx.Err() != nil):
		r.timedOut = true
	case err != nil:
		return guestError(err)
	case r.end == nil:
		return wrenn.Errorf(wrenn.KindAgentError, "the command was cut off: its sandbox stopped answering")
	}
	return nil
}

// background starts the command and leaves it.
func (r *run) background(ctx context.Context, c command) (pid int32, err error) {
	ctx, cancel := context.WithTimeout(ctx, unaryLimit)
	defer cancel()
	// Without a deadline of its own: that would become the command's.
	streamCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	stream, err := r.client.Start(streamCtx, c.request())
	if err != nil {
		return 0, guestError(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if ev := stream.Msg().GetEvent().GetStart(); ev != nil {
			if c.stdin {
				r.feed(ctx, ev.GetPid())
			}
			return int32(ev.GetPid()), nil
		}
	}
	if err := stream.Err(); err != nil {
		return 0, guestError(err)
	}
	return 0, wrenn.Errorf(wrenn.KindAgentError, "the command was cut off before it started")
}

// feed gives the command its standard input and ends it. A command that does not want it has closed it or
// ended; that is its business.
func (r *run) feed(ctx context.Context, pid uint32) {
	sel := byPID(pid)
	if len(r.input) > 0 {
		in := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: r.input}}
		if _, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: sel, Input: in})); err != nil {
			return
		}
	}
	_, _ = r.client.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: sel}))
}

func (r *run) result() gen.ExecResult {
	out := gen.ExecResult{Encoding: gen.ExecResultEncodingUTF8, DurationMs: r.took.Milliseconds(), StdoutTruncated: r.stdout.cut, StderrTruncated: r.stderr.cut}
	stdout, stderr := r.stdout.bytes(), r.stderr.bytes()
	if utf8.Valid(stdout) && utf8.Valid(stderr) {
		out.Stdout, out.Stderr = string(stdout), string(stderr)
	} else {
		out.Encoding = gen.ExecResultEncodingBase64
		out.Stdout, out.Stderr = base64.StdEncoding.EncodeToString(stdout), base64.StdEncoding.EncodeToString(stderr)
	}
	out.ExitCode, out.Signal = exit(r.end, r.timedOut)
	if r.timedOut {
		out.TimedOut = &r.timedOut
	}
	return out
}

// exit is how a command ended: its code, 128 + n for signal n as shells count, -1 when its time was over.
func exit(end *process.ProcessEvent_EndEvent, timedOut bool) (code int32, signal *string) {
	switch {
	case timedOut:
		return -1, nil
	case end.GetExited():
		return end.GetExitCode(), nil
	}
	if name, n := signalOf(end.GetStatus()); n != 0 {
		return 128 + n, &name
	}
	return end.GetExitCode(), nil
}

// clipped keeps the first maxOutput bytes of a stream.
type clipped struct {
	buf []byte
	cut bool
}

func (c *clipped) add(p []byte) {
	if room := maxOutput - len(c.buf); len(p) > room {
		p, c.cut = p[:room], true
	}
	c.buf = append(c.buf, p...)
}

// bytes drops a character that the cut went through.
func (c *clipped) bytes() []byte {
	if !c.cut {
		return c.buf
	}
	for i := 1; i < utf8.UTFMax && i <= len(c.buf); i++ {
		if tail := c.buf[len(c.buf)-i:]; utf8.RuneStart(tail[0]) {
			if !utf8.FullRune(tail) {
				return c.buf[:len(c.buf)-i]
			}
			break
		}
	}
	return c.buf
}

// ListProcesses implements gen.StrictServerInterface.
func (s *Server) ListProcesses(ctx context.Context, req gen.ListProcessesRequestObject) (gen.ListProcessesResponseObject, error) {
	res, err := processCall(ctx, s, req.ID, func(ctx context.Context, c processconnect.ProcessClient) (*connect.Response[process.ListResponse], error) {
		return c.List(ctx, connect.NewRequest(&process.ListRequest{}))
	})
	if err != nil {
		return nil, err
	}
	out := gen.ListProcesses200JSONResponse{Processes: make([]gen.Process, 0, len(res.GetProcesses()))}
	for _, p := range res.GetProcesses() {
		args := p.GetConfig().GetArgs()
		if args == nil {
			args = []string{}
		}
		out.Processes = append(out.Processes, gen.Process{Pid: int32(p.GetPid()), Cmd: p.GetConfig().GetCmd(), Args: args, Cwd: p.GetConfig().Cwd, Tag: p.Tag})
	}
	return out, nil
}

// processCall makes one short call of the guest's process service.
func processCall[T any](ctx context.Context, s *Server, id string, call func(context.Context, processconnect.ProcessClient) (*connect.Response[T], error)) (*T, error) {
	return held(ctx, s, id, func(g guest) (*T, error) {
		ctx, cancel := context.WithTimeout(ctx, unaryLimit)
		defer cancel()
		res, err := call(ctx, s.Agents.Process(g.target, g.id))
		if err != nil {
			return nil, guestError(err)
		}
		return res.Msg, nil
	})
}

// SignalProcess implements gen.StrictServerInterface.
func (s *Server) SignalProcess(ctx context.Context, req gen.SignalProcessRequestObject) (gen.SignalProcessResponseObject, error) {
	n, err := parseSignal(req.Body.Signal)
	if err != nil {
		return nil, err
	}
	_, err = processCall(ctx, s, req.ID, func(ctx context.Context, c processconnect.ProcessClient) (*connect.Response[process.SendSignalResponse], error) {
		return c.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: byPID(uint32(req.Pid)), Signal: process.Signal(n)}))
	})
	if err != nil {
		return nil, err
	}
	return gen.SignalProcess204Response{}, nil
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

// pathPID reads the pid of a route that is not generated; it was checked against the contract.
func pathPID(r *http.Request) (uint32, error) {
	n, err := strconv.ParseUint(r.PathValue("pid"), 10, 32)
	if err != nil {
		return 0, invalid("pid", "must be a process id")
	}
	return uint32(n), nil
}
