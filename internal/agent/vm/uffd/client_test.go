//go:build linux

package uffd

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a VMM asks of its userfaultfd (include/uapi/linux/userfaultfd.h).
const (
	ioctlAPI      = 0xC018AA3F // UFFDIO_API
	ioctlRegister = 0xC020AA00 // UFFDIO_REGISTER
	apiVersion    = 0xAA
	featureRemove = 1 << 3 // UFFD_FEATURE_EVENT_REMOVE
	modeMissing   = 1
)

// clientMain is a program that has its memory served as a VMM does: argument 0 is the socket, 1 the pages of each of
// its two regions. It then does what it is told at descriptor 3, line by line, and at the end of that lives on.
func clientMain(args []string) error {
	debug.SetGCPercent(-1) // the collector must not touch what is served
	pages, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	c := &client{pages: pages}
	if err := c.share(args[0]); err != nil {
		return err
	}
	control := os.NewFile(3, "control")
	for in := bufio.NewScanner(control); in.Scan(); {
		answer, err := c.command(strings.Fields(in.Text()))
		if err != nil {
			answer = "error " + err.Error()
		}
		if _, err := fmt.Fprintln(control, answer); err != nil {
			return err
		}
	}
	for {
		time.Sleep(time.Hour)
	}
}

type client struct {
	pages   int // of a region
	regions [2][]byte
	conn    *net.UnixConn
}

func (c *client) share(socket string) error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	u := userfault(fd)
	api := [3]uint64{apiVersion, featureRemove}
	if err := u.ioctl(ioctlAPI, unsafe.Pointer(&api)); err != nil {
		return fmt.Errorf("api: %w", err)
	}
	type mapping struct {
		Base   uint64 `json:"base_host_virt_addr"`
		Size   int    `json:"size"`
		Offset int    `json:"offset"`
		Page   int    `json:"page_size"`
		KiB    int    `json:"page_size_kib"`
	}
	var said []mapping
	for i := range c.regions {
		m, err := unix.Mmap(-1, 0, c.pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		_ = unix.Madvise(m, unix.MADV_NOHUGEPAGE)
		c.regions[i] = m
		base := uint64(uintptr(unsafe.Pointer(&m[0])))
		register := [4]uint64{base, uint64(len(m)), modeMissing}
		if err := u.ioctl(ioctlRegister, unsafe.Pointer(&register)); err != nil {
			return fmt.Errorf("register: %w", err)
		}
		said = append(said, mapping{base, len(m), i * len(m), pageSize, pageSize})
	}
	raw, err := json.Marshal(said)
	if err != nil {
		return err
	}
	if c.conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"}); err != nil {
		return err
	}
	_, _, err = c.conn.WriteMsgUnix(raw, unix.UnixRights(int(fd)), nil)
	return err
}

func (c *client) page(word string) ([]byte, error) {
	n, err := strconv.Atoi(word)
	if err != nil || n < 0 || n >= 2*c.pages {
		return nil, fmt.Errorf("page %q: %w", word, err)
	}
	return c.regions[n/c.pages][n%c.pages*pageSize:][:pageSize], nil
}

func (c *client) command(words []string) (string, error) {
	switch words[0] {
	case "present":
		return c.present()
	case "crowd":
		return c.crowd()
	}
	page, err := c.page(words[1])
	if err != nil {
		return "", err
	}
	switch words[0] {
	case "read": // the number that the whole page is full of
		first := binary.NativeEndian.Uint64(page)
		for at := 0; at < pageSize; at += 8 {
			if binary.NativeEndian.Uint64(page[at:]) != first {
				return "", errors.New("torn")
			}
		}
		return strconv.FormatUint(first, 10), nil
	case "write":
		n, err := strconv.ParseUint(words[2], 10, 64)
		fillPage(page, n)
		return "ok", err
	case "remove":
		return "ok", unix.Madvise(page, unix.MADV_DONTNEED)
	}
	return "", fmt.Errorf("unknown command %q", words)
}

// crowd has many threads read all pages at once, each in an order of its own, and write some of them.
func (c *client) crowd() (string, error) {
	const threads = 16
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(threads)) // who waits for a page keeps its processor
	total := 2 * c.pages
	wrong := make(chan string, threads)
	var wg sync.WaitGroup
	for thread := range threads {
		wg.Go(func() {
			for i, n := range rand.Perm(total) {
				page := c.regions[n/c.pages][n%c.pages*pageSize:][:pageSize]
				if got := binary.NativeEndian.Uint64(page[8:]); strconv.FormatUint(got, 10) != content(n) {
					wrong <- fmt.Sprintf("page %d is %d", n, got)
					return
				}
				if i%7 == thread%7 { // where no other looks
					page[pageSize-1-thread] = byte(thread)
				}
			}
		})
	}
	wg.Wait()
	close(wrong)
	return "ok" + <-wrong, nil
}

func fillPage(page []byte, n uint64) {
	for at := 0; at < pageSize; at += 8 {
		binary.NativeEndian.PutUint64(page[at:], n)
	}
}

// present lists the pages that are in memory, as the kernel tells without touching them (bit 63 of /proc/PID/pagemap).
func (c *client) present() (string, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return "", err
	}
	defer f.Close()
	var all []string
	for i, region := range c.regions {
		entries := make([]byte, c.pages*8)
		if _, err := f.ReadAt(entries, int64(uintptr(unsafe.Pointer(&region[0]))/pageSize*8)); err != nil {
			return "", err
		}
		for p := range c.pages {
			if binary.NativeEndian.Uint64(entries[p*8:])>>63 == 1 {
				all = append(all, strconv.Itoa(i*c.pages+p))
			}
		}
	}
	return strings.Join(all, " "), nil
}
