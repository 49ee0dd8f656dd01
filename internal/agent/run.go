package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/uffd"
	"github.com/wrenn-sandbox/wrenn/internal/version"
)

// Stdio is what a program reads and writes.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// Run is wrenn-agent: args without the program's name, the environment as getenv.
func Run(ctx context.Context, args []string, getenv func(string) string, stdio Stdio) error {
	if len(args) > 0 && args[0] == uffd.Command { // started by an agent, perhaps of another version, for a VM
		return uffd.Main(args[1:])
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(stdio.Err, &slog.HandlerOptions{Level: logLevel(getenv("LOG_LEVEL"))}))
	root := rootCommand(getenv, log)
	root.AddCommand(doctorCommand(getenv), stopCommand(getenv, log), resetCommand(getenv, log))
	root.SetArgs(args)
	root.SetIn(stdio.In)
	root.SetOut(stdio.Out)
	root.SetErr(stdio.Err)
	return root.ExecuteContext(ctx)
}

func logLevel(s string) slog.Level {
	var l slog.Level
	_ = l.UnmarshalText([]byte(s)) // anything unknown is info
	return l
}

func rootCommand(getenv func(string) string, log *slog.Logger) *cobra.Command {
	var token, address string
	cmd := &cobra.Command{
		Use:   "wrenn-agent",
		Short: "The host agent of Wrenn: runs sandboxes on this host",
		Long: `The host agent of Wrenn runs sandboxes, each a virtual machine, on this host.

A host's first start needs a one-time token of the control plane and the address at which the control
plane reaches this host; later starts need neither, and take another --address if it has changed. Sandboxes outlive the agent: stop, upgrade or kill
it, and the next one takes them over.

Environment:
` + describeVariables(),
		Example: `  sudo AGENT_CP_URL=http://cp-host:8000 wrenn-agent --register TOKEN --address 10.0.1.5:50051
  sudo AGENT_CP_URL=http://cp-host:8000 wrenn-agent --address 10.0.1.5:50051
  sudo wrenn-agent doctor`,
		Args: cobra.NoArgs, Version: version.Version, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(getenv)
			if err != nil {
				return err
			}
			if cfg.ControlPlane == "" {
				return errors.New("AGENT_CP_URL is not set; it must be the control plane's URL, like http://cp-host:8000")
			}
			if token != "" {
				if address == "" {
					return errors.New("--register needs --address IP:PORT, at which the control plane reaches this host")
				}
				if err := registerHost(cmd.Context(), cfg, token, address, log); err != nil {
					return err
				}
			}
			return serve(cmd.Context(), cfg, address, log)
		},
	}
	cmd.Flags().StringVar(&token, "register", "", "one-time registration `TOKEN` of this host")
	cmd.Flags().StringVar(&address, "address", "", "`IP:PORT` at which the control plane reaches this host")
	return cmd
}

func describeVariables() string {
	var b strings.Builder
	for _, v := range variables {
		fmt.Fprintf(&b, "  %-21s %s", v.name, v.meaning)
		if v.fallback != "" {
			fmt.Fprintf(&b, " (%s)", v.fallback)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// registerHost registers, unless this host already is: then it says so and goes on, so that a start
// script may always pass --register.
func registerHost(ctx context.Context, cfg Config, token, address string, log *slog.Logger) error {
	if id, err := loadIdentity(cfg.TokenFile); err == nil {
		log.Warn("this host is registered already; --register is ignored", "host", id.HostID, "file", cfg.TokenFile)
		return nil
	}
	store, err := storage.Open(ctx, storage.Options{Dir: cfg.Sandboxes, Mode: cfg.Storage, VolumeSize: cfg.VolumeSize, Log: log})
	if err != nil {
		return err
	}
	size, err := detectSpecs(store)
	if err != nil {
		return err
	}
	if err := newControlPlane(cfg.ControlPlane).register(ctx, token, address, cfg.TokenFile, size); err != nil {
		return err
	}
	log.Info("registered with the control plane", "url", cfg.ControlPlane, "token_file", cfg.TokenFile)
	return nil
}

func stopCommand(getenv func(string) string, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use:   "stop-vms",
		Short: "Pause all sandboxes of this host, as before a shutdown; the agent must not run",
		Long:  "Pauses every running sandbox with its disk and memory, durably, and ends its virtual machine. They can be resumed after the next start.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(getenv)
			if err != nil {
				return err
			}
			h, err := openHost(cmd.Context(), cfg, log)
			if err != nil {
				return err
			}
			defer h.Close()
			return errors.Join(h.sandboxes.StopVMs(cmd.Context()), network.Remove(cmd.Context(), cfg.Instance))
		},
	}
}

func resetCommand(getenv func(string) string, log *slog.Logger) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Remove every sandbox of this host and all that the agent made; the agent must not run",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				return errors.New("this deletes all sandboxes of this host for good; say --yes if you mean it")
			}
			cfg, err := loadConfig(getenv)
			if err != nil {
				return err
			}
			return resetHost(cmd.Context(), cfg, log)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	return cmd
}

// resetHost removes all that belongs to this instance, also what a damaged record hides.
func resetHost(ctx context.Context, cfg Config, log *slog.Logger) error {
	if exists(cfg.Sandboxes) {
		unlock, err := lock(filepath.Join(cfg.Sandboxes, ".lock"))
		if err != nil {
			return err
		}
		unlock()
	}
	if _, err := killOrphans(cfg, nil); err != nil {
		return err
	}
	if err := network.Remove(ctx, cfg.Instance); err != nil {
		return err
	}
	if err := storage.Unmount(cfg.Sandboxes); err != nil {
		return err
	}
	log.Info("removed all sandboxes", "path", cfg.Sandboxes, "instance", cfg.Instance)
	var errs []error
	for _, path := range []string{cfg.Sandboxes, cfg.Sandboxes + ".xfs", cfg.verdictFile(), cfg.firecrackerFile(), cfg.TokenFile, cfg.TokenFile + keySuffix, cfg.TokenFile + nextKeySuffix, cfg.TokenFile + certSuffix, cfg.TokenFile + ".ca"} {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(errs...)
}
