// Package boot brings a guest up and down: the stage in the initramfs (modules, root file system), the
// init of the guest (mounts, network, zombies, the guest agent as a child that is restarted when it
// ends, power off) and the identity that the host gives it. Init runs as pid 1; what it needs to know is
// on the kernel's command line. It starts no service but the guest agent.
//
//	kernel ─► /init in the initramfs: modules, mount root, switch ─► /usr/local/bin/envd as pid 1
//	       ─► child: envd, the agent (restarted if it ends)   SIGTERM to pid 1: power off
package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Self is where every image has this program.
const Self = "/usr/local/bin/envd"

// Open files of a process, as a service manager would set them: the soft limit is what programs that
// close every possible descriptor can still loop over.
const (
	softFiles = 64 << 10
	hardFiles = 1 << 20
)

// Init is pid 1. It returns only if the guest cannot be brought up; the kernel then panics, which ends
// the VM (panic=-1).
func Init(console io.Writer) error {
	started := time.Now()
	if err := mountAll(earlyMounts()); err != nil {
		return err
	}
	raw, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	cmdline := parseCmdline(string(raw))
	if _, err := os.Stat(modulesDir); err == nil {
		return initramfs(cmdline)
	}
	return system(cmdline, started, console)
}

// system is init proper, on the real root. Only what makes the guest unusable is fatal.
func system(cmdline map[string]string, started time.Time, console io.Writer) error {
	complain := func(what string, err error) {
		if err != nil {
			fmt.Fprintf(console, "init: %s: %v\n", what, err)
		}
	}
	complain("mounts", mountAll(lateMounts()))
	complain("root file system", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RELATIME, ""))
	complain("grow the root file system", growRoot(cmdline["root"], 0))
	complain("device links", linkDevices())
	complain("host name", restoreHostname())
	complain("network", configureNetwork(cmdline))
	complain("kernel settings", setSysctls())
	complain("limit of open files", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: softFiles, Max: hardFiles}))
	unix.Umask(0o022)
	fmt.Fprintf(console, "wrenn: init %d ms, kernel %s\n", time.Since(started).Milliseconds(), uptime())
	return supervise(console)
}

// setSysctls raises limits that are made for machines shared by many users; here one user has them all.
func setSysctls() error {
	var failed error
	for path, value := range map[string]string{
		"/proc/sys/fs/inotify/max_user_instances": "1024",
		"/proc/sys/fs/inotify/max_user_watches":   "524288",
		"/proc/sys/kernel/printk":                 "3 4 1 3", // the console is for what ends the guest
	} {
		failed = errors.Join(failed, os.WriteFile(path, []byte(value), 0))
	}
	return failed
}

// parseCmdline gives the words of a kernel command line; a word without "=" maps to "". The last wins.
func parseCmdline(raw string) map[string]string {
	words := map[string]string{}
	for _, w := range strings.Fields(raw) {
		k, v, _ := strings.Cut(w, "=")
		words[k] = v
	}
	return words
}

func uptime() string {
	raw, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return "?"
	}
	up, _, _ := strings.Cut(string(raw), " ")
	return up + " s"
}
