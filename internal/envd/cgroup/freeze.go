package cgroup

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ErrBusy is returned while another freeze or thaw is under way.
var ErrBusy = errors.New("another freeze or thaw is under way")

// maxFrozen bounds how many groups a sweep visits: user processes with root rights may make any number.
const maxFrozen = 4096

// pollFrozen is how often the kernel is asked whether tasks have stopped.
const pollFrozen = 2 * time.Millisecond

// Mode says which groups a freeze covers.
type Mode string

const (
	// Legacy covers the groups made here for commands and terminals.
	Legacy Mode = "legacy"
	// Hierarchy covers every group there is; the agent and init are in the root, which cannot be frozen.
	Hierarchy Mode = "hierarchy"
)

// Result is what a freeze saw.
type Result struct {
	Mode         Mode  `json:"mode"`
	Visited      int   `json:"visited"`
	Allowlisted  int   `json:"allowlisted"`
	Truncated    bool  `json:"truncated"`
	PreFrozen    int   `json:"preFrozen"`
	Requested    int   `json:"requested"`
	Frozen       int   `json:"frozen"`
	NotFrozen    int   `json:"notFrozen"`
	Failed       int   `json:"failed"`
	Unobservable int   `json:"unobservable"`
	SweepMS      int64 `json:"sweepMs"`
	WaitMS       int64 `json:"waitMs"`
}

// Freeze stops user processes where they are. A group is frozen with all below it. With wait it returns
// when all have stopped or the time is over; the groups that were frozen by others are left to them.
func (t *Tree) Freeze(ctx context.Context, mode Mode, limit int, wait time.Duration) (Result, error) {
	if t == nil {
		return Result{Mode: mode, Unobservable: 1}, nil
	}
	if !t.freezing.TryLock() {
		return Result{}, ErrBusy
	}
	defer t.freezing.Unlock()
	if limit <= 0 || limit > maxFrozen {
		limit = maxFrozen
	}
	res := Result{Mode: mode}
	started := time.Now()
	var asked []string
	for _, dir := range t.scope(mode) {
		if res.Visited == limit {
			res.Truncated = true
			break
		}
		res.Visited++
		if mode == Hierarchy { // in the groups made here nobody else has a say
			switch frozen, err := readFlag(filepath.Join(dir, "cgroup.freeze"), ""); {
			case err != nil:
				res.Failed++
				continue
			case frozen && !t.frozen[dir]:
				res.PreFrozen++
				continue
			}
		}
		if os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("1"), 0) != nil {
			res.Failed++
			continue
		}
		t.frozen[dir] = true
		res.Requested++
		asked = append(asked, dir)
	}
	res.SweepMS = time.Since(started).Milliseconds()
	if wait > 0 {
		t.await(ctx, asked, wait, &res)
	}
	return res, nil
}

// scope lists the groups to freeze. Those of the hierarchy are the children of the root: freezing one
// freezes what is below it.
func (t *Tree) scope(mode Mode) []string {
	if mode != Hierarchy {
		return []string{filepath.Join(t.dir, string(User)), filepath.Join(t.dir, string(PTY))}
	}
	var dirs []string
	entries, err := os.ReadDir(filepath.Dir(t.dir))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, filepath.Join(filepath.Dir(t.dir), e.Name()))
		}
	}
	return dirs
}

func (t *Tree) await(ctx context.Context, dirs []string, wait time.Duration, res *Result) {
	started := time.Now()
	defer func() { res.WaitMS = time.Since(started).Milliseconds() }()
	for {
		res.Frozen, res.NotFrozen = 0, 0
		failed := 0
		for _, dir := range dirs {
			switch frozen, err := readFlag(filepath.Join(dir, "cgroup.events"), "frozen "); {
			case err != nil:
				failed++
			case frozen:
				res.Frozen++
			default:
				res.NotFrozen++
			}
		}
		if res.NotFrozen == 0 || time.Since(started) >= wait || ctx.Err() != nil {
			res.Failed += failed
			return
		}
		time.Sleep(pollFrozen)
	}
}

// Thaw lets everything go on that Freeze stopped.
func (t *Tree) Thaw() error {
	if t == nil {
		return nil
	}
	if !t.freezing.TryLock() {
		return ErrBusy
	}
	defer t.freezing.Unlock()
	// The groups made here are thawed even if an earlier agent process froze them.
	for _, dir := range t.scope(Legacy) {
		t.frozen[dir] = true
	}
	var failed error
	for dir := range t.frozen {
		err := os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			failed = errors.Join(failed, err)
			continue
		}
		delete(t.frozen, dir)
	}
	return failed
}

// readFlag reads a file of "0" or "1", or such a value after prefix on a line of its own.
func readFlag(path, prefix string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), prefix); ok {
			return strings.TrimSpace(value) == "1", nil
		}
	}
	return false, errors.Join(errors.New(path+" holds no such value"), lines.Err())
}
