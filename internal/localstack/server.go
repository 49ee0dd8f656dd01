package localstack

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Options say how to run a private database server.
type Options struct {
	// Dir is the server's own directory. It is made if needed; only the server may write in it.
	Dir string
	// Port on 127.0.0.1; 0 means the port it had last time, else a free one.
	Port int
	// Ephemeral servers are for tests: nothing is synced to disk, and the server dies with the
	// calling process. Others are daemons that outlive it. PostgreSQL keeps what was committed even
	// if it is killed; Redis starts empty.
	Ephemeral bool
	// LogFile defaults to Dir/log.
	LogFile string
}

// Server is a running private PostgreSQL or Redis.
type Server struct {
	// URL is for clients; it contains the password.
	URL  string
	Port int
	PID  int
	// Reused tells that it was already running.
	Reused bool

	opts Options
	proc process
	gone <-chan struct{}
}

// startLimit is how long a database may take to answer its first question: recovery after a crash
// is part of it.
const startLimit = 60 * time.Second

// stopGrace is how long a database may take for a clean shutdown.
const stopGrace = 20 * time.Second

// Stop ends the server cleanly and waits until it is gone. Its data stays. Stopping twice is fine.
func (s *Server) Stop(ctx context.Context) error {
	// SIGINT is PostgreSQL's fast shutdown (clients are disconnected) and Redis's ordinary one.
	if err := s.proc.stop(ctx, syscall.SIGINT, stopGrace); err != nil {
		return err
	}
	if s.gone != nil {
		<-s.gone
	}
	return nil // the pid file stays: it remembers the port
}

func (o Options) pidFile() string { return filepath.Join(o.Dir, "pid") }

// prepare checks and completes the options, makes the directory and takes the lock that keeps two
// callers from starting the same server at once.
func (o *Options) prepare() (unlock func(), err error) {
	if o.Dir == "" {
		return nil, errors.New("localstack: Options.Dir is empty")
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	if o.LogFile == "" {
		o.LogFile = filepath.Join(o.Dir, "log")
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the server's directory: %w", err)
	}
	return lockFile(filepath.Join(o.Dir, "lock"))
}

// lockFile takes an exclusive lock, waiting for another holder. The kernel drops it with the process.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// choosePort is the port to listen on: the one asked for, the last one if it is free, else any.
func (o Options) choosePort(ctx context.Context) (int, error) {
	if o.Port != 0 {
		if err := portFree(ctx, o.Port); err != nil {
			return 0, err
		}
		return o.Port, nil
	}
	if last, ok := loadProcess(o.pidFile()); ok && last.Port != 0 && portFree(ctx, last.Port) == nil {
		return last.Port, nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// portFree is nil if something could listen on the port of 127.0.0.1 now.
func portFree(ctx context.Context, port int) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return fmt.Errorf("port %d is already in use by another program", port)
	}
	return l.Close()
}

// password reads the secret kept in a file of Dir, making it the first time.
func (o Options) password() (string, error) {
	return secretFile(filepath.Join(o.Dir, "password"), 16)
}

// secretFile reads a hex secret, or makes one of n random bytes if the file does not exist.
func secretFile(path string, n int) (string, error) {
	raw, err := os.ReadFile(path)
	if err == nil && len(raw) > 0 {
		return strings.TrimSpace(string(raw)), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	secret := randomHex(n)
	return secret, writeFile(path, []byte(secret+"\n"), 0o600)
}

func randomHex(n int) string {
	buf := make([]byte, n)
	_, _ = rand.Read(buf) // never fails (crypto/rand since Go 1.24)
	return hex.EncodeToString(buf)
}

// awaitServer asks ready until it succeeds. A server that dies meanwhile, or never answers, is an
// error with the end of its log.
func (s *Server) awaitServer(ctx context.Context, what string, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	var last error
	err := poll(ctx, 25*time.Millisecond, func() (bool, error) {
		if last = ready(ctx); last == nil {
			return true, nil
		}
		if !s.proc.alive() {
			return false, errors.New("it ended")
		}
		return false, nil
	})
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s did not start: %w (last answer: %w); the end of %s:\n%s",
		what, err, last, s.opts.LogFile, lastLines(s.opts.LogFile, 12))
}
