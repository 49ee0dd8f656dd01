package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// bench is a run under way.
type bench struct {
	stack    *stack.Stack
	report   *report
	say      func(format string, args ...any)
	prepared map[string]bool // templates that are known to be ready to clone

	part      string // that runs now
	partBegan time.Time
}

// smallMB is the memory of the sandboxes that are measured where nothing else is said.
const smallMB = 256

// partBudget is after how long a part ends its repetitions early: on a busy machine fewer figures are better
// than none of the parts that come after.
const (
	partBudget = 90 * time.Second
	fewestRuns = 3
)

// enough tells whether a part that has repeated something so often should end.
func (b *bench) enough(runs int) bool {
	return runs >= fewestRuns && time.Since(b.partBegan) > partBudget
}

// cleanup is how long the removal of one thing may take, also when the run was cut off.
const cleanup = 30 * time.Second

// prepare makes sure that an image and a size were booted and frozen, so that the next create is a restore.
func (b *bench) prepare(ctx context.Context, template string, memoryMB int32) error {
	key := fmt.Sprintf("%s-%d", template, memoryMB)
	if b.prepared[key] {
		return nil
	}
	sb, err := b.create(ctx, template, memoryMB)
	if err != nil {
		return err
	}
	b.prepared[key] = true
	return errors.Join(b.remove(ctx, sb), b.awaitReadyVMs(ctx))
}

// restsFor is longer than the agent takes for one more ready VM.
const restsFor = 4 * time.Second

// awaitReadyVMs waits until the agent makes no more VMs ready: that is what a host is like that had a moment's rest.
func (b *bench) awaitReadyVMs(ctx context.Context) error {
	known, since := map[string]bool{}, time.Now()
	for time.Since(since) < restsFor {
		entries, err := os.ReadDir(filepath.Join(b.volume(), "warm"))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !known[e.Name()] {
				known[e.Name()], since = true, time.Now()
			}
		}
		if err := pause(ctx, restsFor/20); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) create(ctx context.Context, template string, memoryMB int32) (*wrenn.Sandbox, error) {
	return b.stack.Client.CreateSandbox(ctx, wrenn.SandboxOptions{Template: template, MemoryMB: memoryMB})
}

// remove deletes a sandbox, also after ctx ended.
func (b *bench) remove(ctx context.Context, sb *wrenn.Sandbox) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	_, err := sb.Delete(ctx)
	return err
}

// templateDir is the saved machine that sandboxes of an image and a size are cloned from.
func (b *bench) templateDir(template string, memoryMB int) (string, error) {
	pattern := filepath.Join(b.volume(), "templates", fmt.Sprintf("%s-*-1x%d", template, memoryMB))
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%s: %d templates, not 1", pattern, len(found))
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// volume is the agent's file system with reflinks.
func (b *bench) volume() string { return filepath.Join(b.stack.Dir, "sandboxes") }

// timed is how long fn takes, in milliseconds.
func timed(fn func() error) (float64, error) {
	began := time.Now()
	err := fn()
	return ms(time.Since(began)), err
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// together runs fn for 0 to n-1 at once and gives its results in order; the errors are joined.
func together[T any](n int, fn func(i int) (T, error)) ([]T, error) {
	out, errs := make([]T, n), make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			out[i], errs[i] = fn(i)
		}()
	}
	wg.Wait()
	return out, errors.Join(errs...)
}
