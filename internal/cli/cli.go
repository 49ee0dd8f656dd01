// Package cli is the `wrenn` command: one file per group of commands. It speaks to a control plane
// through sdk/go only, and to the stack of this machine through internal/localstack only (up, down,
// status, reset); it must not import the control plane, the agent or their databases.
//
// What is asked for goes to standard output, as a table or with -o json as JSON; progress, notes and
// errors go to standard error.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn-sandbox/wrenn/internal/version"
)

// Stdio is what the program reads and writes.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// app is one run of the program.
type app struct {
	getenv func(string) string
	stdio  Stdio
	output string // -o: "table" or "json"
}

// exitError ends the program with a code. Without say there is no message: the remote command has
// said all.
type exitError struct {
	code int
	say  error
}

func (e *exitError) Error() string {
	if e.say != nil {
		return e.say.Error()
	}
	return fmt.Sprintf("exit status %d", e.code)
}

func (e *exitError) Unwrap() error { return e.say }

// Exit codes of our own failures. Those of exec and shell are apart from what commands usually
// return, as docker and timeout(1) have it.
const (
	exitFailure  = 1
	exitUsage    = 2
	exitTimedOut = 124
	exitExec     = 125

	exitNoProgram = 127
)

// Run is the program: args without its name, the environment as getenv. It gives the exit code.
func Run(ctx context.Context, args []string, getenv func(string) string, stdio Stdio) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{getenv: getenv, stdio: stdio, output: "table"}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetIn(stdio.In)
	root.SetOut(stdio.Out)
	root.SetErr(stdio.Err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	var exit *exitError
	if errors.As(err, &exit) && exit.say == nil {
		return exit.code
	}
	a.report(cmd, err)
	if exit != nil {
		return exit.code
	}
	return exitCode(cmd, err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "wrenn",
		Short: "microVMs for people and their agents",
		Long: `wrenn gives you microVMs: real Linux machines that start in moments and run your code.

Which control plane it speaks to, and as whom, it takes from the first of
  1. WRENN_API_URL and WRENN_API_KEY in the environment
  2. the file that ` + "`wrenn login`" + ` wrote
  3. .wrenn/env of this directory or one above it, as ` + "`wrenn up`" + ` wrote it`,
		Example: `  wrenn up                                        # run Wrenn on this machine
  id=$(wrenn sandbox create base)                 # a machine of your own
  wrenn sandbox exec $id -- python3 -c 'print(6*7)'
  wrenn sandbox shell $id
  wrenn sandbox rm $id`,
		SilenceErrors: true, SilenceUsage: true, Version: version.Version,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return usagef("-o is %q; it must be table or json", a.output)
			}
			return nil
		},
	}
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "table", "`FORMAT` of the output: table or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.SetVersionTemplate("wrenn {{.Version}}\n")
	root.AddGroup(&cobra.Group{ID: "use", Title: "Use sandboxes:"}, &cobra.Group{ID: "fleet", Title: "Run a fleet:"},
		&cobra.Group{ID: "local", Title: "Run Wrenn on this machine:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("use", a.sandboxCommand(), a.snapshotCommand(), a.templateCommand(), a.eventsCommand(), a.loginCommand(), a.logoutCommand())
	add("fleet", a.hostCommand(), a.keyCommand())
	add("local", a.upCommand(), a.downCommand(), a.statusCommand(), a.resetCommand())
	root.AddCommand(a.versionCommand(), a.devCommand())
	return root
}

// group is a command that only holds others. An unknown word below it is an error, not its help.
func group(use, short string, aliases ...string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Aliases: aliases, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the versions of this program and of the control plane", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := struct {
				Client string `json:"client"`
				Server string `json:"server,omitempty"`
				URL    string `json:"url,omitempty"`
			}{Client: version.Version}
			if c, err := a.connect(); err == nil {
				if h, err := c.Ready(cmd.Context()); err == nil {
					out.Server, out.URL = h.Version, c.URL()
				}
			}
			return a.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "wrenn %s\n", out.Client)
				if out.URL != "" {
					fmt.Fprintf(w, "control plane %s at %s\n", out.Server, out.URL)
				}
			})
		},
	}
}
