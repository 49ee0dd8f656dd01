// Package cgroup puts the guest's user processes into control groups (cgroup v2) so that a command can
// be killed with everything it started, and all of them can be frozen before a snapshot. The tree is
//
//	ROOT/wrenn/user/<n>   commands       ROOT/wrenn/pty/<n>   terminals
//
// It owns only ROOT/wrenn. Where cgroup v2 is not there or not ours (unit tests), a nil *Tree is used
// and every operation on it is a no-op that says so.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Kind is what a group holds.
type Kind string

const (
	User Kind = "user"
	PTY  Kind = "pty"
)

// Root is where init mounts the cgroup v2 file system.
const Root = "/sys/fs/cgroup"

// Tree is the part of the cgroup file system that holds user processes.
type Tree struct {
	dir  string
	next atomic.Uint64

	mu    sync.Mutex
	stale []*Group // ended, but something the process left behind still ran in them

	freezing sync.Mutex
	frozen   map[string]bool // directories that Freeze stopped
}

// Open makes the tree below root, a mounted cgroup2 file system. reserve is the memory in bytes that user
// processes may not take together, so that the guest agent is never the victim of their appetite.
func Open(root string, reserve uint64) (*Tree, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("cgroup file system %s: %w", root, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not a cgroup v2 file system", root)
	}
	t := &Tree{dir: filepath.Join(root, "wrenn"), frozen: map[string]bool{}}
	for _, d := range []string{t.dir, filepath.Join(t.dir, string(User)), filepath.Join(t.dir, string(PTY))} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	t.next.Store(uint64(os.Getpid()) << 32) // a restarted agent meets no group of its predecessor
	t.protect(root, reserve)
	return t, nil
}

// Bounds of how many tasks user processes may be; between them it goes by memory, since a task costs some.
const (
	minTasks    = 1024
	maxTasks    = 32 << 10
	bytesOfTask = 64 << 10
)

// protect keeps user processes from starving the agent and the kernel of memory, tasks and CPU time: with
// the cpu controller all of them together weigh as much as the agent alone when both want to run, and each
// command as much as any other, however many processes it is. It is best effort: a kernel without a
// controller still runs processes.
func (t *Tree) protect(root string, reserve uint64) {
	for _, controller := range []string{"+memory", "+pids", "+cpu"} {
		_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte(controller), 0)
	}
	for _, dir := range []string{t.dir, filepath.Join(t.dir, string(User)), filepath.Join(t.dir, string(PTY))} {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu"), 0)
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return
	}
	total := info.Totalram * uint64(info.Unit)
	limits := map[string]uint64{"pids.max": min(max(total/bytesOfTask, minTasks), maxTasks)}
	if total > 2*reserve {
		limits["memory.max"] = total - reserve
	}
	for file, limit := range limits {
		_ = os.WriteFile(filepath.Join(t.dir, file), []byte(strconv.FormatUint(limit, 10)), 0)
	}
}

// Group holds one process and all its descendants that did not leave it.
type Group struct {
	tree *Tree
	path string
	dir  *os.File
}

// New makes an empty group. A nil Tree gives a nil Group.
func (t *Tree) New(kind Kind) (*Group, error) {
	if t == nil {
		return nil, nil
	}
	t.sweep()
	path := filepath.Join(t.dir, string(kind), strconv.FormatUint(t.next.Add(1), 36))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		_ = os.Remove(path)
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return &Group{tree: t, path: path, dir: dir}, nil
}

// FD is a descriptor of the group for clone3, and whether there is one.
func (g *Group) FD() (int, bool) {
	if g == nil {
		return -1, false
	}
	return int(g.dir.Fd()), true
}

// Kill sends SIGKILL to every process in the group, and tells whether it could.
func (g *Group) Kill() bool {
	if g == nil {
		return false
	}
	return os.WriteFile(filepath.Join(g.path, "cgroup.kill"), []byte("1"), 0) == nil
}

// Release removes the group as soon as nothing runs in it: now, or when a later group is made or
// released. What a command left running in the background keeps running.
func (g *Group) Release() {
	if g == nil {
		return
	}
	g.dir.Close()
	if os.Remove(g.path) == nil {
		return
	}
	g.tree.mu.Lock()
	g.tree.stale = append(g.tree.stale, g)
	g.tree.mu.Unlock()
}

func (t *Tree) sweep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	kept := t.stale[:0]
	for _, g := range t.stale {
		if err := os.Remove(g.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			kept = append(kept, g)
		}
	}
	t.stale = kept
}
