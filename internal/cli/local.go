package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
)

// stackHome is WRENN_HOME, else .wrenn of this directory or the nearest one above it that has a
// stack, else .wrenn here.
func (a *app) stackHome() (string, error) {
	if home := a.getenv("WRENN_HOME"); home != "" {
		return filepath.Abs(home)
	}
	here, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := here; ; dir = filepath.Dir(dir) {
		home := filepath.Join(dir, ".wrenn")
		if _, err := os.Stat(filepath.Join(home, "stack.json")); err == nil {
			return home, nil
		}
		if dir == filepath.Dir(dir) {
			return filepath.Join(here, ".wrenn"), nil
		}
	}
}

func (a *app) openStack(want localstack.Config) (*localstack.Stack, error) {
	home, err := a.stackHome()
	if err != nil {
		return nil, err
	}
	if want.Bin, err = a.programs(); err != nil {
		return nil, err
	}
	return localstack.Open(home, want, newSteps(a.stdio.Err))
}

// programs is where wrenn-cp and wrenn-agent are: WRENN_BIN, else beside this program.
func (a *app) programs() (string, error) {
	if dir := a.getenv("WRENN_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", err
	}
	return filepath.Dir(self), nil
}

func (a *app) upCommand() *cobra.Command {
	var want localstack.Config
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start Wrenn on this machine, or mend what does not run",
		Long: `Starts PostgreSQL, Redis, wrenn-cp and wrenn-agent on this machine in the background, makes an admin
and an API key, registers this machine as a host, and waits until sandboxes can be created. All its state is in
.wrenn (WRENN_HOME), .wrenn/env holds what a shell needs. What runs already is left alone, so that it can be
repeated at any time; running sandboxes go on.

Environment: WRENN_PORT, WRENN_AGENT_PORT, AGENT_EGRESS, AGENT_KERNEL_PATH, AGENT_IMAGES_PATH and
AGENT_VOLUME_SIZE do the same as the flags. What is set once is remembered.`,
		Example: `  wrenn up
  WRENN_PORT=8010 wrenn up
  wrenn up --egress none        # sandboxes without internet`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.stackFromEnv(&want); err != nil {
				return err
			}
			return a.up(cmd, want)
		},
	}
	f := cmd.Flags()
	f.IntVar(&want.Port, "port", 0, "`PORT` of the REST API on 127.0.0.1 (8000)")
	f.IntVar(&want.AgentPort, "agent-port", 0, "`PORT` of the agent on 127.0.0.1 (50051)")
	f.StringVar(&want.Egress, "egress", "", "what sandboxes reach: internet or none (internet)")
	f.StringVar(&want.Kernel, "kernel", "", "guest kernel `FILE` (.wrenn/kernels/vmlinuz)")
	f.StringVar(&want.Images, "images", "", "`DIR` of guest images (.wrenn/images)")
	f.StringVar(&want.VolumeSize, "volume-size", "", "most disk `SIZE` for sandboxes, such as 50G, where the file system has no reflinks")
	return cmd
}

// stackFromEnv fills what no flag said.
func (a *app) stackFromEnv(want *localstack.Config) error {
	for name, to := range map[string]*int{"WRENN_PORT": &want.Port, "WRENN_AGENT_PORT": &want.AgentPort} {
		if v := a.getenv(name); v != "" && *to == 0 {
			n, err := strconv.Atoi(v)
			if err != nil {
				return usagef("%s is %q; it must be a port number", name, v)
			}
			*to = n
		}
		if *to < 0 || *to > 65535 {
			return usagef("%d is no port: it must be from 1 to 65535", *to)
		}
	}
	texts := map[string]*string{"AGENT_EGRESS": &want.Egress, "AGENT_KERNEL_PATH": &want.Kernel,
		"AGENT_IMAGES_PATH": &want.Images, "AGENT_VOLUME_SIZE": &want.VolumeSize}
	for name, to := range texts {
		if *to == "" {
			*to = a.getenv(name)
		}
	}
	if want.Egress != "" && want.Egress != "internet" && want.Egress != "none" {
		return usagef("egress is %q; it must be internet or none", want.Egress)
	}
	for _, path := range []*string{&want.Kernel, &want.Images} {
		if *path != "" {
			abs, err := filepath.Abs(*path)
			if err != nil {
				return err
			}
			*path = abs
		}
	}
	return nil
}

