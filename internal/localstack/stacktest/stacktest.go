// Package stacktest gives tests the real PostgreSQL and Redis: those that TEST_DATABASE_URL and
// TEST_REDIS_URL name (as `make test` sets them), else private ones that live as long as the test
// process. Only tests import it.
package stacktest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
)

// Main runs the tests of a package with both variables set. Use it as
//
//	func TestMain(m *testing.M) { os.Exit(stacktest.Main(m)) }
func Main(m *testing.M) int {
	stop, err := start(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "stacktest:", err)
		return 1
	}
	defer stop()
	return m.Run()
}

func start(ctx context.Context) (stop func(), err error) {
	dir, err := os.MkdirTemp("", "wrenn-test-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // the servers' users must pass through
		return nil, err
	}
	var started []*localstack.Server
	stop = func() {
		for _, s := range started {
			_ = s.Stop(ctx)
		}
		_ = os.RemoveAll(dir)
	}
	servers := []struct {
		variable, name string
		start          func(context.Context, localstack.Options) (*localstack.Server, error)
	}{
		{"TEST_DATABASE_URL", "postgres", localstack.StartPostgres},
		{"TEST_REDIS_URL", "redis", localstack.StartRedis},
	}
	for _, s := range servers {
		if os.Getenv(s.variable) != "" {
			continue
		}
		srv, err := s.start(ctx, localstack.Options{Dir: filepath.Join(dir, s.name), Ephemeral: true})
		if err != nil {
			stop()
			return nil, err
		}
		started = append(started, srv)
		if err := os.Setenv(s.variable, srv.URL); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}
