//go:build linux

package vmproc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process names a process so that no other can be taken for it: a pid is used again, but not with the
// same start time in the same boot of the host.
type Process struct {
	PID       int
	StartTime uint64 // field 22 of /proc/PID/stat, clock ticks since boot
	BootID    string

	child *os.Process // set in the process that launched it
}

// identify reads the name of a process that certainly lives: one's own child that was not reaped.
func identify(pid int) (*Process, error) {
	stat, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	return &Process{PID: pid, StartTime: stat.start, BootID: boot}, nil
}

// BootID is the host kernel's random id of this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Reap waits for a process that this process launched, and frees its pid. It must be called once for
// each Launch; whoever adopts a process uses Wait.
func (p *Process) Reap() error {
	_, err := p.child.Wait()
	return err
}

// Alive tells whether the process still runs. One that ended and was not reaped yet does not.
func (p *Process) Alive() (bool, error) {
	boot, err := BootID()
	if err != nil {
		return false, err
	}
	if p.PID <= 0 || p.BootID != boot {
		return false, nil
	}
	stat, err := readStat(p.PID)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return stat.start == p.StartTime && stat.state != 'Z' && stat.state != 'X', nil
}

// open returns a pidfd of the process, or -1 if it is gone.
func (p *Process) open() (int, error) {
	if p.PID <= 0 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd of %d: %w", p.PID, err)
	}
	// The pid may have been another's before it was opened; from now on the fd is bound to one process.
	alive, err := p.Alive()
	if err != nil || !alive {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Wait returns when the process is gone, or with ctx's error.
func (p *Process) Wait(ctx context.Context) error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	// The eventfd is closed only after the callback can no longer write to it.
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-fired
		}
		unix.Close(wake)
	}()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("wait for %d: %w", p.PID, err)
		case fds[0].Revents != 0:
			return nil
		default:
			return ctx.Err()
		}
	}
}

// killTimeout bounds the wait for a killed process: only a hung device or file system keeps it longer.
const killTimeout = 10 * time.Second

// Doom ends the process at once, but does not wait for it. The first process of a pid namespace is not gone before
// all that were launched beneath it are reaped, which may take whoever is their parent some time.
func (p *Process) Doom() error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", p.PID, err)
	}
	return nil
}

// Kill ends the process at once and returns when it is gone; one that is gone already is success.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.Doom(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	return p.Wait(ctx)
}

type stat struct {
	state  byte
	kernel bool // a thread of the kernel
	start  uint64
}

// kernelThread is PF_KTHREAD among the flags of a task (include/linux/sched.h).
const kernelThread = 0x00200000

// readStat reads /proc/PID/stat: the name in parentheses may hold anything, so fields are counted from
// its last parenthesis.
func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return stat{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	flags, err := strconv.ParseUint(string(fields[6]), 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return stat{state: fields[0][0], kernel: flags&kernelThread != 0, start: start}, nil
}
