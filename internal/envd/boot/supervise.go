package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// restartPause keeps an agent that fails at once from taking all of the CPU.
	restartPause = 200 * time.Millisecond
	// termGrace is how long processes may take to end when the guest powers off.
	termGrace = 2 * time.Second
)

// supervise runs the agent, collects every process that is orphaned to pid 1, and powers off when asked
// to: SIGTERM, SIGINT (Ctrl-Alt-Del) or SIGPWR.
func supervise(console io.Writer) error {
	// Channels of their own: a signal is dropped when its channel is full, and children end often.
	children, off := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	signal.Notify(off, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	agent, err := startAgent()
	if err != nil {
		return err
	}
	var restart <-chan time.Time
	for {
		select {
		case <-off:
			return powerOff(console)
		case <-children:
			if reap(agent) {
				fmt.Fprintln(console, "init: the guest agent ended; it is started again")
				restart = time.After(restartPause)
			}
		case <-restart:
			restart = nil
			if agent, err = startAgent(); err != nil {
				fmt.Fprintf(console, "init: start the guest agent: %v\n", err)
				restart = time.After(restartPause)
			}
		}
	}
}

// startAgent starts this program again as the agent. It is not waited for through package os, since pid 1
// collects all children alike.
func startAgent() (int, error) {
	attr := &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "GOTRACEBACK=single"},
		Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	}
	return syscall.ForkExec(Self, []string{"envd", "-guest"}, attr)
}

// reap collects all children that ended, and tells whether pid was one of them.
func reap(pid int) bool {
	seen := false
	for {
		got, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || got <= 0 {
			return seen
		}
		seen = seen || got == pid
	}
}

// powerOff ends all processes, writes everything to the disk and switches the machine off.
func powerOff(console io.Writer) error {
	fmt.Fprintln(console, "wrenn: power off")
	// A file system frozen for a snapshot would hold up everything below for ever.
	if err := (Machine{}).ThawFS(); err != nil {
		fmt.Fprintf(console, "init: thaw the root file system: %v\n", err)
	}
	_ = unix.Kill(-1, unix.SIGTERM) // ESRCH: nobody is left
	for deadline := time.Now().Add(termGrace); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
	}
	_ = unix.Kill(-1, unix.SIGKILL)
	unix.Sync()
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		fmt.Fprintf(console, "init: remount read-only: %v\n", err)
		unix.Sync()
	}
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
