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
	fmt.Fprintf(sum, "%q %s %s %v", more, host, HostCPU(), OpenDevice(device))
	return hex.EncodeToString(sum.Sum(nil)), nil
}

type cached[V any] struct {
	Key     string `json:"key"`
	Verdict V      `json:"verdict"`
}

// Cached is the verdict that was kept in a file under this key. A file named "" keeps nothing.
func Cached[V any](path, key string) (verdict V, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return verdict, false
	}
	var c cached[V]
	if json.Unmarshal(b, &c) != nil || c.Key != key {
		return verdict, false
	}
	return c.Verdict, true
}

// Keep keeps a verdict for Cached.
func Keep[V any](path, key string, verdict V) error {
	if path == "" {
		return nil
	}
	b, err := json.MarshalIndent(cached[V]{key, verdict}, "", "  ")
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
