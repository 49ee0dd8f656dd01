package planetest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-sandbox/wrenn/internal/envd"
	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1/agentv1connect"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Host is a registered host with an agent. Its sandboxes are entries of a table; behind each is the same guest
// agent, the real one, which runs commands on this machine as whoever runs the test.
type Host struct {
	ID      string
	Token   string
	Address string
	Home    string // of the guest's user

	agentv1connect.UnimplementedAgentServiceHandler // what the control plane does not call yet

	plane *Plane
	tls   *tls.Config
	cert  *tls.Certificate
	guest http.Handler

	mu       sync.Mutex
	server   *http.Server
	boxes    map[string]*agentv1.Sandbox
	revision uint64
	creates  int
	deletes  int
	onCreate func(context.Context, *agentv1.CreateSandboxRequest) error
	onDelete func(context.Context, string) error
	onPause  func(string) error
	moments  moments
}

// AddHost makes a regular host as the admin, registers it and sends its first heartbeat.
func (p *Plane) AddHost() *Host {
	p.t.Helper()
	return p.AddHostAs(p.Admin, map[string]any{"type": "regular"})
}

// AddHostAs makes a host as somebody.
func (p *Plane) AddHostAs(u User, body map[string]any) *Host {
	p.t.Helper()
	var made struct {
		Host  struct{ ID string }
		Token string `json:"registration_token"`
	}
	u.Do("POST", "/v1/hosts", body).Want(p.t, http.StatusCreated, &made)
	h := p.register(made.Token)
	h.Heartbeat(nil)
	return h
}

func (p *Plane) register(token string) *Host {
	t := p.t
	t.Helper()
	key, csr, err := rpc.NewHostRequest()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{plane: p, Address: ln.Addr().String(), boxes: map[string]*agentv1.Sandbox{}}
	var reg struct {
		Host   struct{ ID string }
		Token  string
		Cert   string `json:"cert_pem"`
		CACert string `json:"ca_cert_pem"`
	}
	p.Do("POST", "/v1/hosts/register", map[string]any{
		"token": token, "arch": "amd64", "cpu_cores": 8, "memory_mb": 16384, "disk_gb": 100, "address": h.Address, "csr_pem": string(csr),
	}).Want(t, http.StatusCreated, &reg)
	h.ID, h.Token = reg.Host.ID, reg.Token
	cert, err := tls.X509KeyPair([]byte(reg.Cert), key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(reg.CACert)) {
		t.Fatal("registration gave no CA certificate")
	}
	h.cert = &cert
	h.tls = rpc.ServerTLS(h.Certificate, pool)
	h.guest, h.Home = newGuest(t)
	h.serve(ln)
	t.Cleanup(h.Stop)
	return h
}

func newGuest(t testing.TB) (http.Handler, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "planetest-") // not t.TempDir, which other users may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	home := filepath.Join(dir, "home")
	db := account.Database{Passwd: filepath.Join(dir, "passwd"), Group: filepath.Join(dir, "group")}
	for path, text := range map[string]string{
		db.Passwd: fmt.Sprintf("user:x:%d:%d::%s:/bin/bash\n", os.Getuid(), os.Getgid(), home),
		db.Group:  fmt.Sprintf("user:x:%d:\n", os.Getgid()),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	set, err := settings.Open("")
	if err != nil {
		t.Fatal(err)
	}
	return envd.New(envd.Config{Settings: set, Users: db, Log: slog.New(slog.DiscardHandler)}), home
}

func (h *Host) serve(ln net.Listener) {
	mux := http.NewServeMux()
	mux.Handle(agentv1connect.NewAgentServiceHandler(h, connect.WithInterceptors(rpc.ServerErrors())))
	mux.HandleFunc("/sandboxes/{id}/envd/", h.toGuest)
	srv := &http.Server{Handler: mux, TLSConfig: h.tls, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	h.mu.Lock()
	h.server = srv
	h.mu.Unlock()
	go func() { _ = srv.ServeTLS(ln, "", "") }()
}

// Certificate is the one that the agent shows.
func (h *Host) Certificate() *tls.Certificate {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cert
}

// Show has the agent show another certificate on new connections.
func (h *Host) Show(cert tls.Certificate) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cert = &cert
}

// Move has the agent listen elsewhere, and there only.
func (h *Host) Move() {
	h.plane.t.Helper()
	h.Stop()
	ln, err := listen("127.0.0.1:0")
	if err != nil {
		h.plane.t.Fatal(err)
	}
	h.Address = ln.Addr().String()
	h.serve(ln)
}

