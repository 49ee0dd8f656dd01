package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// asExec marks the commands whose exit code is a remote command's.
var asExec = map[string]string{"exec": "yes"} //nolint:gochecknoglobals // a constant of a type that cannot be one

type execFlags struct {
	interactive, tty, shell, detach bool
	user, cwd                       string
	env                             []string
	timeout                         time.Duration
}

func (a *app) execCommand() *cobra.Command {
	var o execFlags
	cmd := &cobra.Command{
		Use:   "exec [flags] SANDBOX -- COMMAND [ARG…]",
		Short: "Run a command in a sandbox",
		Long: `Runs a command in a sandbox, shows its output as it comes, and exits with its exit code
(128 + n if signal n ended it, 124 if it ran out of --timeout, 127 if there is no such program, 125 if wrenn itself failed).
Flags go before SANDBOX. Interrupting wrenn interrupts the command; if the connection is lost the command goes on.`,
		Example: `  wrenn sandbox exec ci -- python3 -c 'print(6*7)'
  wrenn sandbox exec -s ci 'ls *.go | wc -l'
  tar c src | wrenn sandbox exec -i ci -- tar x -C /tmp
  wrenn sandbox exec -it ci -- top
  wrenn sandbox exec -d ci -- ./server        # prints the pid`,
		Args: atLeast("a SANDBOX", "a COMMAND"), Annotations: asExec, ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := commandOf(cmd, args[1:])
			if err != nil {
				return err
			}
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.exec(cmd.Context(), sb, o, command)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows SANDBOX is the command's
	f.BoolVarP(&o.interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&o.tty, "tty", "t", false, "run it in a terminal")
	f.BoolVarP(&o.shell, "shell", "s", false, "run COMMAND by bash; ARGs are $0, $1, …")
	f.BoolVarP(&o.detach, "detach", "d", false, "leave it running and print its pid")
	o.common(cmd)
	f.DurationVar(&o.timeout, "timeout", 0, "kill it after this time, such as 30s")
	return cmd
}

// commandOf is what follows SANDBOX. Our own flags end there, so that a command's need no care; one that
// was put after it all the same is noticed.
func commandOf(cmd *cobra.Command, rest []string) ([]string, error) {
	if rest[0] != "--" && strings.HasPrefix(rest[0], "-") {
		return nil, usagef("%s must come before SANDBOX", rest[0])
	}
	if rest[0] == "--" {
		rest = rest[1:]
	}
	if len(rest) == 0 {
		return nil, usagef("%s needs a COMMAND", cmd.CommandPath())
	}
	return rest, nil
}

func (o *execFlags) common(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.user, "user", "u", "", "run as this `USER` (the sandbox's default)")
	cmd.Flags().StringVarP(&o.cwd, "workdir", "w", "", "run in this `DIR` (the user's home)")
	cmd.Flags().StringArrayVarP(&o.env, "env", "e", nil, "`NAME=VALUE`; may be repeated")
}

func (a *app) exec(ctx context.Context, sb *wrenn.Sandbox, o execFlags, command []string) error {
	var env map[string]string
	if err := pairs("--env", o.env, &env); err != nil {
		return err
	}
	plain := wrenn.ExecOptions{Cmd: command[0], Args: command[1:], Shell: o.shell, Env: env, Cwd: o.cwd, User: o.user, Timeout: o.timeout}
	switch {
	case o.detach:
		pid, err := sb.Background(ctx, plain)
		if err != nil {
			return err
		}
		return a.print(map[string]int{"pid": pid}, func(w io.Writer) { fmt.Fprintln(w, pid) })
	case a.output == "json" && !o.tty:
		return a.execJSON(ctx, sb, plain, o.interactive)
	}
	start := wrenn.StartOptions{Cmd: command[0], Args: command[1:], Shell: o.shell, Env: env, Cwd: o.cwd, User: o.user,
		Timeout: o.timeout, Stdin: strings.NewReader(""), Stdout: a.stdio.Out, Stderr: a.stdio.Err}
	if o.interactive {
		start.Stdin = a.stdio.In
	}
	if o.tty {
		return a.terminal(ctx, start, sb.Start)
	}
	return a.stream(ctx, start, sb.Start)
}

// maxStdinJSON is what one exec request takes.
const maxStdinJSON = 1 << 20

// execJSON runs the command to its end and prints the result as one document.
func (a *app) execJSON(ctx context.Context, sb *wrenn.Sandbox, o wrenn.ExecOptions, withStdin bool) error {
	if withStdin {
		raw, err := io.ReadAll(io.LimitReader(a.stdio.In, maxStdinJSON+1))
		if err != nil {
			return err
		}
		if len(raw) > maxStdinJSON {
			return usagef("with -o json standard input may have 1 MiB at most; leave -o out to stream")
		}
		o.Stdin = string(raw)
	}
	res, err := sb.ExecWith(ctx, o)
	if err != nil {
		return a.notStarted(err)
	}
	out := map[string]any{"stdout": string(res.Stdout), "stderr": string(res.Stderr), "exit_code": res.ExitCode, "duration_ms": res.Duration.Milliseconds(),
		"stdout_truncated": res.StdoutTruncated, "stderr_truncated": res.StderrTruncated, "timed_out": res.TimedOut}
	if err := a.print(out, nil); err != nil {
		return err
	}
	return remoteExit(&wrenn.Exit{Code: res.ExitCode, TimedOut: res.TimedOut})
}

