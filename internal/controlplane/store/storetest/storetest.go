// Package storetest gives each test a PostgreSQL database and a Redis of its own kind: the servers of
// TEST_DATABASE_URL and TEST_REDIS_URL, or private ones that it starts for the test binary. Only tests
// may import it.
package storetest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Servers are the PostgreSQL and Redis of one test binary.
type Servers struct {
	mu       sync.Mutex
	dir      string
	stops    []func()
	postgres string // URL of the maintenance database
	redis    string
	template string
}

// Run is for TestMain: it runs the tests and then stops what they made it start.
func Run(m *testing.M) int {
	defer shared.stop()
	return m.Run()
}

// shared is per test binary, like the flags of package testing; servers are started when first asked for.
var shared = &Servers{}

func (s *Servers) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stop := range s.stops {
		stop()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}

func (s *Servers) tempDir() (string, error) {
	if s.dir != "" {
		return s.dir, nil
	}
	dir, err := os.MkdirTemp("", "wrenn-test-")
	if err != nil {
		return "", err
	}
	s.dir = dir
	return dir, os.Chmod(dir, 0o755) // the servers run as another user
}

// Database makes a database for t from the migrated template and drops it when t ends. It gives its URL.
func Database(t testing.TB) string {
	t.Helper()
	return copyTemplate(t, shared.templateDatabase(t))
}

// EmptyDatabase is Database without the schema.
func EmptyDatabase(t testing.TB) string {
	t.Helper()
	shared.templateDatabase(t)
	return copyTemplate(t, "template0")
}

func copyTemplate(t testing.TB, template string) string {
	t.Helper()
	name := "t_" + wrenn.NewID("x")[2:]
	if err := execSQL(shared.postgres, fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", name, template)); err != nil {
		t.Fatalf("make a test database: %v", err)
	}
	t.Cleanup(func() {
		if err := execSQL(shared.postgres, fmt.Sprintf("DROP DATABASE IF EXISTS %s WITH (FORCE)", name)); err != nil {
			t.Logf("drop the test database: %v", err)
		}
	})
	return withDatabase(t, shared.postgres, name)
}

// Open is Database with a Store on it.
func Open(t testing.TB) *store.Store {
	t.Helper()
	st, err := store.Open(t.Context(), Database(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	return st
}

// Redis gives the URL of a Redis. Tests share it, so they must use keys that no other uses.
func Redis(t testing.TB) string {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.redis != "" {
		return shared.redis
	}
	if u := os.Getenv("TEST_REDIS_URL"); u != "" {
		shared.redis = u
		return u
	}
	dir, err := shared.tempDir()
	if err != nil {
		t.Fatal(err)
	}
	u, stop := startRedis(t, dir)
	shared.redis, shared.stops = u, append(shared.stops, stop)
	return u
}

// RedisClient is a client of Redis.
func RedisClient(t testing.TB) *redis.Client {
	t.Helper()
	opt, err := redis.ParseURL(Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(opt)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (s *Servers) templateDatabase(t testing.TB) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.template != "" {
		return s.template
	}
	if s.postgres = os.Getenv("TEST_DATABASE_URL"); s.postgres == "" {
		dir, err := s.tempDir()
		if err != nil {
			t.Fatal(err)
		}
		u, stop := startPostgres(t, dir)
		s.postgres, s.stops = u, append(s.stops, stop)
	}
	name, err := makeTemplate(t, s.postgres)
	if err != nil {
		t.Fatalf("make the template database: %v", err)
	}
	s.template = name
	return name
}

// makeTemplate makes the migrated template, once for all test binaries that share the server.
func makeTemplate(t testing.TB, maintenance string) (string, error) {
	sum, err := migrationsHash()
	if err != nil {
		return "", err
	}
	name := "wrenn_template_" + sum
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, maintenance)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_lock(7)"); err != nil {
		return "", err
	}
	var ready bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1 AND datistemplate)", name).Scan(&ready); err != nil || ready {
		return name, err
	}
	if _, err := conn.Exec(ctx, "DROP DATABASE IF EXISTS "+name); err != nil {
		return "", err
	}
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+name); err != nil {
		return "", err
	}
	if err := store.Migrate(ctx, withDatabase(t, maintenance, name), slog.New(slog.DiscardHandler)); err != nil {
		return "", err
	}
	_, err = conn.Exec(ctx, "ALTER DATABASE "+name+" IS_TEMPLATE true")
	return name, err
}

func migrationsHash() (string, error) {
	h := sha256.New()
	err := fs.WalkDir(store.Migrations(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(store.Migrations(), path)
		h.Write(text)
		return err
	})
	return hex.EncodeToString(h.Sum(nil)[:8]), err
}

func execSQL(url, sql string) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

func withDatabase(t testing.TB, raw, name string) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}
