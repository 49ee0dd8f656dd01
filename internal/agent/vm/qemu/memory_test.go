//go:build linux

package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestSharedMemoryCannotBeWritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "memory")
	want := make([]byte, 4<<20)
	copy(want[1<<20:], "in the middle")
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	var m sharedMemory
	first, err := m.open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	// As QEMU does it: open again for writing.
	again, err := os.OpenFile(fdPath(int(first.Fd())), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := again.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	if err := again.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate: %v", err)
	}
	if err := unix.Fallocate(int(again.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20); !errors.Is(err, unix.EPERM) {
		t.Errorf("punch a hole: %v", err)
	}
	if _, err := unix.Mmap(int(again.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("map it shared: %v", err)
	}
	b, err := unix.Mmap(int(again.Fd()), 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	if !bytes.Equal(b, want) {
		t.Error("the copy differs from the file")
	}
	second, err := m.open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if a, b := mustInode(t, first), mustInode(t, second); a != b {
		t.Errorf("two VMs of one snapshot map files %d and %d", a, b)
	}
}

func mustInode(t *testing.T, f *os.File) uint64 {
	t.Helper()
	n, err := inode(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSharedMemoryForgetsWhatWasReplacedOrIsOld(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var m sharedMemory
	open := func(name string) uint64 {
		t.Helper()
		f, err := m.open(t.Context(), filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return mustInode(t, f)
	}
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path+".new", []byte(content), 0o600), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		write(name, name)
	}
	was := open("a")
	write("a", "another")
	if open("a") == was {
		t.Error("a replaced file is still served as it was")
	}
	for _, name := range []string{"b", "c", "d", "e"} {
		open(name)
	}
	if len(m.cache) != sharedCopies {
		t.Errorf("%d copies are kept", len(m.cache))
	}
	if err := os.Remove(filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	open("e")
	if len(m.cache) != sharedCopies-1 {
		t.Errorf("the copy of a removed file is kept: %d", len(m.cache))
	}
}

func TestWriteSparseWritesZeroes(t *testing.T) {
	t.Parallel()
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old := bytes.Repeat([]byte{1}, 2<<20)
	if _, err := f.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	next := make([]byte, 1<<20)
	for page := range len(next) / pageSize {
		if rand.IntN(3) == 0 || page < 40 { // the beginning has long runs of neither
			next[page*pageSize+page%pageSize] = 7
		}
	}
	clear(next[512<<10 : 768<<10])
	if err := writeSparse(f, next, pageSize); err != nil {
		t.Fatal(err)
	}
	copy(old[pageSize:], next)
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, old) {
		t.Error("the file is not what was written")
	}
}

func TestMappings(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]struct {
		mapping
		inode uint64
		ok    bool
	}{
		"7f00a000-7f00c000 rw-p 00001000 fd:00 42                         /memory":                {mapping{0x7f00a000, 0x7f00c000, 0x1000}, 42, true},
		"7f00a000-7f00c000 rw-p 00000000 00:01 7                          /memfd:guest (deleted)": {mapping{0x7f00a000, 0x7f00c000, 0}, 7, true},
		"7f00a000-7f00c000 rw-s 00000000 fd:00 42                         /shared":                {},
		"7f00a000-7f00c000 rw-p 00000000 00:00 0 ":                                                {},
		"":        {},
		"x-y p z": {},
	} {
		if m, ino, ok := parseMapping(line); ok != want.ok || ok && (m != want.mapping || ino != want.inode) {
			t.Errorf("%q: %+v, %d, %v", line, m, ino, ok)
		}
	}
}

func TestOwnPages(t *testing.T) {
	t.Parallel()
	entries := func(values ...uint64) (b []byte) {
		for _, v := range values {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		return b
	}
	for name, c := range map[string]struct {
		entries []byte
		want    int64
	}{
		"written, then of the file": {entries(pagePresent|5, pagePresent, pagePresent|pageOfFile), 2},
		"swapped":                   {entries(pageSwapped, 0), 1},
		"never touched":             {entries(0, pagePresent), 0},
		"none":                      {nil, 0},
	} {
		if got := ownPages(c.entries); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestOwnRuns: both ways of finding what a process has of its own find the pages that it wrote, and no others.
func TestOwnRuns(t *testing.T) {
	t.Parallel()
	const pages = 3*scanPages + 5
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(pages * pageSize); err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	start := int64(uintptr(unsafe.Pointer(&b[0])))
	own := map[int64]bool{0: true, 1: true, scanPages - 1: true, scanPages: true, pages - 1: true}
	for range 3000 { // more runs than are told at a time
		own[rand.Int64N(pages)] = true
	}
	for page := range own {
		b[page*pageSize] = 0 // zeroes that were written are the process's own, too
	}
	for page := int64(0); page < pages; page += 1000 {
		if b[page*pageSize] != 0 {
			t.Fatal("not the file")
		}
	}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	for name, runs := range map[string]func(*os.File, int64, int64, func(from, to int64) error) error{"scan": scanRuns, "read": readRuns} {
		found := map[int64]bool{}
		err := runs(pagemap, start, start+pages*pageSize, func(from, to int64) error {
			for at := from; at < to; at += pageSize {
				found[(at-start)/pageSize] = true
			}
			return nil
		})
		if name == "scan" && errors.Is(err, unix.ENOTTY) {
			t.Log("this kernel cannot scan")
			continue
		}
		if err != nil || !maps.Equal(found, own) {
			t.Errorf("%s: found %d pages, want %d, %v", name, len(found), len(own), err)
		}
	}
}