// remoteExit gives the remote command's exit code to our caller.
func remoteExit(e *wrenn.Exit) error {
	switch {
	case e.TimedOut:
		return &exitError{code: exitTimedOut}
	case e.Code == 0:
		return nil
	case e.Code < 0 || e.Code > 255:
		return &exitError{code: exitFailure}
	}
	return &exitError{code: e.Code}
}

type starter func(context.Context, wrenn.StartOptions) (*wrenn.Process, error)

// stream runs a command without a terminal. Signals are passed on to it; the third one ends us.
func (a *app) stream(ctx context.Context, o wrenn.StartOptions, start starter) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	// The root context ends at the first signal; here that signal is the command's.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	p, err := start(ctx, o)
	if err != nil {
		return a.notStarted(err)
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case s := <-signals:
				if n == 2 {
					p.Close()
					return
				}
				_ = p.Signal(unix.SignalName(s.(syscall.Signal)))
			}
		}
	}()
	exit, err := p.Wait()
	if err != nil {
		return err
	}
	return remoteExit(exit)
}

// notStarted tells a program that does not exist, by the code that shells use, from other failures:
// the sandbox itself was found before.
func (a *app) notStarted(err error) error {
	if !wrenn.IsNotFound(err) {
		return err
	}
	return &exitError{code: exitNoProgram, say: err}
}

func (a *app) shellCommand() *cobra.Command {
	var o execFlags
	cmd := &cobra.Command{
		Use: "shell SANDBOX", Aliases: []string{"sh", "ssh"}, Short: "Open a shell in a sandbox",
		Example: `  wrenn sandbox shell ci
  wrenn sandbox shell -u root ci`,
		Args: exactArgs("a SANDBOX"), Annotations: asExec, ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			var env map[string]string
			if err := pairs("--env", o.env, &env); err != nil {
				return err
			}
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			start := wrenn.StartOptions{Env: env, Cwd: o.cwd, User: o.user, Stdin: a.stdio.In, Stdout: a.stdio.Out}
			return a.terminal(cmd.Context(), start, sb.Terminal)
		},
	}
	o.common(cmd)
	return cmd
}

// terminal runs a command in a remote terminal that is joined to ours: raw, with our size and TERM.
// Without a terminal on our side the input is passed on as it is.
func (a *app) terminal(ctx context.Context, o wrenn.StartOptions, start starter) error {
	in, inTerminal := terminal(a.stdio.In)
	size := func() wrenn.TTYSize { return wrenn.TTYSize{Cols: 80, Rows: 24} }
	if out, ok := terminal(a.stdio.Out); ok {
		size = func() wrenn.TTYSize {
			cols, rows, err := term.GetSize(int(out.Fd()))
			if err != nil || cols <= 0 || rows <= 0 {
				cols, rows = 80, 24
			}
			return wrenn.TTYSize{Cols: cols, Rows: rows}
		}
	}
	o.TTY = ptr(size())
	if name := a.getenv("TERM"); name != "" && o.Env["TERM"] == "" {
		o.Env = withVariable(o.Env, "TERM", name)
	}
	if !inTerminal {
		return a.stream(ctx, o, start)
	}
	old, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("the terminal cannot be set up: %w", err)
	}
	defer func() { _ = term.Restore(int(in.Fd()), old) }()
	p, err := start(ctx, o)
	if err != nil {
		return err
	}
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-resized:
				_ = p.Resize(size())
			}
		}
	}()
	exit, err := p.Wait()
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("disconnected; the command goes on with pid %d", p.PID)
	}
	if err != nil {
		return err
	}
	return remoteExit(exit)
}

func ptr[T any](v T) *T { return &v }

func withVariable(env map[string]string, name, value string) map[string]string {
	out := map[string]string{name: value}
	for k, v := range env {
		out[k] = v
	}
	return out
}

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ps SANDBOX", Short: "List the processes started through wrenn", Args: exactArgs("a SANDBOX"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			list, err := sb.Processes(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				rows := make([][]string, len(list))
				for i, p := range list {
					rows[i] = []string{fmt.Sprint(p.PID), p.Cwd, strings.Join(append([]string{p.Cmd}, p.Args...), " ")}
				}
				table(w, []string{"PID", "DIR", "COMMAND"}, rows)
			})
		},
	}
}

func (a *app) killCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "kill SANDBOX PID…", Short: "Send a signal to processes",
		Example: `  wrenn sandbox kill ci 412
  wrenn sandbox kill -s KILL ci 412`,
		Args: atLeast("a SANDBOX", "a PID"), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			sb, err := a.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var errs []error
			for _, text := range args[1:] {
				var pid int
				if n, err := fmt.Sscanf(text, "%d", &pid); n != 1 || err != nil || pid <= 0 {
					errs = append(errs, usagef("%q is no pid: `wrenn sandbox ps` shows them", text))
					continue
				}
				errs = append(errs, sb.Signal(cmd.Context(), pid, strings.ToUpper(name)))
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVarP(&name, "signal", "s", "TERM", "`SIGNAL`, by name or number")
	return cmd
}
