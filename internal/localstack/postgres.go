package localstack

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const postgresUser = "wrenn"

// StartPostgres runs a private PostgreSQL with its data below o.Dir, or finds the one that already
// runs there. It listens on 127.0.0.1 only and asks for a password; Server.URL names a superuser
// and the database "wrenn". When it returns, a query has been answered.
func StartPostgres(ctx context.Context, o Options) (*Server, error) {
	unlock, err := o.prepare()
	if err != nil {
		return nil, err
	}
	defer unlock()
	pg := postgres{Options: o}
	if pg.bin, err = postgresBin(); err != nil {
		return nil, err
	}
	if pg.account, err = unprivileged("postgres"); err != nil {
		return nil, err
	}
	if pg.secret, err = pg.password(); err != nil {
		return nil, err
	}
	if err := pg.initData(ctx); err != nil {
		return nil, err
	}
	if proc, ok := pg.running(); ok {
		srv := pg.server(proc, nil)
		srv.Reused = true
		err := srv.awaitServer(ctx, "PostgreSQL", pg.ready(srv))
		if err == nil || proc.alive() || ctx.Err() != nil {
			return srv, err
		} // it was just dying
	}
	for began := time.Now(); ; {
		srv, err := pg.start(ctx)
		if err != nil {
			return nil, err
		}
		if err = srv.awaitServer(ctx, "PostgreSQL", pg.ready(srv)); err == nil {
			return srv, nil
		}
		_ = srv.Stop(context.WithoutCancel(ctx))
		// Sessions of a server that was killed take a moment to notice; until then they hold its memory.
		if time.Since(began) > lingerLimit || !strings.Contains(err.Error(), "pre-existing shared memory block") {
			return nil, err
		}
	}
}

// lingerLimit is how long sessions may outlive a server that was killed.
const lingerLimit = 10 * time.Second

type postgres struct {
	Options
	bin     string
	account *account
	secret  string
}

func (pg postgres) data() string { return filepath.Join(pg.Dir, "data") }

// postgresBin is the directory with the programs of the newest PostgreSQL installed (Debian keeps the server's
// programs out of PATH).
func postgresBin() (string, error) {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	sort.Slice(dirs, func(i, j int) bool { return postgresVersion(dirs[i]) > postgresVersion(dirs[j]) })
	for _, dir := range dirs {
		if _, err := exec.LookPath(filepath.Join(dir, "initdb")); err == nil {
			return dir, nil
		}
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			return filepath.Dir(path), nil
		}
	}
	return "", errors.New("PostgreSQL is not installed: on Debian and Ubuntu, apt-get install postgresql")
}

func postgresVersion(bin string) int {
	v, _ := strconv.Atoi(filepath.Base(filepath.Dir(bin)))
	return v
}

// initData makes the data directory under another name first, so that a half-made one is never used.
func (pg postgres) initData(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(pg.data(), "PG_VERSION")); err == nil {
		return pg.sameVersion()
	}
	tmp, pwFile := pg.data()+".new", filepath.Join(pg.Dir, "initial-password")
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := pg.account.own(tmp); err != nil {
		return err
	}
	defer os.Remove(pwFile)
	if err := writeFile(pwFile, []byte(pg.secret+"\n"), 0o600); err != nil {
		return err
	}
	if err := pg.account.chown(pwFile); err != nil {
		return err
	}
	args := []string{"-D", pg.seen(tmp), "-U", postgresUser, "--encoding=UTF8", "--locale=C",
		"--auth=scram-sha-256", "--pwfile=" + pg.seen(pwFile)}
	if pg.Ephemeral {
		args = append(args, "--no-sync")
	}
	out, err := pg.daemon("initdb", args).command(ctx).CombinedOutput()
	if err != nil {
		return fmt.Errorf("making the database: initdb: %w\n%s", err, out)
	}
	return os.Rename(tmp, pg.data())
}

// sameVersion refuses data of another major version with a way out, instead of a server that
// does not start.
func (pg postgres) sameVersion() error {
	raw, err := os.ReadFile(filepath.Join(pg.data(), "PG_VERSION"))
	if err != nil {
		return err
	}
	have, want := strings.TrimSpace(string(raw)), filepath.Base(filepath.Dir(pg.bin))
	if have == want || postgresVersion(pg.bin) == 0 {
		return nil
	}
	bin := filepath.Join("/usr/lib/postgresql", have, "bin")
	return fmt.Errorf("the data in %s is of PostgreSQL %s, but %s is installed: install postgresql-%s (%s is missing)",
		pg.data(), have, want, have, bin)
}

