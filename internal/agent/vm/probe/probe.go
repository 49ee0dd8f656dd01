// Package probe has what drivers need to find out, by booting our kernel, whether a VMM works on this host,
// and to remember it. It must not know a VMM.
package probe

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Booted looks for lines that only a kernel prints which set up memory, interrupts and timers, and came to
// starting user space.
func Booted(console []byte) bool {
	return bytes.Contains(console, []byte("as init process")) ||
		bytes.Contains(console, []byte("VFS: Unable to mount root"))
}

func hashFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// OpenDevice tells whether a device opens for reading and writing.
func OpenDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// format of what is kept: what an agent wrote in another one is found out anew.
const format = "2"

// Key names everything that a verdict depends on: the host, the device, the files, and what else is said.
func Key(device string, files []string, more ...string) (string, error) {
	sum := sha256.New()
	for _, path := range files {
		if path == "" {
			continue
		}
		if err := hashFile(sum, path); err != nil {
			return "", wrenn.Wrap(err, wrenn.KindInvalidRequest, "cannot read %s; set AGENT_KERNEL_PATH (and AGENT_INITRD_PATH) to a guest kernel", path)
		}
	}
	host, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", wrenn.Wrap(err, wrenn.KindInternal, "cannot tell the host's kernel")
	}
	// The device may come and go, or change its owner, without the host being started again.
	fmt.Fprintf(sum, "%s %q %s %s %v", format, more, host, HostCPU(), OpenDevice(device))
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// Retry is how long a verdict holds that something does not work: a busy host can spoil a test boot, and what was
// wrong may have been mended. It does not outlive the host's boot.
const Retry = 6 * time.Hour

// RetryWords tell people when a verdict is looked into again.
const RetryWords = "it is tried again when the agent starts after the host's next boot or six hours, and at once by `wrenn-agent doctor --again`"

type cached[V any] struct {
	Key     string `json:"key"`
	Verdict V      `json:"verdict"`
	// Only where it is that something does not work:
	Boot  string    `json:"boot,omitempty"`
	Until time.Time `json:"until,omitzero"`
}

// Cached is the verdict that was kept in a file under this key, if it still holds. A file named "" keeps nothing.
func Cached[V any](path, key string) (verdict V, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return verdict, false
	}
	var c cached[V]
	if json.Unmarshal(b, &c) != nil || c.Key != key {
		return verdict, false
	}
	if c.Until.IsZero() {
		return c.Verdict, c.Boot == ""
	}
	// A clock that was set back must not make it hold for ever.
	boot, err := vmproc.BootID()
	left := time.Until(c.Until)
	return c.Verdict, err == nil && boot == c.Boot && left > 0 && left <= Retry
}

// Keep keeps a verdict for Cached: that something works for as long as the key fits, that it does not for Retry.
func Keep[V any](path, key string, works bool, verdict V) error {
	if path == "" {
		return nil
	}
	c := cached[V]{Key: key, Verdict: verdict}
	if !works {
		boot, err := vmproc.BootID()
		if err != nil {
			return err
		}
		c.Boot, c.Until = boot, time.Now().UTC().Add(Retry)
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// HostCPU names the CPU that a snapshot taken with KVM is bound to.
func HostCPU() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "host:unknown"
	}
	first, _, _ := strings.Cut(string(b), "\n\n")
	value := map[string]string{}
	for line := range strings.Lines(first) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			value[strings.TrimSpace(k)] = strings.TrimSpace(v)
		}
	}
	return fmt.Sprintf("host:%s-%s-%s", value["vendor_id"], value["cpu family"], value["model"])
}
