// Command bench measures Wrenn on this machine: the real system in a directory of its own, each figure
// beside a floor that was measured in the same run (the same VMM driven by hand, the guest asked
// directly, an empty route of the same server). It prints a table, writes JSON, and removes all that it
// started. It must not reach into the programs: what it knows of them is their API and their files.
//
//	go run ./test/bench [-only create,exec] [-json bench.json]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// runLimit bounds the whole run.
const runLimit = 15 * time.Minute

func main() {
	// The programs end with the terminal's ^C too; what they leave is removed below.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// part is one measurement.
type part struct {
	name, about string
	run         func(context.Context, *bench) error
}

// parts are all measurements, in the order they run: memory first, while the programs are fresh.
func parts() []part {
	return []part{
		{"memory", "memory of the programs and of the VMMs, with up to 20 virtual machines", measureMemory},
		{"boot", "cold boot to guest ready", measureBoot},
		{"create", "create from a prepared template to the first command's output", measureCreate},
		{"exec", "exec of `true` in a warm sandbox", measureExec},
		{"files", "upload and download of 64 MiB", measureFiles},
		{"plane", "heartbeat, get and list per second", measurePlane},
		{"pause", "pause and resume of 256, 1024 and 4096 MB", measurePause},
		{"snapshots", "fork, checkpoint and rollback", measureSnapshots},
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("only", "", "comma-separated parts to run; default: all of "+strings.Join(names(parts()), ","))
	file := flags.String("json", "bench.json", "where to write the figures; empty: nowhere")
	if err := flags.Parse(args); err != nil {
		return err
	}
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	in, err := stack.FindInputs()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	rep, err := measure(ctx, in, chosen, stderr)
	if rep == nil {
		return err
	}
	rep.print(stdout)
	if *file != "" {
		err = errors.Join(err, rep.write(*file))
	}
	return err
}

func names(all []part) []string {
	out := make([]string, len(all))
	for i, p := range all {
		out[i] = p.name
	}
	return out
}

func choose(only string) ([]part, error) {
	if only == "" {
		return parts(), nil
	}
	wanted := strings.Split(only, ",")
	for _, name := range wanted {
		if !slices.Contains(names(parts()), name) {
			return nil, fmt.Errorf("there is no part %q; there are %s", name, strings.Join(names(parts()), ", "))
		}
	}
	return slices.DeleteFunc(parts(), func(p part) bool { return !slices.Contains(wanted, p.name) }), nil
}

// measure runs the parts on a system of its own. A part that fails does not stop the others. The report
// is nil if the system did not start.
func measure(ctx context.Context, in stack.Inputs, chosen []part, progress io.Writer) (rep *report, err error) {
	dir, err := os.MkdirTemp("", "wrenn-bench-")
	if err != nil {
		return nil, err
	}
	closed := false
	defer func() {
		if closed { // else something is still mounted or running there
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	// Placement reckons with a few vCPUs per core; here 20 idle machines shall find room on any.
	if os.Getenv("CP_CPU_OVERCOMMIT") == "" {
		if err := os.Setenv("CP_CPU_OVERCOMMIT", "64"); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(progress, "%5.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	say("starting the system in %s", dir)
	s, err := stack.Start(ctx, in, dir)
	if err != nil {
		closed = true // Start closes what it could not finish
		return nil, fmt.Errorf("%w\n%s", err, s.Logs())
	}
	defer func() {
		say("removing everything")
		closeErr := s.Close()
		closed = closeErr == nil
		err = errors.Join(err, closeErr)
	}()
	b := &bench{stack: s, report: newReport(ctx, s), say: say, prepared: map[string]bool{}}
	var errs []error
	for _, p := range chosen {
		say("%s: %s (load %.1f)", p.name, p.about, load1())
		b.part, b.partBegan = p.name, time.Now()
		if err := p.run(ctx, b); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
			say("%s failed: %v", p.name, err)
			b.report.Failed = append(b.report.Failed, p.name)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) > 0 {
		fmt.Fprintln(progress, s.Logs())
	}
	b.report.LoadAfter = load1()
	b.report.Seconds = time.Since(began).Seconds()
	return b.report, errors.Join(errs...)
}