func (a *app) up(cmd *cobra.Command, want localstack.Config) error {
	began := time.Now()
	s, err := a.openStack(want)
	if err != nil {
		return err
	}
	a.note("Starting Wrenn in %s", s.Home)
	if err := s.Up(cmd.Context()); err != nil {
		return err
	}
	out := map[string]any{"url": s.URL(), "env": s.EnvFile(), "seconds": time.Since(began).Seconds()}
	return a.print(out, func(io.Writer) {
		a.note("Wrenn is up at %s (%.1fs). API reference: %s/docs\n\n  . %s            # in a shell: address and key\n  wrenn sandbox create base   # a machine of your own\n",
			s.URL(), time.Since(began).Seconds(), s.URL(), relative(s.EnvFile()))
	})
}

// relative is path as seen from here, if that is shorter.
func relative(path string) string {
	here, err := os.Getwd()
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(here, path); err == nil && len(rel) < len(path) {
		return rel
	}
	return path
}

func (a *app) downCommand() *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Stop Wrenn on this machine; all data stays", Args: noArgs,
		Long: "Powers the sandboxes off cleanly and stops every program that `wrenn up` started. Disks, accounts and settings stay; `wrenn up` goes on with them.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.openStack(localstack.Config{})
			if err != nil {
				return err
			}
			if !s.Exists() {
				a.note("There is nothing to stop: no stack in %s", s.Home)
				return nil
			}
			return s.Down(cmd.Context())
		},
	}
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what runs of Wrenn on this machine", Args: noArgs,
		Long: "Shows every program, whether it is healthy, and where its log is. The exit code is 1 unless all are healthy.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.openStack(localstack.Config{})
			if err != nil {
				return err
			}
			if !s.Exists() {
				return fmt.Errorf("there is no stack in %s: `wrenn up` makes one", s.Home)
			}
			parts := s.Status(cmd.Context())
			err = a.print(parts, func(w io.Writer) { printParts(w, parts) })
			for _, p := range parts {
				if err == nil && !p.Healthy {
					err = &exitError{code: exitFailure}
				}
			}
			return err
		},
	}
}

func printParts(w io.Writer, parts []localstack.Part) {
	rows := make([][]string, len(parts))
	for i, p := range parts {
		state, pid, memory := "stopped", "", ""
		if p.Running {
			state, pid, memory = "unhealthy", strconv.Itoa(p.PID), fmt.Sprintf("%d MB", p.MemoryMB)
		}
		if p.Healthy {
			state = "healthy"
		}
		rows[i] = []string{p.Name, state, pid, memory, p.Address, relative(p.Log), p.Note}
	}
	table(w, []string{"PROGRAM", "STATE", "PID", "MEMORY", "ADDRESS", "LOG", ""}, rows)
}

func (a *app) resetCommand() *cobra.Command {
	var yes, keepImages bool
	cmd := &cobra.Command{
		Use: "reset", Short: "Stop Wrenn on this machine and remove all its data", Args: noArgs,
		Long: "Stops everything and deletes every sandbox, account, database, network and mount of this stack, and its guest images. There is no way back.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.openStack(localstack.Config{})
			if err != nil {
				return err
			}
			if !yes {
				if err := a.confirm(fmt.Sprintf("This deletes every sandbox and all data in %s.", s.Home)); err != nil {
					return err
				}
			}
			return s.Reset(cmd.Context(), keepImages)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().BoolVar(&keepImages, "keep-images", false, "keep guest kernel and images, which take minutes to make")
	return cmd
}

// confirm asks on a terminal; elsewhere nobody can answer, so it refuses.
func (a *app) confirm(what string) error {
	if _, ok := terminal(a.stdio.In); !ok {
		return usagef("%s Say --yes if you mean it", what)
	}
	fmt.Fprintf(a.stdio.Err, "%s Type yes to go on: ", what)
	line, _ := bufio.NewReader(a.stdio.In).ReadString('\n')
	if strings.TrimSpace(line) != "yes" {
		return errors.New("nothing was deleted")
	}
	return nil
}

// devCommand is for those who work on Wrenn itself; make dev and make dev-agent use it.
func (a *app) devCommand() *cobra.Command {
	cmd := group("dev", "Run a part of Wrenn in this terminal, for its developers")
	cmd.Hidden = true
	part := func(use, short string, run func(*localstack.Stack, *cobra.Command) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			var want localstack.Config
			if err := a.stackFromEnv(&want); err != nil {
				return err
			}
			s, err := a.openStack(want)
			if err != nil {
				return err
			}
			return run(s, cmd)
		}}
	}
	cmd.AddCommand(
		part("control-plane", "Run wrenn-cp, with PostgreSQL and Redis in the background", func(s *localstack.Stack, cmd *cobra.Command) error {
			return s.RunControlPlane(cmd.Context(), a.stdio.Err)
		}),
		part("agent", "Register this machine and run wrenn-agent", func(s *localstack.Stack, cmd *cobra.Command) error {
			return s.RunAgent(cmd.Context(), a.stdio.Err)
		}))
	return cmd
}
