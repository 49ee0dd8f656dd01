// Package envd is the guest agent: it serves processes and files of its machine over HTTP to the host.
// This package wires the parts and owns what is common to all requests (access, errors, /init and the
// other small routes); processes, files, the boot of the guest are packages below. It must not know of
// the host agent's or the control plane's packages: the wire is the only thing they share.
package envd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/boot"
	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	"github.com/wrenn-sandbox/wrenn/internal/envd/routes"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
)

// Version is that of the guest contract that is served: clients switch features on by it.
const Version = "0.6.2"

// stateFile survives a restart of the agent and not one of the guest.
const stateFile = "/run/wrenn/settings.json"

// memoryReserve is kept from user processes for the agent and the kernel, in bytes.
const memoryReserve = 40 << 20

// Run is the program. As pid 1 it is the guest's init, which starts it again as the agent.
func Run(ctx context.Context, args []string, _ []string, _ io.Reader, stdout, stderr io.Writer) error {
	if os.Getpid() == 1 {
		return boot.Init(stderr)
	}
	flags := flag.NewFlagSet("envd", flag.ContinueOnError)
	flags.SetOutput(stderr)
	listen := flags.String("listen", net.JoinHostPort("0.0.0.0", strconv.Itoa(routes.Port)), "address to serve on")
	state := flags.String("state", stateFile, "file that keeps what /init set; empty: memory only")
	groups := flags.String("cgroup", cgroup.Root, "cgroup v2 file system for user processes; empty: none")
	guest := flags.Bool("guest", false, "this is the guest's own agent: it may set the clock, the host name and the like")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *showVersion {
		fmt.Fprintln(stdout, "envd", Version)
		return nil
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	set, err := settings.Open(*state)
	if err != nil {
		return err
	}
	var tree *cgroup.Tree
	if *groups != "" {
		if tree, err = cgroup.Open(*groups, memoryReserve); err != nil {
			log.Warn("user processes get no cgroups", "error", err)
		}
	}
	// Starting a process stops one scheduler of the runtime until its exec; with one CPU it would be the only
	// one, and nothing would be answered meanwhile.
	runtime.GOMAXPROCS(max(2, runtime.NumCPU()))
	debug.SetGCPercent(50) // the guest's memory belongs to its user
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", *listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	cfg := Config{Settings: set, Users: account.System(), Cgroups: tree, Log: log}
	if *guest {
		cfg.Machine = boot.Machine{}
	}
	return serve(ctx, lis, New(cfg))
}

// serve answers until ctx ends.
func serve(ctx context.Context, lis net.Listener, h http.Handler) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: h, Protocols: protocols, ReadHeaderTimeout: 30 * time.Second, MaxHeaderBytes: 64 << 10}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(patient{lis}) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		if err := srv.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}
