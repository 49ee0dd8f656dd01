//go:build linux

package storage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func copyStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Dir: filepath.Join(t.TempDir(), "boxes"), Mode: ModeCopy})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// volumeStore is a store on a volume file of its own, on whatever file system the machine has.
func volumeStore(t *testing.T, size int64) (*Store, Options) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a volume")
	}
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs: install the package xfsprogs")
	}
	opts := Options{Dir: filepath.Join(t.TempDir(), "boxes"), VolumeSize: size}
	t.Cleanup(func() {
		if err := Unmount(opts.Dir); err != nil {
			t.Error(err)
		}
	})
	s, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	if s.VolumeFile() == "" {
		if s.Reflinks() {
			t.Skip("the file system has reflinks, no volume is made")
		}
		t.Skip("this machine mounts no volumes: " + s.Reason())
	}
	return s, opts
}

// sparse makes a file of 64 MiB with data at its beginning, in the middle and nowhere else.
func sparse(t *testing.T, path string) []byte {
	t.Helper()
	content := make([]byte, 64<<20)
	copy(content, "first")
	copy(content[40<<20:], "middle")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	for at, text := range map[int64]string{0: "first", 40 << 20: "middle"} {
		if _, err := f.WriteAt([]byte(text), at); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

func same(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes that differ from the %d wanted, %v", filepath.Base(path), len(got), len(want), err)
	}
}

func TestCloneKeepsContentsAndHoles(t *testing.T) {
	t.Parallel()
	s := copyStore(t)
	src, dst := filepath.Join(s.Dir(), "a"), filepath.Join(s.Dir(), "b")
	content := sparse(t, src)
	if err := s.Clone(t.Context(), src, dst); err != nil {
		t.Fatal(err)
	}
	same(t, dst, content)
	if used, err := usedBytes(dst); err != nil || used > 1<<20 {
		t.Errorf("the copy takes %d bytes, %v", used, err)
	}
	fi, err := os.Stat(dst)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestCloneOfAFileThatIsOneHole(t *testing.T) {
	t.Parallel()
	s := copyStore(t)
	src, dst := filepath.Join(s.Dir(), "a"), filepath.Join(s.Dir(), "b")
	for _, size := range []int64{0, 1, 5 << 20} {
		if err := os.WriteFile(src, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(src, size); err != nil {
			t.Fatal(err)
		}
		if err := s.Clone(t.Context(), src, dst); err != nil {
			t.Fatal(err)
		}
		same(t, dst, make([]byte, size))
		if err := os.Remove(dst); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCloneThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	s := copyStore(t)
	src, dst := filepath.Join(s.Dir(), "a"), filepath.Join(s.Dir(), "b")
	content := sparse(t, src)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, try := range []struct {
		name     string
		ctx      context.Context
		src, dst string
		want     wrenn.Kind
	}{
		{"no source", t.Context(), src + "x", dst, wrenn.KindNotFound},
		{"a directory", t.Context(), s.Dir(), dst, wrenn.KindInvalidRequest},
		{"no directory to write to", t.Context(), src, dst + "/c/d", wrenn.KindNotFound},
		{"itself", t.Context(), src, src, wrenn.KindAlreadyExists},
		{"cancelled", cancelled, src, dst, wrenn.KindInternal},
	} {
		if err := s.Clone(try.ctx, try.src, try.dst); wrenn.KindOf(err) != try.want {
			t.Errorf("%s: %v, want kind %s", try.name, err, try.want)
		}
	}
	same(t, src, content)
	entries, err := os.ReadDir(s.Dir())
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
}

func TestVolumeMakesClonesFreeAndIsMountedAgain(t *testing.T) {
	t.Parallel()
	s, opts := volumeStore(t, 2<<30)
	if !s.Reflinks() || !strings.Contains(s.Reason(), s.VolumeFile()) {
		t.Fatalf("reflinks %v: %s", s.Reflinks(), s.Reason())
	}
	if used, err := usedBytes(s.VolumeFile()); err != nil || used > 256<<20 {
		t.Errorf("an empty volume takes %d bytes, %v", used, err)
	}
	src, dst := filepath.Join(s.Dir(), "a"), filepath.Join(s.Dir(), "b")
	big := bytes.Repeat([]byte("wrenn"), 20<<20)
	if err := os.WriteFile(src, big, 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	before, _, err := s.Free()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Clone(t.Context(), src, dst); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	// The volume's own free space: that of the machine below changes with what else it does.
	if after, _, err := statfs(s.Dir()); err != nil || before-after > 16<<20 && before > after {
		t.Errorf("a clone of %d MiB took %d MiB", len(big)>>20, (before-after)>>20)
	}
	again, err := Open(t.Context(), opts) // the next agent
	if err != nil || again.VolumeFile() != s.VolumeFile() || !again.Reflinks() {
		t.Errorf("opened again: %+v, %v", again, err)
	}
	if err := Unmount(opts.Dir); err != nil { // a reboot
		t.Fatal(err)
	}
	if _, err := os.Stat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the test proves nothing: unmounted, the file is still there: %v", err)
	}
	if again, err = Open(t.Context(), opts); err != nil || !again.Reflinks() {
		t.Fatalf("after a reboot: %+v, %v", again, err)
	}
	same(t, dst, big)
	if err := errors.Join(Unmount(opts.Dir), Unmount(opts.Dir), Unmount(opts.Dir+"-absent")); err != nil {
		t.Errorf("unmounting what is not mounted: %v", err)
	}
}

func TestFullDiskIsAClearErrorAndLeavesNothing(t *testing.T) {
	t.Parallel()
	s, _ := volumeStore(t, MinVolumeSize)
	src := filepath.Join(t.TempDir(), "big")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 1200<<20); err != nil {
		t.Skipf("needs 1.2 GB of disk: %v", err)
	}
	dst := filepath.Join(s.Dir(), "b")
	if err := s.NeedSpace(1200 << 20); wrenn.KindOf(err) != wrenn.KindDiskFull || !strings.Contains(err.Error(), "1200 MiB") {
		t.Errorf("asking for too much: %v", err)
	}
	if err := s.NeedSpace(100 << 20); err != nil {
		t.Errorf("asking for what is there: %v", err)
	}
	if _, err := s.Import(t.Context(), src, "big.ext4"); wrenn.KindOf(err) != wrenn.KindDiskFull {
		t.Errorf("import: %v", err)
	}
	// Unwritten blocks read as a hole: make them data, so that the copy really needs the room.
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := fillUp(s.Dir()); err != nil {
		t.Fatal(err)
	}
	if err := s.Clone(t.Context(), src, dst); wrenn.KindOf(err) != wrenn.KindDiskFull {
		t.Errorf("clone: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Dir(), ".clone-*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// fillUp takes all the room there is.
func fillUp(dir string) error {
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		return err
	}
	defer f.Close()
	for step := int64(64 << 20); step >= 4096; step /= 2 {
		for {
			fi, err := f.Stat()
			if err != nil {
				return err
			}
			if unix.Fallocate(int(f.Fd()), 0, fi.Size(), step) != nil {
				break
			}
		}
	}
	return nil
}

func TestImportIsDoneOncePerVersion(t *testing.T) {
	t.Parallel()
	s := copyStore(t)
	src := filepath.Join(t.TempDir(), "minimal.ext4")
	content := sparse(t, src)
	first, err := s.Import(t.Context(), src, "minimal.ext4")
	if err != nil {
		t.Fatal(err)
	}
	same(t, first, content)
	before, err := os.Stat(first)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Import(t.Context(), src, "minimal.ext4")
	if err != nil || again != first {
		t.Errorf("again: %q, %v; was %q", again, err, first)
	}
	if after, err := os.Stat(again); err != nil || !os.SameFile(before, after) {
		t.Error("an image that did not change was imported again")
	}
	if err := os.WriteFile(src, []byte("version 2"), 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := s.Import(t.Context(), src, "minimal.ext4")
	if err != nil || second == first {
		t.Fatalf("the changed image: %q, %v", second, err)
	}
	same(t, second, []byte("version 2"))
	if _, err := os.Stat(first); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old version is still there: %v", err)
	}
	for _, name := range []string{"", "../x", "a/b", ".hidden", strings.Repeat("a", 129)} {
		if _, err := s.Import(t.Context(), src, name); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestResizeGrowsAndNeverShrinks(t *testing.T) {
	t.Parallel()
	s := copyStore(t)
	path := filepath.Join(s.Dir(), "disk")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Resize(path, 1<<30); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Size() != 1<<30 {
		t.Errorf("size %d, %v", fi.Size(), err)
	}
	if used, err := usedBytes(path); err != nil || used > 1<<20 {
		t.Errorf("growing took %d bytes, %v", used, err)
	}
	if err := s.Resize(path, 1<<20); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
		t.Errorf("shrinking: %v", err)
	}
	if err := s.Resize(path+"x", 1<<20); wrenn.KindOf(err) != wrenn.KindNotFound {
		t.Errorf("resizing nothing: %v", err)
	}
}

func TestOpenRefusesWhatItCannotHonour(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, o := range []Options{
		{Dir: "relative"}, {Dir: dir, Mode: "magic"}, {Dir: dir, VolumeSize: 1 << 20},
	} {
		if _, err := Open(t.Context(), o); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if probeReflink(dir) != nil {
		if _, err := Open(t.Context(), Options{Dir: dir, Mode: ModeReflink}); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
			t.Errorf("reflinks where there are none: %v", err)
		}
	}
}

// TestVolumeNeverHidesFiles: a directory in use is not mounted over.
func TestVolumeNeverHidesFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if probeReflink(dir) == nil {
		t.Skip("the file system has reflinks, no volume is made")
	}
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if s.Reflinks() || !strings.Contains(s.Reason(), "not empty") {
		t.Errorf("reflinks %v: %s", s.Reflinks(), s.Reason())
	}
	same(t, mine, []byte("kept"))
}

func TestOpenRemovesWhatACrashLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	images := filepath.Join(dir, importDir)
	if err := os.Mkdir(images, 0o700); err != nil {
		t.Fatal(err)
	}
	kept := []string{filepath.Join(dir, "mine"), filepath.Join(images, "minimal.ext4@0011")}
	left := []string{filepath.Join(dir, ".reflink-1"), filepath.Join(images, ".clone-2"), filepath.Join(images, "minimal.ext4@0012.new")}
	for _, path := range append(append([]string(nil), kept...), left...) {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(t.Context(), Options{Dir: dir, Mode: ModeCopy}); err != nil {
		t.Fatal(err)
	}
	for _, path := range left {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	for _, path := range kept {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

// Files in it are readable for VMMs of several uids.
func TestDirectoryIsClosedToOthers(t *testing.T) {
	t.Parallel()
	s, _ := volumeStore(t, 1<<30)
	for name, dir := range map[string]string{"copy": copyStore(t).dir, "volume": s.dir} {
		fi, err := os.Stat(dir)
		if err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: mode %v, %v", name, fi.Mode(), err)
		}
	}
}
