package boot

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Machine is the guest as the agent may change it: who it is, its root file system, its power.
type Machine struct{}

// Ioctls of linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// Assume makes the guest the one that id says.
func (Machine) Assume(id Identity) error { return Assume(id) }

// PowerOff asks init to end everything and switch off.
func (Machine) PowerOff() error { return unix.Kill(1, unix.SIGTERM) }

// FreezeFS writes everything to the disk and blocks all writes of the root file system until ThawFS. A
// frozen one stays frozen.
func (Machine) FreezeFS() error { return rootIoctl(fiFreeze, unix.EBUSY) }

// AdvanceClock sets the clock unless it is later already.
func (Machine) AdvanceClock(to time.Time) error {
	if !time.Now().Before(to) {
		return nil
	}
	return setClock(to)
}

func setClock(to time.Time) error {
	ts := unix.NsecToTimespec(to.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// ThawFS allows writes again; without a freeze before it does nothing.
func (Machine) ThawFS() error { return rootIoctl(fiThaw, unix.EINVAL) }

func rootIoctl(req uint, harmless unix.Errno) error {
	root, err := os.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.IoctlSetInt(int(root.Fd()), req, 0); err != nil && !errors.Is(err, harmless) {
		return err
	}
	return nil
}
