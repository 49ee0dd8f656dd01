package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64) of the kernel's fs/ext4/ext4.h: grow the mounted
// file system to so many blocks.
const resizeFS = 0x40086610

// growTimeout bounds how long the kernel may take to notice that a device has grown.
const growTimeout = 5 * time.Second

// growRoot grows the root file system to the size of its device, if the device is larger. atLeast is
// the size in bytes that the device will have as soon as the kernel has handled its change, 0 if it
// does not change.
func growRoot(device string, atLeast int64) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := awaitSize(f, atLeast)
	if err != nil {
		return err
	}
	super := make([]byte, 1024)
	if _, err := f.ReadAt(super, 1024); err != nil {
		return err
	}
	have, blockSize, err := parseSuperblock(super)
	if err != nil {
		return err
	}
	want := uint64(size) / blockSize
	if want <= have {
		return nil
	}
	root, err := os.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), resizeFS, uintptr(unsafe.Pointer(&want))); errno != 0 {
		return fmt.Errorf("from %d to %d blocks of %d bytes: %w", have, want, blockSize, errno)
	}
	return nil
}

// awaitSize gives the device's size once it is at least so large. The kernel tells nobody but its log.
func awaitSize(f *os.File, atLeast int64) (int64, error) {
	for deadline := time.Now().Add(growTimeout); ; time.Sleep(2 * time.Millisecond) {
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil || size >= atLeast {
			return size, err
		}
		if time.Now().After(deadline) {
			return size, fmt.Errorf("the device has %d bytes, not the %d that were promised", size, atLeast)
		}
	}
}

// parseSuperblock reads the number and the size of blocks from an ext4 superblock (kernel document
// filesystems/ext4/super).
func parseSuperblock(b []byte) (blocks, blockSize uint64, err error) {
	if len(b) < 0x154 || binary.LittleEndian.Uint16(b[0x38:]) != 0xef53 {
		return 0, 0, errors.New("not an ext4 file system")
	}
	shift := binary.LittleEndian.Uint32(b[0x18:])
	if shift > 6 {
		return 0, 0, errors.New("impossible block size")
	}
	blocks = uint64(binary.LittleEndian.Uint32(b[0x4:]))
	const feature64bit = 0x80
	if binary.LittleEndian.Uint32(b[0x60:])&feature64bit != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(b[0x150:])) << 32
	}
	return blocks, 1024 << shift, nil
}