func (pg postgres) start(ctx context.Context) (*Server, error) {
	if err := pg.dropStaleLock(); err != nil {
		return nil, err
	}
	port, err := pg.choosePort(ctx)
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL: %w", err)
	}
	args := []string{"-D", pg.seen(pg.data()), "-p", strconv.Itoa(port)}
	settings := []string{"listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=300",
		"log_min_messages=warning", "log_line_prefix=%m [%p] "}
	if pg.Ephemeral {
		// Without syncs a power cut may cost the data, but a commit is with the kernel before it is
		// answered, so that kill -9 costs nothing.
		settings = append(settings, "fsync=off")
	}
	for _, s := range settings {
		args = append(args, "-c", s)
	}
	proc, gone, err := pg.daemon("postgres", args).start()
	if err != nil {
		return nil, err
	}
	proc.Port = port
	srv := pg.server(proc, gone)
	if err := proc.save(pg.pidFile()); err != nil {
		_ = srv.Stop(context.WithoutCancel(ctx))
		return nil, err
	}
	return srv, nil
}

func (pg postgres) daemon(program string, args []string) daemon {
	return daemon{Path: filepath.Join(pg.bin, program), Args: args, Dir: pg.Dir, Log: pg.LogFile, As: pg.account,
		Env:  []string{"PATH=" + pg.bin + ":/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"},
		Bind: !pg.account.canReach(pg.data()), Tied: pg.Ephemeral}
}

// seen is path as the server sees it.
func (pg postgres) seen(path string) string {
	if pg.account.canReach(pg.data()) {
		return path
	}
	return filepath.Join(bindTarget, strings.TrimPrefix(path, pg.Dir))
}

// running finds the server that already runs on this data directory: by our own record, or, if the
// caller died before writing one, by PostgreSQL's lock file and the process's working directory.
func (pg postgres) running() (process, bool) {
	if p, ok := loadProcess(pg.pidFile()); ok && p.alive() {
		return p, true
	}
	pid, port := pg.lockFile()
	if pid == 0 || port == 0 || !sameDir(filepath.Join("/proc", strconv.Itoa(pid), "cwd"), pg.data()) {
		return process{}, false
	}
	p, err := identify(pid)
	if err != nil {
		return process{}, false
	}
	p.Port = port
	return p, p.save(pg.pidFile()) == nil
}

// lockFile reads pid (line 1) and port (line 4) of postmaster.pid.
func (pg postgres) lockFile() (pid, port int) {
	raw, err := os.ReadFile(filepath.Join(pg.data(), "postmaster.pid"))
	if err != nil {
		return 0, 0
	}
	lines := strings.Split(string(raw), "\n")
	pid, _ = strconv.Atoi(strings.TrimSpace(lines[0]))
	if len(lines) > 3 {
		port, _ = strconv.Atoi(strings.TrimSpace(lines[3]))
	}
	return pid, port
}

// dropStaleLock removes a lock file whose pid now belongs to some other program: PostgreSQL itself
// would refuse to start for it.
func (pg postgres) dropStaleLock() error {
	pid, _ := pg.lockFile()
	if pid == 0 || sameDir(filepath.Join("/proc", strconv.Itoa(pid), "cwd"), pg.data()) {
		return nil
	}
	return os.Remove(filepath.Join(pg.data(), "postmaster.pid"))
}

func (pg postgres) server(p process, gone <-chan struct{}) *Server {
	u := url.URL{Scheme: "postgres", User: url.UserPassword(postgresUser, pg.secret),
		Host: fmt.Sprintf("127.0.0.1:%d", p.Port), Path: "/wrenn", RawQuery: "sslmode=disable"}
	return &Server{URL: u.String(), Port: p.Port, PID: p.PID, opts: pg.Options, proc: p, gone: gone}
}

// ready makes the database "wrenn" if it is not there and asks it a question.
func (pg postgres) ready(srv *Server) func(context.Context) error {
	return func(ctx context.Context) error {
		err := pgAsk(ctx, srv.URL, "SELECT 1")
		var refused *pgconn.PgError
		if !errors.As(err, &refused) || refused.Code != "3D000" { // invalid_catalog_name
			return err
		}
		admin := strings.Replace(srv.URL, "/wrenn?", "/postgres?", 1)
		return pgAsk(ctx, admin, "CREATE DATABASE wrenn")
	}
}

func pgAsk(ctx context.Context, dsn, sql string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	return err
}

// sameDir tells whether two paths lead to one directory, whatever mounts lie between.
func sameDir(a, b string) bool {
	ia, err := os.Stat(a)
	if err != nil {
		return false
	}
	ib, err := os.Stat(b)
	return err == nil && os.SameFile(ia, ib)
}
