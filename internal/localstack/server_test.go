package localstack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// TestMain lets the test binary play a caller that is killed (see TestEphemeralDiesWithCaller).
func TestMain(m *testing.M) {
	if dir := os.Getenv("LOCALSTACK_TEST_CALLER"); dir != "" {
		caller(dir)
	}
	os.Exit(m.Run())
}

func caller(dir string) {
	ctx := context.Background()
	pg, err := StartPostgres(ctx, Options{Dir: filepath.Join(dir, "pg"), Ephemeral: true})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	rd, err := StartRedis(ctx, Options{Dir: filepath.Join(dir, "redis"), Ephemeral: true})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(pg.PID, rd.PID)
	select {}
}

func needServers(t *testing.T) {
	t.Helper()
	if _, err := postgresBin(); err != nil {
		t.Skip("needs PostgreSQL installed: ", err)
	}
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("needs Redis installed: ", err)
	}
}

// reachable is a directory that an unprivileged user can walk to (t.TempDir is 0700 at one level
// when root runs the tests).
func reachable(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "localstack-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func query(t *testing.T, url, sql string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var out string
	if err := conn.QueryRow(ctx, sql).Scan(&out); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return out
}

func TestPostgresSurvivesCrashAndIsFoundAgain(t *testing.T) {
	needServers(t)
	t.Parallel()
	ctx := context.Background()
	o := Options{Dir: filepath.Join(reachable(t), "pg")}
	first, err := StartPostgres(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = first.Stop(ctx) })
	if err := pgAsk(ctx, first.URL, "CREATE TABLE kept AS SELECT 'yes'::text AS v"); err != nil {
		t.Fatal(err)
	}

	again, err := StartPostgres(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Reused || again.PID != first.PID || again.URL != first.URL {
		t.Errorf("second start: reused=%v pid=%d, want the running server %d", again.Reused, again.PID, first.PID)
	}
	// A caller that died before it wrote the pid file must not cost us the server.
	if err := os.Remove(o.pidFile()); err != nil {
		t.Fatal(err)
	}
	adopted, err := StartPostgres(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if adopted.PID != first.PID {
		t.Errorf("without its pid file: pid %d, want %d", adopted.PID, first.PID)
	}

	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-first.gone
	after, err := StartPostgres(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = after.Stop(ctx) })
	if after.Reused || after.Port != first.Port {
		t.Errorf("after a crash: reused=%v port=%d, want a new process on port %d", after.Reused, after.Port, first.Port)
	}
	if got := query(t, after.URL, "SELECT v FROM kept"); got != "yes" {
		t.Errorf("data after a crash: %q", got)
	}
	if err := after.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if after.proc.alive() {
		t.Error("still alive after Stop")
	}
}

func TestPostgresBelowUnreachableDirectory(t *testing.T) {
	needServers(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root: only root runs servers as another user")
	}
	t.Parallel()
	ctx := context.Background()
	dir := filepath.Join(reachable(t), "closed")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	pg, err := StartPostgres(ctx, Options{Dir: filepath.Join(dir, "pg"), Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pg.Stop(ctx) })
	rd, err := StartRedis(ctx, Options{Dir: filepath.Join(dir, "redis"), Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rd.Stop(ctx) })
	for _, pid := range []int{pg.PID, rd.PID} {
		if uid := statusField(t, pid, "Uid:"); uid == "0" {
			t.Errorf("process %d runs as root", pid)
		}
	}
	if got := query(t, pg.URL, "SELECT current_database()::text"); got != "wrenn" {
		t.Errorf("database %q", got)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Error("the servers' mount is visible outside their namespace")
	}
}

func TestRedisReuse(t *testing.T) {
	needServers(t)
	t.Parallel()
	ctx := context.Background()
	o := Options{Dir: filepath.Join(reachable(t), "redis")}
	first, err := StartRedis(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = first.Stop(ctx) })
	second, err := StartRedis(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if !second.Reused || second.PID != first.PID {
		t.Errorf("second start: reused=%v pid=%d, want %d", second.Reused, second.PID, first.PID)
	}
	if err := second.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if first.proc.alive() {
		t.Error("still alive after Stop")
	}
}

func TestPortInUseIsSaid(t *testing.T) {
	needServers(t)
	t.Parallel()
	ctx := context.Background()
	dir := reachable(t)
	rd, err := StartRedis(ctx, Options{Dir: filepath.Join(dir, "one"), Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rd.Stop(ctx) })
	_, err = StartRedis(ctx, Options{Dir: filepath.Join(dir, "two"), Port: rd.Port, Ephemeral: true})
	if err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("a used port: %v", err)
	}
}

func TestEphemeralDiesWithCaller(t *testing.T) {
	needServers(t)
	t.Parallel()
	dir := reachable(t)
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "LOCALSTACK_TEST_CALLER="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	var a, b int
	if _, err := fmt.Fscan(out, &a, &b); err != nil {
		t.Fatal("the caller did not start its servers: ", err)
	}
	var servers []process
	for _, pid := range []int{a, b} {
		p, err := identify(pid)
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, p)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, p := range servers {
		if err := p.wait(ctx); err != nil {
			t.Errorf("process %d outlived its caller: %v", p.PID, err)
		}
	}
}

func statusField(t *testing.T, pid int, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(raw), "\n") {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.Fields(rest)[0]
		}
	}
	return ""
}
