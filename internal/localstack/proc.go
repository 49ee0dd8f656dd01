package localstack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// maxLog is the size from which a daemon's log is set aside (as .1) at its next start.
const maxLog = 16 << 20

// process names one process for as long as the machine runs: a pid alone is reused by the kernel, a
// pid with its start time and the boot it belongs to is not.
type process struct {
	PID       int    `json:"pid"`
	StartTick uint64 `json:"start_tick"` // field 22 of /proc/PID/stat
	BootID    string `json:"boot_id"`
	Port      int    `json:"port,omitempty"`
}

// identify reads the identity of a living process.
func identify(pid int) (process, error) {
	tick, state, err := procStat(pid)
	if err != nil {
		return process{}, err
	}
	if state == 'Z' || state == 'X' {
		return process{}, os.ErrProcessDone
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return process{}, fmt.Errorf("reading the boot id: %w", err)
	}
	return process{PID: pid, StartTick: tick, BootID: strings.TrimSpace(string(boot))}, nil
}

// procStat gives start time and state of a process. The name in field 2 may contain anything, so
// fields are counted from the last parenthesis.
func procStat(pid int) (tick uint64, state byte, err error) {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, err
	}
	end := bytes.LastIndexByte(raw, ')')
	if end < 0 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	fields := bytes.Fields(raw[end+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	tick, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return tick, fields[0][0], err
}

func (p process) alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := identify(p.PID)
	return err == nil && now.StartTick == p.StartTick && now.BootID == p.BootID
}

// signal sends sig to p if it is still that process. A process of another user that we may not
// signal is an error that says so.
func (p process) signal(sig syscall.Signal) error {
	if !p.alive() {
		return os.ErrProcessDone
	}
	err := syscall.Kill(p.PID, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// wait returns when p is gone or ctx ends.
func (p process) wait(ctx context.Context) error {
	return poll(ctx, 20*time.Millisecond, func() (bool, error) { return !p.alive(), nil })
}

// stop ends p: sig first and, if it is still there after grace, SIGKILL.
func (p process) stop(ctx context.Context, sig syscall.Signal, grace time.Duration) error {
	if err := p.signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		return fmt.Errorf("stopping process %d: %w", p.PID, err)
	}
	graceful, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if p.wait(graceful) == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing process %d: %w", p.PID, err)
	}
	return p.wait(ctx)
}

func loadProcess(path string) (process, bool) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return process{}, false
	}
	var p process
	if json.Unmarshal(raw, &p) != nil {
		return process{}, false
	}
	return p, true
}

func (p process) save(path string) error {
	raw, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return writeFile(path, append(raw, '\n'), 0o644)
}

// writeFile replaces path atomically.
func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Chmod(mode)
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}

// daemon is a program to run in the background.
type daemon struct {
	Path  string
	Args  []string
	Env   []string
	Dir   string
	Stdin *os.File // nil means /dev/null
	Log   string
	As    *account // nil means the caller's own user
	Bind  bool     // show Dir at bindTarget, see account.canReach
	ByFD  bool     // run the file by an open descriptor: As need not be able to walk to it
	Tied  bool     // die when the calling process dies
}

// start runs d in a session of its own. The returned channel is closed when the process has ended
// and was reaped, which a caller that lives on must see to avoid mistaking a zombie for a server.
func (d daemon) start() (process, <-chan struct{}, error) {
	log, err := openLog(d.Log)
	if err != nil {
		return process{}, nil, err
	}
	defer log.Close()
	cmd := d.command(context.Background()) // a daemon outlives its starter's context
	cmd.Stdout, cmd.Stderr = log, log
	if d.ByFD {
		program, err := os.Open(d.Path)
		if err != nil {
			return process{}, nil, err
		}
		defer program.Close()
		// The child sees the first extra file as descriptor 3, and may read its own /proc entry.
		cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{program}
	}
	if d.Stdin != nil {
		cmd.Stdin = d.Stdin
	}
	started, gone := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(gone)
		if d.Tied {
			// The parent-death signal follows the thread that forked, so that thread must live
			// exactly as long as this process does.
			runtime.LockOSThread()
		}
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return process{}, nil, fmt.Errorf("starting %s: %w", d.Path, err)
	}
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		return process{}, gone, fmt.Errorf("%s ended at once; see %s", d.Path, d.Log)
	}
	return p, gone, nil
}

// command builds the command line: plain, or through unshare and setpriv when the data directory
// has to be shown at another place.
func (d daemon) command(ctx context.Context) *exec.Cmd {
	attr := &syscall.SysProcAttr{Setsid: true}
	var cmd *exec.Cmd
	switch {
	case d.Bind:
		script := `mount --bind "$1" "$2" && cd "$2" && shift 2 && exec setpriv "$@"`
		args := []string{"--mount", "sh", "-c", script, "sh", d.Dir, bindTarget,
			"--reuid", strconv.Itoa(d.As.uid), "--regid", strconv.Itoa(d.As.gid), "--clear-groups"}
		if d.Tied {
			args = append(args, "--pdeathsig", "KILL")
		}
		cmd = exec.CommandContext(ctx, "unshare", append(append(args, d.Path), d.Args...)...)
	default:
		cmd = exec.CommandContext(ctx, d.Path, d.Args...)
		cmd.Dir = d.Dir
		if d.As != nil {
			attr.Credential = &syscall.Credential{Uid: uint32(d.As.uid), Gid: uint32(d.As.gid)}
		}
	}
	if d.Tied {
		attr.Pdeathsig = syscall.SIGKILL
	}
	cmd.SysProcAttr = attr
	cmd.Env = d.Env
	return cmd
}

func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("setting the old log aside: %w", err)
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
}

// lastLines gives the end of a log for an error message.
func lastLines(path string, n int) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}

// poll asks done at every interval until it is true, fails, or ctx ends.
func poll(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