// Stop ends the agent, as kill -9 would: its sandboxes stay.
func (h *Host) Stop() {
	h.mu.Lock()
	srv := h.server
	h.mu.Unlock()
	_ = srv.Close()
}

// Restart starts the agent again at its address.
func (h *Host) Restart() {
	h.plane.t.Helper()
	var ln net.Listener
	Eventually(h.plane.t, "the agent's port is free", func() bool {
		var err error
		ln, err = listen(h.Address)
		return err == nil
	})
	h.serve(ln)
}

// Templates that a host reports unless told otherwise.
func Templates() []map[string]any {
	return []map[string]any{
		{"name": "minimal", "sha256": strings.Repeat("a", 64), "disk_mb": 1024, "default_user": "user"},
		{"name": "base", "sha256": strings.Repeat("b", 64), "disk_mb": 2048, "default_user": "user"},
	}
}

// Heartbeat sends one, with what extra says beside the usual.
func (h *Host) Heartbeat(extra map[string]any) Answer {
	h.plane.t.Helper()
	h.mu.Lock()
	body := map[string]any{
		"free_memory_mb": 16000, "free_disk_mb": 90000, "load1": 0.5, "templates": Templates(), "state_revision": h.revision, "running": len(h.boxes),
		"versions": map[string]string{"agent": "test", "vmm": "1"}, "driver": "qemu", "acceleration": "tcg", "cpu_model": "test",
	}
	h.mu.Unlock()
	for k, v := range extra {
		body[k] = v
	}
	return h.plane.Do("POST", "/v1/hosts/"+h.ID+"/heartbeat", body, http.Header{"X-Host-Token": {h.Token}})
}

// OnCreate is called before a sandbox is made; its error is the answer.
func (h *Host) OnCreate(fn func(context.Context, *agentv1.CreateSandboxRequest) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onCreate = fn
}

// OnDelete is called before a sandbox is removed; its error is the answer.
func (h *Host) OnDelete(fn func(context.Context, string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onDelete = fn
}

// OnPause is called before a sandbox is paused; its error is the answer.
func (h *Host) OnPause(fn func(id string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onPause = fn
}

// Counts are how often sandboxes were asked to be made and removed.
func (h *Host) Counts() (creates, deletes int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.creates, h.deletes
}

// Has tells whether the host has the sandbox.
func (h *Host) Has(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.boxes[id] != nil
}

// Idle has the host say from now on that nothing was used for a day.
func (h *Host) Idle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, sb := range h.boxes {
		sb.LastActiveAt = timestamppb.New(time.Now().Add(-24 * time.Hour))
	}
}

// State is the state that the host has the sandbox in.
func (h *Host) State(id string) agentv1.SandboxState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.boxes[id].GetState()
}

// Len is how many sandboxes the host has.
func (h *Host) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.boxes)
}

// Set puts a sandbox into the host's table behind the control plane's back; nil takes it out.
func (h *Host) Set(id string, sb *agentv1.Sandbox) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.revision++
	if sb == nil {
		delete(h.boxes, id)
		return
	}
	h.boxes[id] = sb
}

// CreateSandbox implements agentv1connect.AgentServiceHandler; it is idempotent by id.
func (h *Host) CreateSandbox(ctx context.Context, req *connect.Request[agentv1.CreateSandboxRequest]) (*connect.Response[agentv1.CreateSandboxResponse], error) {
	h.mu.Lock()
	h.creates++
	hook := h.onCreate
	h.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, req.Msg); err != nil {
			return nil, err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	sb := h.boxes[req.Msg.Id]
	if sb == nil {
		h.revision++
		now := timestamppb.New(time.Now())
		sb = &agentv1.Sandbox{
			Id: req.Msg.Id, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 2, OperationId: req.Msg.OperationId, Template: req.Msg.Template,
			Vcpus: req.Msg.Vcpus, MemoryMb: req.Msg.MemoryMb, DiskMb: req.Msg.DiskMb, CreatedAt: now, StartedAt: now, LastActiveAt: now,
		}
		h.boxes[sb.Id] = sb
	}
	return connect.NewResponse(&agentv1.CreateSandboxResponse{Sandbox: proto.CloneOf(sb)}), nil
}

// DeleteSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) DeleteSandbox(ctx context.Context, req *connect.Request[agentv1.DeleteSandboxRequest]) (*connect.Response[agentv1.DeleteSandboxResponse], error) {
	h.mu.Lock()
	h.deletes++
	hook := h.onDelete
	h.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, req.Msg.Id); err != nil {
			return nil, err
		}
	}
	h.Set(req.Msg.Id, nil)
	h.mu.Lock()
	delete(h.moments.checkpoints, req.Msg.Id)
	h.mu.Unlock()
	return connect.NewResponse(&agentv1.DeleteSandboxResponse{}), nil
}

// PauseSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) PauseSandbox(_ context.Context, req *connect.Request[agentv1.PauseSandboxRequest]) (*connect.Response[agentv1.PauseSandboxResponse], error) {
	h.mu.Lock()
	hook, busy := h.onPause, req.Msg.IdleSec > 0 && h.boxes[req.Msg.Id].GetActive()
	h.mu.Unlock()
	if hook != nil {
		if err := hook(req.Msg.Id); err != nil {
			return nil, err
		}
	}
	if busy {
		return nil, wrenn.Errorf(wrenn.KindConflict, "the sandbox is in use")
	}
	sb, err := h.change(req.Msg.Id, req.Msg.OperationId, agentv1.SandboxState_SANDBOX_STATE_PAUSED, func(sb *agentv1.Sandbox) {
		sb.HasMemory = !req.Msg.DiskOnly
		if sb.HasMemory {
			sb.Needs = HostNeeds()
		}
		if req.Msg.Durable {
			sb.DurableAt = timestamppb.New(time.Now())
		}
	})
	return connect.NewResponse(&agentv1.PauseSandboxResponse{Sandbox: sb}), err
}

// ResumeSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) ResumeSandbox(_ context.Context, req *connect.Request[agentv1.ResumeSandboxRequest]) (*connect.Response[agentv1.ResumeSandboxResponse], error) {
	if err := call(h, func(m *moments) func(string) error { return m.onResume }, req.Msg.Id); err != nil {
		return nil, err
	}
	sb, err := h.change(req.Msg.Id, req.Msg.OperationId, agentv1.SandboxState_SANDBOX_STATE_RUNNING, func(sb *agentv1.Sandbox) {
		h.moments.resumes++
		sb.HasMemory, sb.Needs, sb.DurableAt = false, nil, nil
	})
	return connect.NewResponse(&agentv1.ResumeSandboxResponse{Sandbox: sb}), err
}

// PingSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) PingSandbox(_ context.Context, req *connect.Request[agentv1.PingSandboxRequest]) (*connect.Response[agentv1.PingSandboxResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sb := h.boxes[req.Msg.Id]
	if sb == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	}
	sb.Active = true
	return connect.NewResponse(&agentv1.PingSandboxResponse{}), nil
}

// change is idempotent by operation id.
func (h *Host) change(id, op string, to agentv1.SandboxState, also func(*agentv1.Sandbox)) (*agentv1.Sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sb := h.boxes[id]
	if sb == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	}
	switch {
	case sb.State != to:
		h.revision++
		sb.State, sb.OperationId = to, op
		sb.Revision++
		also(sb)
	case sb.OperationId != op:
		return nil, wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s already", to)
	}
	return proto.CloneOf(sb), nil
}

// GetSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) GetSandbox(_ context.Context, req *connect.Request[agentv1.GetSandboxRequest]) (*connect.Response[agentv1.GetSandboxResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sb := h.boxes[req.Msg.Id]
	if sb == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	}
	return connect.NewResponse(&agentv1.GetSandboxResponse{Sandbox: proto.CloneOf(sb)}), nil
}

// ListSandboxes implements agentv1connect.AgentServiceHandler.
func (h *Host) ListSandboxes(context.Context, *connect.Request[agentv1.ListSandboxesRequest]) (*connect.Response[agentv1.ListSandboxesResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	res := &agentv1.ListSandboxesResponse{StateRevision: h.revision}
	for _, sb := range h.boxes {
		res.Sandboxes = append(res.Sandboxes, proto.CloneOf(sb))
	}
	return connect.NewResponse(res), nil
}

func (h *Host) toGuest(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	_ = call(h, func(m *moments) func(string) error { return m.onGuest }, id)
	var err *wrenn.Error
	switch state := h.State(id); {
	case !h.Has(id):
		err = wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	case state == agentv1.SandboxState_SANDBOX_STATE_PAUSED:
		err = wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is paused, not running")
	}
	if err != nil {
		if ew := connect.NewErrorWriter(); ew.IsSupported(r) {
			_ = ew.Write(w, r, rpc.ToConnect(err))
			return
		}
		w.Header().Set(rpc.KindHeader, string(err.Kind))
		w.WriteHeader(rpc.HTTPStatus(err.Kind))
		return
	}
	http.StripPrefix("/sandboxes/"+id+"/envd", h.guest).ServeHTTP(w, r)
}
