// Command run runs the tests of all modules of the repository with what they need: a private
// PostgreSQL and Redis that die with it. It prints what fails as it fails, a line per package, and at
// the end which tests were skipped and why, and one closing line. Arguments are passed to `go test`.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
)

// modules are the directories with a go.mod.
var modules = []string{".", "sdk/go"} //nolint:gochecknoglobals // a constant of a type that cannot be one

func main() { os.Exit(program()) }

func program() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/run:", err)
	}
	if err != nil || !ok {
		return 1
	}
	return 0
}

func run(ctx context.Context, args []string) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "wrenn-test-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // the servers' users must pass through
		return false, err
	}
	stop, err := servers(ctx, dir)
	defer stop()
	if err != nil {
		return false, err
	}
	if len(args) == 0 {
		args = []string{"./..."}
	}
	r := newReport(os.Stdout)
	for _, module := range modules {
		if !has(module, args) {
			continue
		}
		if err := test(ctx, module, args, r); err != nil {
			return false, err
		}
	}
	return r.close(), ctx.Err()
}

// has tells whether a module has the packages that arguments name one by one.
func has(module string, args []string) bool {
	for _, arg := range args {
		if path, ok := strings.CutPrefix(arg, "./"); ok && !strings.HasSuffix(path, "...") {
			if _, err := os.Stat(filepath.Join(module, path)); err != nil {
				return false
			}
		}
	}
	return true
}

// servers starts what no variable names already.
func servers(ctx context.Context, dir string) (stop func(), err error) {
	var started []*localstack.Server
	stop = func() {
		for _, s := range started {
			_ = s.Stop(context.WithoutCancel(ctx))
		}
	}
	for _, s := range []struct {
		variable, name string
		start          func(context.Context, localstack.Options) (*localstack.Server, error)
	}{
		{"TEST_DATABASE_URL", "postgres", localstack.StartPostgres},
		{"TEST_REDIS_URL", "redis", localstack.StartRedis},
	} {
		if os.Getenv(s.variable) != "" {
			continue
		}
		srv, err := s.start(ctx, localstack.Options{Dir: filepath.Join(dir, s.name), Ephemeral: true})
		if err != nil {
			return stop, err
		}
		started = append(started, srv)
		if err := os.Setenv(s.variable, srv.URL); err != nil {
			return stop, err
		}
	}
	return stop, nil
}

// test runs `go test -json` in one module. Failing tests are in the report; an error means that no
// verdict was reached.
func test(ctx context.Context, module string, args []string, r *report) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Dir, cmd.Stderr = module, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := r.read(out); err != nil {
		return errors.Join(err, cmd.Wait())
	}
	err = cmd.Wait()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		r.exited(module, failed)
		return nil
	}
	return err
}
