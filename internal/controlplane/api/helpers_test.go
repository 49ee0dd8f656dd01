package api_test

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
)

// query gives the first column of every row as text.
func query(t testing.TB, p *planetest.Plane, sql string, args ...any) []string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.Database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func dumpKeys(t *testing.T, p *planetest.Plane) string {
	t.Helper()
	return strings.Join(query(t, p, `SELECT scope || key || encode(coalesce(body, ''), 'escape') FROM idempotency_keys`), "\n")
}
