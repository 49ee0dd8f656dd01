package localstack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// StartRedis runs a private Redis with its data below o.Dir, or finds the one that already runs
// there. It listens on 127.0.0.1 only and asks for a password. When it returns, it has answered a
// ping.
func StartRedis(ctx context.Context, o Options) (*Server, error) {
	unlock, err := o.prepare()
	if err != nil {
		return nil, err
	}
	defer unlock()
	r := redis{Options: o}
	if r.path, err = exec.LookPath("redis-server"); err != nil {
		return nil, errors.New("redis is not installed: on Debian and Ubuntu, apt-get install redis-server")
	}
	if r.account, err = unprivileged("redis"); err != nil {
		return nil, err
	}
	if r.secret, err = r.password(); err != nil {
		return nil, err
	}
	if srv := r.running(); srv != nil {
		err := srv.awaitServer(ctx, "Redis", r.ready(srv))
		if err == nil || srv.proc.alive() || ctx.Err() != nil {
			return srv, err
		} // it was just dying
	}
	srv, err := r.start(ctx)
	if err != nil {
		return nil, err
	}
	if err := srv.awaitServer(ctx, "Redis", r.ready(srv)); err != nil {
		_ = srv.Stop(context.WithoutCancel(ctx))
		return nil, err
	}
	return srv, nil
}

func (r redis) ready(srv *Server) func(context.Context) error {
	return func(ctx context.Context) error { return r.ping(ctx, srv.Port) }
}

type redis struct {
	Options
	path    string
	account *account
	secret  string
}

func (r redis) data() string { return filepath.Join(r.Dir, "data") }

func (r redis) running() *Server {
	p, ok := loadProcess(r.pidFile())
	if !ok || !p.alive() {
		return nil
	}
	srv := r.server(p, nil)
	srv.Reused = true
	return srv
}

func (r redis) start(ctx context.Context) (*Server, error) {
	if err := r.account.own(r.data()); err != nil {
		return nil, err
	}
	port, err := r.choosePort(ctx)
	if err != nil {
		return nil, fmt.Errorf("Redis: %w", err) //nolint:staticcheck // a name
	}
	conf, err := r.config(port)
	if err != nil {
		return nil, err
	}
	defer conf.Close()
	d := daemon{Path: r.path, Args: []string{"-"}, Dir: r.Dir, Stdin: conf, Log: r.LogFile, As: r.account,
		Env:  []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"},
		Bind: !r.account.canReach(r.data()), Tied: r.Ephemeral}
	proc, gone, err := d.start()
	if err != nil {
		return nil, err
	}
	proc.Port = port
	srv := r.server(proc, gone)
	if err := proc.save(r.pidFile()); err != nil {
		_ = srv.Stop(context.WithoutCancel(ctx))
		return nil, err
	}
	return srv, nil
}

// config writes the configuration, which Redis reads from its standard input: the password is
// neither on a command line nor in a file that its user must be able to reach.
func (r redis) config(port int) (*os.File, error) {
	dir := r.data()
	if !r.account.canReach(dir) {
		dir = filepath.Join(bindTarget, "data")
	}
	lines := []string{"bind 127.0.0.1", fmt.Sprintf("port %d", port), "daemonize no", "loglevel warning",
		"requirepass " + r.secret, fmt.Sprintf("dir %q", dir)}
	if r.Ephemeral {
		lines = append(lines, `save ""`, "appendonly no")
	} else {
		lines = append(lines, "appendonly yes", "appendfsync everysec")
	}
	path := filepath.Join(r.Dir, "redis.conf")
	if err := writeFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		return nil, err
	}
	return os.Open(path)
}

func (r redis) server(p process, gone <-chan struct{}) *Server {
	return &Server{URL: fmt.Sprintf("redis://:%s@127.0.0.1:%d/0", r.secret, p.Port), Port: p.Port, PID: p.PID,
		opts: r.Options, proc: p, gone: gone}
}

// ping speaks the two lines of the Redis protocol that readiness takes.
func (r redis) ping(ctx context.Context, port int) error {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "AUTH %s\r\nPING\r\n", r.secret); err != nil {
		return err
	}
	answers := bufio.NewReader(conn)
	for _, want := range []string{"+OK", "+PONG"} {
		line, err := answers.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.TrimSpace(line) != want {
			return fmt.Errorf("it answered %q", strings.TrimSpace(line))
		}
	}
	return nil
}
