package localstack

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
)

// A test that kills an ephemeral server wants to see what a real one would do: what was committed stays.
func TestEphemeralPostgresKeepsCommitsWhenKilled(t *testing.T) {
	needServers(t)
	t.Parallel()
	ctx := context.Background()
	o := Options{Dir: filepath.Join(reachable(t), "pg"), Ephemeral: true}
	srv, err := StartPostgres(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := pgAsk(ctx, srv.URL, "CREATE TABLE kept (n int)"); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		if err := pgAsk(ctx, srv.URL, fmt.Sprintf("INSERT INTO kept VALUES (%d)", n)); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(srv.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-srv.gone
		if srv, err = StartPostgres(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	if got := query(t, srv.URL, "SELECT count(*)::text FROM kept"); got != "3" {
		t.Errorf("%s of 3 committed rows are left after kill -9", got)
	}
	if err := srv.Stop(ctx); err != nil {
		t.Error(err)
	}
}
