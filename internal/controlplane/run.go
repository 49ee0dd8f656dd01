// Package controlplane is the control plane's process, wrenn-cp: it reads the configuration, wires store,
// Redis, fleet and API together, and starts and stops them. It decides nothing of its own.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/api"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/version"
)

// Stdio is what the process reads and writes.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

const (
	databaseWait = 60 * time.Second // for a database that starts together with us
	drainLimit   = 20 * time.Second // for requests under way when we are told to stop
	memoryReturn = time.Minute
)

// serve runs the control plane until ctx ends, and then lets requests under way finish.
func serve(ctx context.Context, cfg Config, stdio Stdio) error {
	log := slog.New(slog.NewTextHandler(stdio.Err, &slog.HandlerOptions{Level: cfg.LogLevel}))
	if err := migrate(ctx, cfg.DatabaseURL, log); err != nil {
		return err
	}
	p, err := open(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer p.close()
	if cfg.HostAgentAddr != "" {
		if err := p.fleet.EnsureFirstHost(ctx, cfg.HostAgentAddr); err != nil {
			return fmt.Errorf("CP_HOST_AGENT_ADDR: %w", err)
		}
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("CP_LISTEN_ADDR: %w", err)
	}
	return p.run(ctx, ln, cfg)
}

// plane is a wired control plane.
type plane struct {
	store *store.Store
	redis *ephemeral.Redis
	pool  *agents.Pool
	fleet *fleet.Fleet
	api   *api.Server
	log   *slog.Logger

	endStreams context.CancelFunc
}

func open(ctx context.Context, cfg Config, log *slog.Logger) (*plane, error) {
	st, err := store.Open(ctx, cfg.DatabaseURL)
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: %w", err)
	}
	rd, err := ephemeral.Open(cfg.RedisURL)
	if err != nil {
		st.Close()
		return nil, fmt.Errorf("REDIS_URL: %w", err)
	}
	p := &plane{store: st, redis: rd, log: log}
	if err := p.wire(ctx, cfg); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *plane) wire(ctx context.Context, cfg Config) error {
	ca, err := authority(ctx, p.store, cfg)
	if err != nil {
		return err
	}
	tokens, err := auth.NewTokens(cfg.JWTSecret, time.Now)
	if err != nil {
		return fmt.Errorf("JWT_SECRET: %w", err)
	}
	p.pool = agents.NewPool(ca, time.Now)
	p.fleet = fleet.New(fleet.Deps{
		Store: p.store, Redis: p.redis, Agents: p.pool, CA: ca, Tokens: tokens, Policy: cfg.Policy, Times: cfg.Times, Log: p.log, Faults: faults(),
	})
	streams, end := context.WithCancel(context.WithoutCancel(ctx))
	p.endStreams = end
	p.api, err = api.New(streams, api.Deps{
		Store: p.store, Redis: p.redis, Fleet: p.fleet, Agents: p.pool, Tokens: tokens, Passwords: auth.NewPasswords(), Secret: cfg.JWTSecret, Log: p.log,
		SignupClosed: cfg.SignupClosed, TrustedProxies: cfg.TrustedProxies,
	})
	return err
}

func (p *plane) close() {
	if p.endStreams != nil {
		p.endStreams()
	}
	if p.pool != nil {
		p.pool.Close()
	}
	_ = p.redis.Close()
	p.store.Close()
}

func authority(ctx context.Context, st *store.Store, cfg Config) (*rpc.CA, error) {
	if cfg.CAFile == "" {
		return fleet.LoadAuthority(ctx, st, cfg.EncryptionKey)
	}
	text, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("CP_CA_FILE: %w", err)
	}
	ca, err := rpc.ParseCA(text)
	if err != nil {
		return nil, fmt.Errorf("CP_CA_FILE: %w", err)
	}
	return ca, nil
}

func (p *plane) run(ctx context.Context, ln net.Listener, cfg Config) error {
	srv := p.api.HTTPServer()
	loops, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoops()
	var wg sync.WaitGroup
	wg.Go(func() { p.fleet.Run(loops) })
	wg.Go(func() { returnMemory(loops) })
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	p.log.Info("the control plane is up", "version", version.Version, "listen", ln.Addr().String(), "url", cfg.PublicURL, "docs", cfg.PublicURL+"/docs")
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
		err = p.drain(ctx, srv)
	}
	stopLoops()
	wg.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// returnMemory gives back to the system, every minute, what bursts leave behind. A password takes 19 MiB and
// start-up some tens, and a control plane that then has little to do would keep them for as long as it lives.
func returnMemory(ctx context.Context) {
	tick := time.NewTicker(memoryReturn)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			debug.FreeOSMemory()
		}
	}
}

// drain takes no more requests, ends streams (their clients connect to another replica), and waits for the rest.
func (p *plane) drain(ctx context.Context, srv *http.Server) error {
	p.log.Info("going down: finishing requests under way", "limit", drainLimit)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	p.endStreams()
	err := srv.Shutdown(ctx)
	p.fleet.Wait(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		p.log.Warn("requests were cut off; operations under way are finished by another replica or at the next start")
		return srv.Close()
	}
	return err
}

// migrate brings the schema up to date, waiting for a database that is just starting.
func migrate(ctx context.Context, url string, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, databaseWait+5*time.Minute)
	defer cancel()
	deadline := time.Now().Add(databaseWait)
	for {
		err := store.Migrate(ctx, url, log)
		if err == nil || !store.IsUnavailable(err) || time.Now().After(deadline) {
			return err
		}
		log.Warn("the database cannot be reached yet; trying again", "error", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}
