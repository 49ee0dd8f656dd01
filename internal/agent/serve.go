package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

// host is the opened host: storage, network, driver and the sandboxes on them.
type host struct {
	cfg       Config
	store     *storage.Store
	net       *network.Pool
	sandboxes *Sandboxes
	unlock    func()
	end       context.CancelFunc
}

// openHost makes the host ready and takes over what runs on it.
func openHost(ctx context.Context, cfg Config, log *slog.Logger) (*host, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("wrenn-agent must run as root: it makes network namespaces, mounts and cgroups")
	}
	store, err := storage.Open(ctx, storage.Options{Dir: cfg.Sandboxes, Mode: cfg.Storage, VolumeSize: cfg.VolumeSize, Log: log})
	if err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(cfg.Sandboxes, ".lock"))
	if err != nil {
		return nil, err
	}
	driver, err := chooseDriver(ctx, cfg, log)
	if err != nil {
		unlock()
		return nil, err
	}
	pool, err := network.Open(ctx, network.Options{
		Name: cfg.Instance, Slots: cfg.Slots, Warm: cfg.WarmSlots, Egress: cfg.Egress, BaseUID: cfg.BaseUID, Log: log,
	})
	if err != nil {
		unlock()
		return nil, err
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	s := &Sandboxes{
		life:   life,
		driver: driver, store: store, net: pool, images: &images{dir: cfg.Images, store: store, log: log},
		kernel: cfg.Kernel, initrd: cfg.Initrd, egress: cfg.Egress, dir: cfg.Sandboxes, snapshots: cfg.Snapshots, log: log,
		templates: templates{pending: map[string]*preparation{}}, warm: newWarmPool(cfg.WarmVMs),
		byID: map[string]*sandbox{}, changed: make(chan struct{}, 1),
	}
	h := &host{cfg: cfg, store: store, net: pool, sandboxes: s, unlock: unlock, end: end}
	if err := s.adopt(ctx, cfg); err != nil {
		h.Close()
		return nil, err
	}
	s.watchers.Go(func() { s.keepWarm(life) })
	return h, nil
}

// Close leaves VMs and their networks as they are.
func (h *host) Close() {
	h.end()
	h.sandboxes.watchers.Wait()
	h.net.Close()
	h.unlock()
}

// serve runs the agent of a registered host until ctx ends; its VMs go on.
func serve(ctx context.Context, cfg Config, address string, log *slog.Logger) error {
	id, err := loadIdentity(cfg.TokenFile)
	if err != nil {
		return err
	}
	h, err := openHost(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer h.Close()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("cannot listen on AGENT_LISTEN_ADDR: %w", err)
	}
	server := &http.Server{
		Handler: h.sandboxes.handler(), TLSConfig: rpc.ServerTLS(id.certificate, id.CA),
		ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	server.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 1000, MaxReceiveBufferPerConnection: 8 << 20, MaxReceiveBufferPerStream: 2 << 20}
	failed := make(chan error, 1)
	go func() { failed <- server.ServeTLS(listener, "", "") }()
	log.Info("agent is ready", "host", id.HostID, "listen", listener.Addr().String(), "instance", cfg.Instance)
	line := &reporting{cp: newControlPlane(cfg.ControlPlane), id: id, address: address, every: time.Duration(cfg.HeartbeatSecs) * time.Second, limit: cfg.Slots}
	go h.sandboxes.heartbeats(ctx, line)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("agent stops; its virtual machines go on")
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		return server.Close() // streams that do not end by themselves
	}
	return nil
}

// lock makes sure that one agent works on a directory.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another wrenn-agent works on %s", filepath.Dir(path))
	}
	return func() { f.Close() }, nil
}
