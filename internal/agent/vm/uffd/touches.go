//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A file of touches lists the blocks of a memory file in the order in which a VM first touched them: a header, then
// numbers of blocks. It is a hint, so it need not survive anything: one that is cut off is as good as none.
const (
	touchesMagic  = "wrenn-touches-1\n"
	touchesHeader = len(touchesMagic) + 16 // size of the memory file, 8 bytes; number of blocks, 4; CRC of them, 4
	numberBytes   = 4
)

// What is noted ends with this much time of activity, or with this part of all blocks: what a VM does first is what
// the next one will do, and what it does later is not.
const (
	noteFor     = 5 * time.Second
	noteGap     = 100 * time.Millisecond // a longer silence counts as this: a VM may stand still for days
	noteDivisor = 4
	saveAfter   = time.Second // of silence
)

// touches notes the order of first touches.
type touches struct {
	file   *os.File
	memory uint64 // size of the memory file
	blocks []uint32
	saved  int
	active time.Duration
	last   time.Time
}

func (t *touches) add(block uint64) {
	if t.over() {
		return
	}
	now := time.Now()
	if !t.last.IsZero() {
		t.active += min(now.Sub(t.last), noteGap)
	}
	t.last = now
	t.blocks = append(t.blocks, uint32(block)) //nolint:gosec // the file has fewer
}

func (t *touches) over() bool {
	return t.active >= noteFor || uint64(len(t.blocks)) >= mostTouches(t.memory)
}

// unsaved tells whether there is anything to be saved.
func (t *touches) unsaved() bool { return t != nil && len(t.blocks) > t.saved }

// save writes what was noted.
func (t *touches) save() error {
	if !t.unsaved() {
		return nil
	}
	t.saved = len(t.blocks)
	b := make([]byte, touchesHeader, touchesHeader+len(t.blocks)*numberBytes)
	for _, block := range t.blocks {
		b = binary.LittleEndian.AppendUint32(b, block)
	}
	head := b[copy(b, touchesMagic):]
	binary.LittleEndian.PutUint64(head, t.memory)
	binary.LittleEndian.PutUint32(head[8:], uint32(len(t.blocks))) //nolint:gosec // fewer than a file has
	binary.LittleEndian.PutUint32(head[12:], crc32.ChecksumIEEE(b[touchesHeader:]))
	if _, err := t.file.WriteAt(b, 0); err != nil {
		return fmt.Errorf("write the touches: %w", err)
	}
	return nil
}

func mostTouches(memory uint64) uint64 { return blocksOf(memory) / noteDivisor }

// readTouches reads a file of touches of a memory file of this size.
func readTouches(f io.ReaderAt, memory uint64) ([]uint32, error) {
	most := mostTouches(memory)
	raw, err := io.ReadAll(io.NewSectionReader(f, 0, int64(touchesHeader)+int64(most)*numberBytes)) //nolint:gosec // RAM of a VM
	if err != nil {
		return nil, err
	}
	if len(raw) < touchesHeader || string(raw[:len(touchesMagic)]) != touchesMagic {
		return nil, errors.New("no file of touches")
	}
	head, rest := raw[len(touchesMagic):touchesHeader], raw[touchesHeader:]
	size, n, sum := binary.LittleEndian.Uint64(head), binary.LittleEndian.Uint32(head[8:]), binary.LittleEndian.Uint32(head[12:])
	if size != memory || n == 0 || uint64(n) > most || uint64(len(rest)) < uint64(n)*numberBytes {
		return nil, errors.New("touches of another memory file, or cut off")
	}
	rest = rest[:n*numberBytes]
	if crc32.ChecksumIEEE(rest) != sum {
		return nil, errors.New("damaged touches")
	}
	blocks := make([]uint32, n)
	for i := range blocks {
		if blocks[i] = binary.LittleEndian.Uint32(rest[i*numberBytes:]); uint64(blocks[i]) >= blocksOf(memory) {
			return nil, errors.New("touches beyond the memory file")
		}
	}
	return blocks, nil
}

// openTouches opens the file of touches at a path: for reading if it has some; else for writing, if no other VM is
// noting its touches there. Otherwise there is none.
func openTouches(path string, memory uint64) (f *os.File, write bool) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false // a full disk, say
	}
	if _, err := readTouches(f, memory); err == nil {
		return f, false
	}
	// The lock belongs to what is opened here, which only the page server keeps: it ends with that.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, false
	}
	return f, true
}
