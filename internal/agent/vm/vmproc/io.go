//go:build linux

package vmproc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the controller for disks. It bounds what a VMM does to them, also one that a guest has taken over; it is used
// where it is. In v1 it does not see writes that the kernel does later, by itself.
const (
	ioV2 = "io"
	ioV1 = "blkio"
)

// IO is what a cgroup may do to a disk of the host, in each direction; 0 is no limit.
type IO struct {
	Device                 string // major:minor, of a whole disk; "" is none
	BytesPerSec, OpsPerSec int64
}

// NewIO is a limit of the disk that a file is on.
func NewIO(path string, bytesPerSec, opsPerSec int64) (IO, error) {
	if bytesPerSec == 0 && opsPerSec == 0 {
		return IO{}, nil
	}
	device, err := deviceOf(path)
	return IO{device, bytesPerSec, opsPerSec}, err
}

// deviceOf is the disk that a file is on, "" for a file system that is on none, or on several.
func deviceOf(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	node, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(node, "partition")); err == nil {
		node = filepath.Dir(node)
	}
	b, err := os.ReadFile(filepath.Join(node, "dev"))
	return strings.TrimSpace(string(b)), err
}

// limitIO sets, or takes away, the limit of a disk.
func (c *Cgroup) limitIO(l IO) error {
	if c.h.io == "" || l.Device == "" {
		return nil
	}
	dir := c.Path(c.h.io)
	values := map[string]string{}
	if c.h.io == ioV2 {
		values["io.max"] = fmt.Sprintf("%s rbps=%s wbps=%[2]s riops=%s wiops=%[3]s", l.Device, orMax(l.BytesPerSec), orMax(l.OpsPerSec))
	} else {
		for _, way := range []string{"read", "write"} {
			values["blkio.throttle."+way+"_bps_device"] = fmt.Sprintf("%s %d", l.Device, l.BytesPerSec)
			values["blkio.throttle."+way+"_iops_device"] = fmt.Sprintf("%s %d", l.Device, l.OpsPerSec)
		}
	}
	for file, value := range values {
		// A kernel may have the controller and not this part of it.
		if err := set(filepath.Join(dir, file), value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("limit %s of the cgroup to %q: %w", file, value, err)
		}
	}
	return nil
}

func orMax(n int64) string {
	if n == 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}
