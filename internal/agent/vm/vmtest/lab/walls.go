//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// Reached is what the suite's guest tells of a place in which it looked around (vmtest/guest, walls.go).
type Reached struct {
	Opened, Written, Processes, Connected, Gained []string
}

// temptations are paths that a VMM has no business with.
func temptations() []string {
	return []string{
		"/", "/etc", "/etc/passwd", "/etc/shadow", "/etc/ld.so.cache", "/root", "/home", "/tmp", "/var", "/var/lib/wrenn", "/var/log", "/sys",
		"/sys/kernel", "/sys/fs/cgroup", "/run", "/run/netns", "/run/systemd", "/usr", "/usr/bin", "/usr/bin/env", "/usr/lib", "/lib",
		"/proc/1/environ", "/proc/1/root", "/proc/kcore", "/proc/sys", "/proc/sysrq-trigger", "/proc/mounts", "/proc/net/tcp",
		"/dev", "/dev/null", "/dev/zero", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/loop0", "/dev/loop-control", "/dev/fuse",
		"/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/urandom", "/dev/userfaultfd", "/dev/shm", "/dev/pts/ptmx",
	}
}

// Walls puts a program in the place of a VMM, and root of a guest in a VM, and has both look for what they can reach:
// files, devices and processes of the host, files and sockets of another VM, ports of the host, link-local addresses.
// place is how the driver would start its VMM for this Config, but with the program at a path; may are the paths
// that the place has to have.
func (l *Lab) Walls(t *testing.T, driver vm.Driver, place func(cfg vm.Config, program string) vmproc.Spec, may ...string) {
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(2*time.Minute))
	defer cancel()
	port := listenEverywhere(t)
	neighbour := l.Config(t)
	h, err := driver.Start(ctx, neighbour)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := driver.Destroy(context.WithoutCancel(ctx), h); err != nil {
			t.Error(err)
		}
	}()
	l.answers(ctx, t, neighbour, "ping", "pong")
	addresses := []string{
		"127.0.0.1:" + port, network.GatewayIP + ":" + port, network.GatewayIP + ":53", network.GatewayIP + ":22",
		"169.254.169.254:80", "10.0.0.1:" + port, "192.168.0.1:80",
	}

	t.Run("in the VMM's place", func(t *testing.T) {
		asked := append(temptations(), l.Dir, neighbour.Dir, neighbour.Disks[0].Path, neighbour.MemoryFile, h.Socket)
		r := l.lookAround(ctx, t, place, asked, addresses)
		for _, path := range append(r.Opened, r.Written...) {
			if !slices.Contains(may, path) {
				t.Errorf("%s can be reached", path)
			}
		}
		for what, list := range map[string][]string{"processes": r.Processes, "addresses": r.Connected, "calls": r.Gained} {
			if len(list) > 0 {
				t.Errorf("%s that can be reached: %v", what, list)
			}
		}
		t.Logf("opened %v, written in %v", r.Opened, r.Written)
	})
	t.Run("as root in the guest", func(t *testing.T) {
		for _, address := range addresses {
			answer, err := l.Ask(ctx, neighbour, "dial tcp "+address)
			if err != nil || answer == "ok" {
				t.Errorf("%s: the guest says %q, %v", address, answer, err)
			}
		}
	})
}

// listenEverywhere opens a port on all addresses of the host, for others to try.
func listenEverywhere(t *testing.T) (port string) {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	_, port, err = net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func (l *Lab) lookAround(ctx context.Context, t *testing.T, place func(vm.Config, string) vmproc.Spec, paths, addresses []string) Reached {
	t.Helper()
	guest, err := vmtest.BuildGuest(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// The jailer copies its program, which must be named for what it is.
	program := filepath.Join(t.TempDir(), "firecracker-look-around")
	raw, err := os.ReadFile(guest)
	if err == nil {
		err = os.WriteFile(program, raw, 0o755) //nolint:gosec // a program
	}
	if err != nil {
		t.Fatal(err)
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	spec := place(l.Config(t), program)
	spec.Stdout = theirs
	spec.Args = append(spec.Args, "look-around")
	for _, path := range paths {
		spec.Args = append(spec.Args, "FILE:"+path)
	}
	for _, address := range addresses {
		spec.Args = append(spec.Args, "DIAL:tcp,"+address)
	}
	p, err := vmproc.Launch(spec)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Reap(); err != nil {
			t.Error(err)
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = p.Kill(context.WithoutCancel(ctx)) })()
	said, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	var r Reached
	if err := json.Unmarshal(said, &r); err != nil {
		t.Fatalf("%v in %q", err, said)
	}
	return r
}
