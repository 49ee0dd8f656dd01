// Package storetest gives each test a PostgreSQL database of its own, copied from a migrated template, and
// a Redis. The servers are those of stacktest. Only tests may import it.
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
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/localstack/stacktest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Run is for TestMain.
func Run(m *testing.M) int { return stacktest.Main(m) }

// Database makes a database for t from the migrated template and drops it when t ends. It gives its URL.
func Database(t testing.TB) string {
	t.Helper()
	return copyTemplate(t, template(t))
}

// EmptyDatabase is Database without the schema.
func EmptyDatabase(t testing.TB) string {
	t.Helper()
	return copyTemplate(t, "template0")
}

func copyTemplate(t testing.TB, template string) string {
	t.Helper()
	name := "t_" + wrenn.NewID("x")[2:]
	if err := execSQL(maintenance(t), fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", name, template)); err != nil {
		t.Fatalf("make a test database: %v", err)
	}
	t.Cleanup(func() {
		if err := execSQL(maintenance(t), fmt.Sprintf("DROP DATABASE IF EXISTS %s WITH (FORCE)", name)); err != nil {
			t.Logf("drop the test database: %v", err)
		}
	})
	return withDatabase(t, maintenance(t), name)
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
	return fromEnv(t, "TEST_REDIS_URL")
}

func maintenance(t testing.TB) string {
	t.Helper()
	return fromEnv(t, "TEST_DATABASE_URL")
}

func fromEnv(t testing.TB, name string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Fatalf("%s is not set: the package needs TestMain with storetest.Run", name)
	}
	return v
}

// template makes the migrated template, once for all test binaries that share the server.
func template(t testing.TB) string {
	t.Helper()
	name, err := makeTemplate(t, maintenance(t))
	if err != nil {
		t.Fatalf("make the template database: %v", err)
	}
	return name
}

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
