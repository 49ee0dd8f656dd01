package boot

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Identity is what makes one guest different from every other, also from the one it was copied from.
// Fields that are zero stay as they are.
type Identity struct {
	Hostname    string
	MachineID   string // 32 hexadecimal digits
	Entropy     []byte
	Time        time.Time
	Nameservers []netip.Addr
	DiskBytes   int64 // the size of the root disk; its file system is grown to it
}

// Assume makes the guest that one. It goes on after a failure and returns all of them.
func Assume(id Identity) error {
	var failed error
	try := func(what string, err error) {
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", what, err))
		}
	}
	// Randomness first: everything after it may need some.
	if len(id.Entropy) > 0 {
		try("entropy", credit(id.Entropy))
	}
	if !id.Time.IsZero() {
		try("clock", setClock(id.Time))
	}
	if id.Hostname != "" {
		try("host name", setHostname(id.Hostname))
	}
	if id.MachineID != "" {
		if old, _ := os.ReadFile("/etc/machine-id"); strings.TrimSpace(string(old)) != id.MachineID { // another machine than before
			try("machine id", replaceFile("/etc/machine-id", id.MachineID+"\n", 0o444))
			try("SSH host keys", newHostKeys("/etc/ssh", "/run/sshd.pid"))
		}
	}
	if len(id.Nameservers) > 0 {
		try("resolvers", setResolvers(id.Nameservers))
	}
	if id.DiskBytes > 0 {
		try("grow the root file system", growRoot("/dev/vda", id.DiskBytes))
	}
	return failed
}

// credit adds entropy to the kernel's pool, has it counted, and reseeds the generator from it at once
// (random(4), RNDADDENTROPY and RNDRESEEDCRNG).
func credit(entropy []byte) error {
	const rndAddEntropy, rndReseedCRNG = 0x40085203, 0x5207
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info { int entropy_count; int buf_size; __u32 buf[0]; }
	info := make([]byte, 8+len(entropy))
	binary.NativeEndian.PutUint32(info, uint32(len(entropy)*8))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(entropy)))
	copy(info[8:], entropy)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("add: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed: %w", errno)
	}
	return nil
}

// setHostname sets the name now, for the next boot, and so that it resolves (sudo looks it up).
func setHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := replaceFile("/etc/hostname", name+"\n", 0o644); err != nil {
		return err
	}
	raw, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return replaceFile("/etc/hosts", hostsWith(string(raw), name), 0o644)
}

// hostsWith gives an /etc/hosts in which 127.0.1.1 is name and nothing else is changed.
func hostsWith(hosts, name string) string {
	var b strings.Builder
	for line := range strings.Lines(hosts) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == "127.0.1.1" {
			continue
		}
		b.WriteString(strings.TrimRight(line, "\n") + "\n")
	}
	if hosts == "" {
		b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	}
	return b.String() + "127.0.1.1 " + name + "\n"
}

// restoreHostname gives the kernel the name in /etc/hostname at boot.
func restoreHostname() error {
	raw, err := os.ReadFile("/etc/hostname")
	if err != nil {
		return err
	}
	return unix.Sethostname([]byte(strings.TrimSpace(string(raw))))
}

// keygenTimeout bounds the making of SSH host keys; an RSA key takes seconds where the CPU is emulated.
const keygenTimeout = 20 * time.Second

// newHostKeys replaces the keys by which an SSH server proves who it is, in a guest that has any: a clone
// must not be able to pass for the one it was copied from. A server that runs is told to read the new ones.
func newHostKeys(dir, pidFile string) error {
	old, err := filepath.Glob(filepath.Join(dir, "ssh_host_*_key*"))
	if err != nil || len(old) == 0 {
		return err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	// -A makes one of each kind that is missing, in the etc/ssh below the -f prefix.
	prefix := filepath.Dir(filepath.Dir(dir))
	ctx, cancel := context.WithTimeout(context.Background(), keygenTimeout)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "ssh-keygen", "-A", "-f", prefix).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	raw, err := os.ReadFile(pidFile)
	if err != nil {
		return nil //nolint:nilerr // no server runs
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid <= 1 {
		return nil //nolint:nilerr // nor does it
	}
	return unix.Kill(pid, unix.SIGHUP)
}
