//go:build linux

// Command guest is the whole user space of the machines that the driver tests boot: an /init that
// brings up the network and answers one-line commands over TCP. It owns nothing outside such a guest,
// and is never part of a product image.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Port is where it listens.
const port = 7

type machine struct {
	ticks atomic.Int64

	mu      sync.Mutex
	pattern []byte
	seed    byte
	cleared bool
}

func main() {
	if i := slices.Index(os.Args, "look-around"); i >= 0 {
		lookAround(os.Args[i+1:])
		return
	}
	if err := boot(); err != nil {
		fmt.Println("guest: boot failed:", err)
		powerOff()
	}
	m := &machine{}
	go m.tick()
	ln, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		fmt.Println("guest: cannot listen:", err)
		powerOff()
	}
	fmt.Println("guest: ready")
	for {
		conn, err := ln.Accept()
		if err != nil {
			continue
		}
		go m.serve(conn)
	}
}

// tick counts so that a test can see whether time passes in here.
func (m *machine) tick() {
	for range time.Tick(time.Millisecond) {
		m.ticks.Add(1)
	}
}

func (m *machine) serve(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewScanner(conn)
	for in.Scan() {
		answer, err := m.command(strings.Fields(in.Text()))
		if err != nil {
			answer = "error " + err.Error()
		}
		if _, err := fmt.Fprintln(conn, strings.ReplaceAll(answer, "\n", " ")); err != nil {
			return
		}
	}
}

func (m *machine) command(words []string) (string, error) {
	if len(words) == 0 {
		return "", errors.New("empty command")
	}
	args := words[1:]
	switch words[0] {
	case "ping":
		return "pong", nil
	case "ticks":
		return strconv.FormatInt(m.ticks.Load(), 10), nil
	case "fill": // seed MiB
		return m.fill(args)
	case "clear":
		return m.clear()
	case "check":
		return m.check()
	case "flood": // KiB
		return flood(args)
	case "disk": // write text|read|size
		return disk(args)
	case "drop":
		return m.drop()
	case "cache": // MiB
		return cacheDisk(args)
	case "load": // KiB in all, KiB at a time
		return loadDisk(args)
	case "dial": // network address
		return dial(args)
	case "cpus":
		return cpus()
	case "memory":
		return memory()
	case "random":
		return random()
	case "copies":
		return copies()
	case "poweroff":
		go powerOff()
		return "ok", nil
	}
	return "", fmt.Errorf("unknown command %q", words[0])
}

func number(args []string, i int) (int, error) {
	if i >= len(args) {
		return 0, errors.New("argument is missing")
	}
	return strconv.Atoi(args[i])
}

func (m *machine) fill(args []string) (string, error) {
	seed, err := number(args, 0)
	if err != nil {
		return "", err
	}
	mib, err := number(args, 1)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.pattern) != mib<<20 { // the machine is small: what is there is used again
		m.pattern = make([]byte, mib<<20)
	}
	m.seed, m.cleared = byte(seed), false
	for i := range m.pattern {
		m.pattern[i] = m.seed ^ byte(i) ^ byte(i>>12)
	}
	return "ok", nil
}

// clear fills the memory of the pattern with zeroes; its seed is then 0.
func (m *machine) clear() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seed, m.cleared = 0, true
	clear(m.pattern)
	return "ok", nil
}

// drop gives the memory of the pattern back to the kernel.
func (m *machine) drop() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pattern, m.seed, m.cleared = nil, 0, false
	debug.FreeOSMemory()
	return "ok", nil
}

// check tells the seed of the pattern that is in memory, or that it is damaged.
func (m *machine) check() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, b := range m.pattern {
		want := m.seed ^ byte(i) ^ byte(i>>12)
		if m.cleared {
			want = 0
		}
		if b != want {
			return "", fmt.Errorf("pattern is damaged at %d", i)
		}
	}
	return fmt.Sprintf("%d %d", m.seed, len(m.pattern)>>20), nil
}

func flood(args []string) (string, error) {
	kib, err := number(args, 0)
	if err != nil {
		return "", err
	}
	line := []byte(strings.Repeat("flood ", 170) + "\n")
	for n := 0; n < kib<<10; n += len(line) {
		if _, err := os.Stdout.Write(line); err != nil {
			return "", err
		}
	}
	fmt.Println("guest: end of flood")
	return "ok", nil
}

func disk(args []string) (string, error) {
	if len(args) < 1 {
		return "", errors.New("read, write or size")
	}
	f, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DSYNC, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if args[0] == "size" {
		size, err := f.Seek(0, io.SeekEnd)
		return strconv.FormatInt(size, 10), err
	}
	block := make([]byte, 512)
	if args[0] == "write" {
		copy(block, strings.Join(args[1:], " "))
		_, err = f.WriteAt(block, 4096)
		return "ok", err
	}
	if _, err = f.ReadAt(block, 4096); err != nil {
		return "", err
	}
	return strings.TrimRight(string(block), "\x00"), nil
}

// cacheDisk reads the start of the disk, which then is in the kernel's page cache.
func cacheDisk(args []string) (string, error) {
	mib, err := number(args, 0)
	if err != nil {
		return "", err
	}
	f, err := os.Open("/dev/vda")
	if err != nil {
		return "", err
	}
	defer f.Close()
	n, err := io.CopyN(io.Discard, f, int64(mib)<<20)
	return strconv.FormatInt(n>>20, 10), err
}

// loadDisk writes to the disk past every cache of the guest, again and again over its first MiB but one page.
func loadDisk(args []string) (string, error) {
	total, err := number(args, 0)
	if err != nil {
		return "", err
	}
	at, err := number(args, 1)
	if err != nil {
		return "", err
	}
	f, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	block, err := unix.Mmap(-1, 0, at<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return "", err
	}
	defer func() { _ = unix.Munmap(block) }()
	const first, last = 64 << 10, 1 << 20
	offset := int64(first)
	for n := 0; n < total; n += at {
		if offset+int64(len(block)) > last {
			offset = first
		}
		if _, err := f.WriteAt(block, offset); err != nil {
			return "", err
		}
		offset += int64(len(block))
	}
	return "ok", nil
}

func dial(args []string) (string, error) {
	if len(args) != 2 {
		return "", errors.New("network and address")
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), args[0], args[1])
	if err != nil {
		return "", err
	}
	return "ok", conn.Close()
}

func cpus() (string, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	return strconv.Itoa(strings.Count(string(b), "processor\t")), err
}

func memory() (string, error) {
	var si unix.Sysinfo_t
	err := unix.Sysinfo(&si)
	return strconv.FormatUint(si.Totalram*uint64(si.Unit)>>20, 10), err
}

func random() (string, error) {
	b, err := os.ReadFile("/sys/class/misc/hw_random/rng_current")
	return strings.TrimSpace(string(b)), err
}

// copies counts how often the kernel has learnt, by the VM generation id, that it is a copy.
func copies() (string, error) {
	log := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, log)
	if err != nil {
		return "", err
	}
	return strconv.Itoa(strings.Count(string(log[:n]), "crng reseeded due to virtual machine fork")), nil
}

// powerOff ends the VM. A reset does that on every VMM; Firecracker's machine has nothing to switch it off with.
func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
