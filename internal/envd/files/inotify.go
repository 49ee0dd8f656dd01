package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

// maxWatchedDirs bounds a recursive watcher; each directory costs kernel memory.
const maxWatchedDirs = 16 << 10

// watchMask is what makes an event, and what tells that a watched directory itself went away.
const watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

var (
	errOverflow = errors.New("events came faster than they were read, and some were lost; list the directory and watch again")
	errTooDeep  = errors.New("the directory holds too many directories to watch them all")
)

// change is one event, with its path relative to the watched directory.
type change struct {
	name string
	kind filesystempb.EventType
}

// tree watches a directory, and all below it if recursive. It is used by one goroutine; close may be called
// by another one and ends a waiting read.
type tree struct {
	root      string
	recursive bool
	file      *os.File
	dirs      map[int32]string // watch descriptor → path relative to root, "" for root
	buf       []byte
	pending   []change
}

// watchTree begins to watch: what changes after it returns is reported.
func watchTree(root string, recursive bool) (*tree, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, faultf(tooMany, "no more watchers can be made in this sandbox: %s", bare(err))
	}
	t := &tree{
		root: root, recursive: recursive, file: os.NewFile(uintptr(fd), "inotify"),
		dirs: map[int32]string{}, buf: make([]byte, 64<<10),
	}
	if err := t.add("", false); err != nil {
		t.file.Close()
		return nil, watchFault(err, root)
	}
	return t, nil
}

func watchFault(err error, path string) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, errTooDeep):
		return faultf(tooMany, "directory '%s' holds more directories than can be watched", path)
	default:
		return explain(err, path)
	}
}

// add watches the directory rel and, if recursive, those below it. With report, what is in it already is
// reported as created: it was made before we could watch.
func (t *tree) add(rel string, report bool) error {
	dir := filepath.Join(t.root, rel)
	var wd int
	err := t.control(func(fd int) (err error) {
		wd, err = unix.InotifyAddWatch(fd, dir, watchMask)
		return err
	})
	if err != nil {
		return &fs.PathError{Op: "watch", Path: dir, Err: err}
	}
	t.dirs[int32(wd)] = rel
	if !t.recursive {
		return nil
	}
	if len(t.dirs) > maxWatchedDirs {
		return errTooDeep
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreVanished(err)
	}
	for _, e := range entries {
		child := filepath.Join(rel, e.Name())
		if report {
			t.pending = append(t.pending, change{child, filesystempb.EventType_EVENT_TYPE_CREATE})
		}
		if e.IsDir() {
			if err := ignoreVanished(t.add(child, report)); err != nil {
				return err
			}
		}
	}
	return nil
}

// control calls do with the descriptor, which stays open meanwhile; after close it fails.
func (t *tree) control(do func(fd int) error) error {
	conn, err := t.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) { failed = do(int(fd)) })
	return errors.Join(err, failed)
}

// ignoreVanished drops errors of directories that were removed while we looked.
func ignoreVanished(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

// next waits for events. errOverflow means that some were lost.
func (t *tree) next() ([]change, error) {
	for {
		n, err := t.file.Read(t.buf)
		if err != nil {
			return nil, err
		}
		if err := t.decode(t.buf[:n]); err != nil {
			return nil, err
		}
		if len(t.pending) > 0 {
			out := t.pending
			t.pending = nil
			return out, nil
		}
	}
}

// decode reads the kernel's records (inotify(7)).
func (t *tree) decode(b []byte) error {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			return errors.New("a record of inotify is cut off")
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return errOverflow
		}
		if err := t.event(wd, mask, string(name)); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) event(wd int32, mask uint32, name string) error {
	dir, known := t.dirs[wd]
	if !known {
		return nil
	}
	if mask&unix.IN_IGNORED != 0 { // the kernel dropped the watch: the directory is gone
		delete(t.dirs, wd)
		return nil
	}
	if name == "" {
		// About the directory itself. Its parent reports the same, except for the root's.
		if dir == "" && mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0 {
			t.pending = append(t.pending, change{".", filesystempb.EventType_EVENT_TYPE_REMOVE})
		}
		return nil
	}
	rel := filepath.Join(dir, name)
	kind := eventType(mask)
	if kind == filesystempb.EventType_EVENT_TYPE_UNSPECIFIED {
		return nil
	}
	if n := len(t.pending); n > 0 && t.pending[n-1] == (change{rel, kind}) && kind != filesystempb.EventType_EVENT_TYPE_REMOVE {
		return nil // the same again, as when a file is written piece by piece
	}
	t.pending = append(t.pending, change{rel, kind})
	if !t.recursive || mask&unix.IN_ISDIR == 0 {
		return nil
	}
	switch {
	case mask&unix.IN_MOVED_FROM != 0:
		t.forget(rel)
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return ignoreVanished(t.add(rel, mask&unix.IN_CREATE != 0))
	}
	return nil
}

// forget stops watching a directory that was moved away, and all below it.
func (t *tree) forget(rel string) {
	for wd, dir := range t.dirs {
		if dir == rel || strings.HasPrefix(dir, rel+"/") {
			_ = t.control(func(fd int) error { // it may be gone
				_, err := unix.InotifyRmWatch(fd, uint32(wd))
				return err
			})
			delete(t.dirs, wd)
		}
	}
}

func eventType(mask uint32) filesystempb.EventType {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return filesystempb.EventType_EVENT_TYPE_CREATE
	case mask&unix.IN_MODIFY != 0:
		return filesystempb.EventType_EVENT_TYPE_WRITE
	case mask&unix.IN_DELETE != 0:
		return filesystempb.EventType_EVENT_TYPE_REMOVE
	case mask&unix.IN_MOVED_FROM != 0:
		return filesystempb.EventType_EVENT_TYPE_RENAME
	case mask&unix.IN_ATTRIB != 0:
		return filesystempb.EventType_EVENT_TYPE_CHMOD
	default:
		return filesystempb.EventType_EVENT_TYPE_UNSPECIFIED
	}
}

func (t *tree) close() { t.file.Close() }
