package store_test

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Run(m)) }

func TestMigrateConcurrently(t *testing.T) {
	t.Parallel()
	url := storetest.EmptyDatabase(t)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if err := store.Migrate(t.Context(), url, slog.New(slog.DiscardHandler)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var columns int
	err = conn.QueryRow(t.Context(), `SELECT count(*) FROM information_schema.columns
		WHERE table_name = 'hosts' AND column_name IN ('cert_fingerprint', 'mtls_enabled')`).Scan(&columns)
	if err != nil || columns != 2 {
		t.Fatalf("hosts has %d of the 2 columns of the mTLS migration (%v)", columns, err)
	}
}

// Every status column refuses a value that is not one of its states.
func TestStatusColumnsAreChecked(t *testing.T) {
	t.Parallel()
	conn, err := pgx.Connect(t.Context(), storetest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), `
		SELECT c.table_name || '.' || c.column_name,
		       EXISTS (SELECT 1 FROM pg_constraint k WHERE k.contype = 'c' AND k.conrelid = c.table_name::regclass
		               AND pg_get_constraintdef(k.oid) LIKE '%' || c.column_name || '%ANY (ARRAY[%')
		FROM information_schema.columns c
		WHERE c.table_schema = 'public' AND c.column_name IN ('status', 'type', 'role', 'on_timeout', 'actor_type') AND c.table_name <> 'events'`)
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for rows.Next() {
		var column string
		var checked bool
		if err := rows.Scan(&column, &checked); err != nil {
			t.Fatal(err)
		}
		seen++
		if !checked {
			t.Errorf("%s has no CHECK", column)
		}
	}
	if rows.Err() != nil || seen < 8 {
		t.Fatalf("saw %d status columns, want at least 8 (%v)", seen, rows.Err())
	}
}

var queryName = regexp.MustCompile(`(?m)^-- name: (\w+) :`)

// Whatever is in team.sql is bound to a team, and nobody but Team calls it.
func TestTeamQueriesAreScoped(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("queries/team.sql")
	if err != nil {
		t.Fatal(err)
	}
	marks := queryName.FindAllSubmatchIndex(text, -1)
	names := map[string]bool{}
	for i, m := range marks {
		end := len(text)
		if i+1 < len(marks) {
			end = marks[i+1][0]
		}
		name, body := string(text[m[2]:m[3]]), string(text[m[0]:end])
		names[name] = true
		if !strings.Contains(body, "team_id = @team_id") && !strings.Contains(body, "VALUES (@id, @team_id") {
			t.Errorf("%s is not bound to a team", name)
		}
	}
	if len(names) < 10 {
		t.Fatalf("found %d queries", len(names))
	}
	root := "../.."
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "/gen/") ||
			strings.HasPrefix(path, filepath.Join(root, "controlplane/store")) {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || !names[sel.Sel.Name] {
				return true
			}
			if owner, ok := sel.X.(*ast.SelectorExpr); ok && (owner.Sel.Name == "store" || owner.Sel.Name == "st" || owner.Sel.Name == "Queries") {
				t.Errorf("%s calls %s past store.Team", path, sel.Sel.Name)
			}
			if owner, ok := sel.X.(*ast.Ident); ok && (owner.Name == "tx" || owner.Name == "st" || owner.Name == "store") {
				t.Errorf("%s calls %s past store.Team", path, sel.Sel.Name)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestLeadIsExclusiveAndHandsOver(t *testing.T) {
	t.Parallel()
	url := storetest.Database(t)
	var leaders, most atomic.Int32
	entered := make(chan int, 2)
	var wg sync.WaitGroup
	cancels := make([]context.CancelFunc, 2)
	for i := range 2 {
		st, err := store.Open(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancels[i] = cancel
		wg.Go(func() {
			defer st.Close()
			st.Lead(ctx, store.LockMonitor, func(ctx context.Context) {
				most.Store(max(most.Load(), leaders.Add(1)))
				entered <- i
				<-ctx.Done()
				leaders.Add(-1)
			})
		})
	}
	first := <-entered
	cancels[first]()
	select {
	case second := <-entered:
		if second == first {
			t.Errorf("replica %d led again after it ended", first)
		}
	case <-time.After(30 * time.Second):
		t.Error("nobody took over")
	}
	cancels[1-first]()
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d leaders at once", most.Load())
	}
}

func TestIsUnavailable(t *testing.T) {
	t.Parallel()
	st, err := store.Open(t.Context(), "postgres://nobody@127.0.0.1:1/none?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.Ping(t.Context()); !store.IsUnavailable(err) {
		t.Errorf("a refused connection is not unavailable: %v", err)
	}
	open := storetest.Open(t)
	if _, err := open.SandboxByID(t.Context(), "none"); !store.IsNotFound(err) || store.IsUnavailable(err) {
		t.Errorf("no row: %v", err)
	}
}
