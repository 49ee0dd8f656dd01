package localstack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// daemonGrace is how long a program of ours may take to end.
const daemonGrace = 30 * time.Second

// A program of ours in the background: wrenn-cp or wrenn-agent. Beside the pid file lies a
// fingerprint of the program and its settings, by which a later run tells whether it is still what
// it should be.

func (s *Stack) pidFile(name string) string { return s.path("run", name+".pid") }
func (s *Stack) logFile(name string) string { return s.path("logs", name+".log") }

// running finds the daemon.
func (s *Stack) running(name string) (process, bool) {
	p, ok := loadProcess(s.pidFile(name))
	return p, ok && p.alive()
}

// upToDate tells whether the running daemon has this fingerprint.
func (s *Stack) upToDate(name, fingerprint string) bool {
	raw, err := os.ReadFile(s.path("run", name+".is"))
	return err == nil && string(raw) == fingerprint
}

// fingerprint stands for a program and its settings. It goes by the program's content: building it
// again changes its time.
func fingerprint(program string, settings ...string) (string, error) {
	f, err := os.Open(program)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	for _, v := range settings {
		fmt.Fprintf(h, "%q\n", v)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// record notes what runs now.
func (s *Stack) record(name string, p process, fingerprint string) error {
	return errors.Join(p.save(s.pidFile(name)), writeFile(s.path("run", name+".is"), []byte(fingerprint), 0o600))
}

// stopDaemon ends a daemon: SIGTERM, and SIGKILL if it is still there after daemonGrace.
func (s *Stack) stopDaemon(ctx context.Context, name string) (string, error) {
	p, ok := s.running(name)
	if !ok {
		return "was not running", nil
	}
	for _, sig := range []string{"TERM", "KILL"} {
		if err := s.root.signal(ctx, p.PID, sig); err != nil && p.alive() {
			return "", err
		}
		waiting, cancel := context.WithTimeout(ctx, daemonGrace)
		err := p.wait(waiting)
		cancel()
		if err == nil {
			return "", os.Remove(s.pidFile(name))
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
	return "", fmt.Errorf("%s (pid %d) does not end; see %s", name, p.PID, s.logFile(name))
}

// stopServer stops a database by its own directory.
func stopServer(ctx context.Context, dir string) (string, error) {
	p, ok := loadProcess(filepath.Join(dir, "pid"))
	if !ok || !p.alive() {
		return "was not running", nil
	}
	return "", p.stop(ctx, syscall.SIGINT, stopGrace)
}

// startRoot starts a program as root, with its log, in a session of its own. The shell in between
// writes down its own pid and then becomes the program, so that the pid is right with sudo too.
func (s *Stack) startRoot(ctx context.Context, name string, env map[string]string, program string, args ...string) (process, error) {
	pidFile := s.path("run", name+".newpid")
	if err := os.Remove(pidFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return process{}, err
	}
	script := `umask 022; echo $$ >"$0.tmp" && mv "$0.tmp" "$0" && exec "$@"`
	line := s.root.command(env, "sh", append([]string{"-c", script, pidFile, program}, args...)...)
	d := daemon{Path: line[0], Args: line[1:], Dir: "/", Log: s.logFile(name), Env: []string{"PATH=" + rootPath}}
	starter, gone, err := d.start()
	if err != nil {
		return process{}, err
	}
	var pid int
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = poll(ctx, 10*time.Millisecond, func() (bool, error) {
		raw, rerr := os.ReadFile(pidFile)
		if rerr == nil {
			pid, _ = strconv.Atoi(strings.TrimSpace(string(raw)))
			return pid > 0, nil
		}
		select {
		case <-gone:
			return false, errors.New("it ended at once")
		default:
			return false, nil
		}
	})
	if err != nil {
		_ = starter.stop(context.WithoutCancel(ctx), syscall.SIGTERM, time.Second)
		return process{}, s.failed(name, err)
	}
	p, err := identify(pid)
	if err != nil {
		return process{}, s.failed(name, errors.New("it ended at once"))
	}
	return p, nil
}

// failed is the error of a daemon that did not do what it should, with the end of its log.
func (s *Stack) failed(name string, err error) error {
	return fmt.Errorf("%s: %w; the end of %s:\n%s", name, err, s.logFile(name), lastLines(s.logFile(name), 15))
}
