package process

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// Bounds of Keepalive-Ping-Interval, in seconds.
const (
	defaultKeepalive = 90
	maxKeepalive     = 3600
)

// maxProcesses bounds the processes that the table holds at one time.
const maxProcesses = 4096

// Service implements processconnect.ProcessHandler.
type Service struct {
	users    account.Database
	settings *settings.Store
	cgroups  *cgroup.Tree // may be nil
	log      *slog.Logger

	mu    sync.Mutex
	procs map[int]*Proc
	seq   uint64
}

// NewService makes a service with an empty table.
func NewService(users account.Database, set *settings.Store, groups *cgroup.Tree, log *slog.Logger) *Service {
	return &Service{users: users, settings: set, cgroups: groups, log: log, procs: map[int]*Proc{}}
}

// List tells what runs, by pid.
func (s *Service) List(context.Context, *connect.Request[processpb.ListRequest]) (*connect.Response[processpb.ListResponse], error) {
	s.mu.Lock()
	res := &processpb.ListResponse{}
	for _, p := range s.procs {
		res.Processes = append(res.Processes, p.info())
	}
	s.mu.Unlock()
	slices.SortFunc(res.Processes, func(a, b *processpb.ProcessInfo) int { return cmp.Compare(a.Pid, b.Pid) })
	return connect.NewResponse(res), nil
}

// Start runs a process and streams its events until `end`.
func (s *Service) Start(ctx context.Context, req *connect.Request[processpb.StartRequest], stream *connect.ServerStream[processpb.StartResponse]) error {
	interval, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	p, r, err := s.start(ctx, req.Header(), req.Msg)
	if err != nil {
		return err
	}
	return follow(ctx, p, r, true, interval, func(ev *processpb.ProcessEvent) error {
		return stream.Send(&processpb.StartResponse{Event: ev})
	})
}

// Connect attaches to a running process.
func (s *Service) Connect(ctx context.Context, req *connect.Request[processpb.ConnectRequest], stream *connect.ServerStream[processpb.ConnectResponse]) error {
	interval, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	return follow(ctx, p, p.out.attach(), false, interval, func(ev *processpb.ProcessEvent) error {
		return stream.Send(&processpb.ConnectResponse{Event: ev})
	})
}

// start makes the process and attaches its first reader before it can print anything.
func (s *Service) start(ctx context.Context, header http.Header, msg *processpb.StartRequest) (*Proc, *reader, error) {
	set := s.settings.Get()
	name, err := account.FromHeader(header.Get("Authorization"))
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	user, err := s.users.Lookup(cmp.Or(name, set.User))
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	c, err := resolve(msg.GetProcess(), user, set, msg.Pty != nil)
	if err != nil {
		return nil, nil, err
	}
	if err := s.room(); err != nil {
		return nil, nil, err
	}
	var io *stdio
	if msg.Pty != nil {
		io, err = openTerminal(msg.Pty.GetSize(), user.UID)
	} else {
		io, err = openPipes(msg.Stdin == nil || msg.GetStdin())
	}
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("no pipes or terminals are left in the sandbox: %w", bare(err)))
	}
	child, group, err := spawn(c, io, s.cgroups)
	io.closeChild()
	if err != nil {
		io.closeOurs()
		return nil, nil, err
	}
	p, r := s.adopt(msg, child, group, io)
	if deadline, ok := ctx.Deadline(); ok {
		p.setLimit(time.Until(deadline))
	}
	return p, r, nil
}

// adopt enters a started process into the table and lets its output flow.
func (s *Service) adopt(msg *processpb.StartRequest, child *os.Process, group *cgroup.Group, io *stdio) (*Proc, *reader) {
	p := &Proc{
		config: msg.GetProcess(), tag: msg.Tag, pid: child.Pid, os: child, group: group,
		out: newFanout(), tty: io.tty, in: newInput(io.in, true),
	}
	if io.tty != nil {
		p.in = newInput(io.tty, false)
	}
	r := p.out.attach()
	s.mu.Lock()
	s.seq++
	p.seq = s.seq
	s.procs[p.pid] = p
	s.mu.Unlock()
	var pumps []*pump
	for _, src := range io.out {
		pumps = append(pumps, startPump(src.file, src.wrap, p.out))
	}
	go func() {
		p.wait(pumps, func() {
			s.mu.Lock()
			if s.procs[p.pid] == p {
				delete(s.procs, p.pid)
			}
			s.mu.Unlock()
		})
		for _, src := range io.out {
			src.file.Close()
		}
	}()
	return p, r
}

func (s *Service) room() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.procs) >= maxProcesses {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d processes run already; end some first", len(s.procs)))
	}
	return nil
}

// find gives the running process that sel names; of several with one tag the newest.
func (s *Service) find(sel *processpb.ProcessSelector) (*Proc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch v := sel.GetSelector().(type) {
	case *processpb.ProcessSelector_Pid:
		if p, ok := s.procs[int(v.Pid)]; ok {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", v.Pid))
	case *processpb.ProcessSelector_Tag:
		var found *Proc
		for _, p := range s.procs {
			if p.tag != nil && *p.tag == v.Tag && (found == nil || p.seq > found.seq) {
				found = p
			}
		}
		if found != nil {
			return found, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag %q not found", v.Tag))
	default:
		return nil, invalid("process names neither a pid nor a tag")
	}
}

// Update resizes a terminal.
func (s *Service) Update(_ context.Context, req *connect.Request[processpb.UpdateRequest]) (*connect.Response[processpb.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := req.Msg.GetPty().GetSize(); size != nil {
		if p.tty == nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no terminal to resize"))
		}
		if err := resize(p.tty, size); err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the terminal is closed"))
		}
	}
	return connect.NewResponse(&processpb.UpdateResponse{}), nil
}

// SendSignal sends any Linux signal.
func (s *Service) SendSignal(_ context.Context, req *connect.Request[processpb.SendSignalRequest]) (*connect.Response[processpb.SendSignalResponse], error) {
	n := req.Msg.GetSignal()
	if n < 1 || n > 64 {
		return nil, invalid("signal %d does not exist; signals are 1 to 64", n)
	}
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.signal(unix.Signal(n)); err != nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process %d has ended", p.pid))
	}
	return connect.NewResponse(&processpb.SendSignalResponse{}), nil
}

// keepalive reads Keepalive-Ping-Interval.
func keepalive(h http.Header) (time.Duration, error) {
	raw := h.Get("Keepalive-Ping-Interval")
	if raw == "" {
		return defaultKeepalive * time.Second, nil
	}
	n, err := strconv.Atoi(raw)
	if err != nil || n < 1 || n > maxKeepalive {
		return 0, invalid("Keepalive-Ping-Interval %q: a whole number of seconds from 1 to %d is needed", raw, maxKeepalive)
	}
	return time.Duration(n) * time.Second, nil
}
