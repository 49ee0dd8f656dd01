package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killOrphans ends every process that runs under a uid of this instance's range, but for those in keep,
// and returns when they are gone. Only VMMs ever get these uids, so a process there that no record
// names was started by an agent that died before it could write it down.
func killOrphans(cfg Config, keep map[int]bool) (killed int, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		uid, err := processUID(dir)
		if err != nil || uid < cfg.BaseUID || uid >= cfg.BaseUID+cfg.Slots || keep[uid] {
			continue // a process that ended meanwhile has no uid any more
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if err := killAndWait(pid); err != nil {
			return killed, err
		}
		killed++
	}
	return killed, nil
}

func processUID(dir string) (int, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Uid:" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, fmt.Errorf("%s has no uid", dir)
}

// killAndWait uses a pidfd, so the pid cannot come to mean another process in between (pidfd_open(2)).
func killAndWait(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone already
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, int(10*time.Second/time.Millisecond))
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", pid, err)
	}
	if n == 0 {
		return fmt.Errorf("process %d does not end", pid)
	}
	return nil
}
