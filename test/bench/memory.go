package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

const (
	idleGoalMB   = 60
	cpuWatch     = 5 * time.Second
	clockTick    = 100 // USER_HZ, the same on every Linux (proc(5))
	hostReserve  = 2048
	perCloneMB   = 400 // what a VM of smallMB may take in all when it is emulated
	startAtOnce  = 4
	settleBefore = time.Second
	idleAfter    = 65 * time.Second // the control plane gives memory back every minute
)

// measureMemory looks at the programs and the VMMs with 0, 1, 10 and 20 virtual machines that have run one
// command each.
func measureMemory(ctx context.Context, b *bench) (err error) {
	steps := []int{1, 10, 20}
	if free, err := memAvailable(); err != nil || free < hostReserve+20*perCloneMB {
		b.skip("needs %d MB of free memory, there are %d", hostReserve+20*perCloneMB, free)
		return err
	}
	if err := pause(ctx, idleAfter); err != nil {
		return err
	}
	idle, err := b.programs()
	if err != nil {
		return err
	}
	b.add("resident memory of wrenn-cp, idle", "MB", summarize(idle.cp), nil, atMost(idleGoalMB, "MB"))
	b.add("resident memory of wrenn-agent, idle", "MB", summarize(idle.agent), nil, atMost(idleGoalMB, "MB"))
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return err
	}
	floor, err := b.floorPSS(ctx)
	if err != nil {
		return err
	}
	c := &clones{b: b}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	totals := map[int]float64{}
	for _, n := range steps {
		if err := c.grow(ctx, n); err != nil {
			return err
		}
		pss, err := c.pss()
		if err != nil {
			return err
		}
		totals[n] = sum(pss)
		b.add(fmt.Sprintf("PSS of a VMM of %d MB, %d clones", smallMB, n), "MB", summarize(pss...), &floor, nil)
	}
	b.add("PSS of one more clone (11th to 20th)", "MB", summarize((totals[20]-totals[10])/10), &floor, nil)
	return c.programs(ctx, idle)
}

// usage is the resident memory of the programs in MB.
type usage struct{ cp, agent float64 }

func (b *bench) programs() (u usage, err error) {
	if u.cp, err = field(fmt.Sprintf("/proc/%d/status", b.stack.ControlPlane.PID()), "VmRSS:"); err != nil {
		return u, err
	}
	u.agent, err = field(fmt.Sprintf("/proc/%d/status", b.stack.Agent.PID()), "VmRSS:")
	return u, err
}

// floorPSS is that of one VM restored by hand after one command.
func (b *bench) floorPSS(ctx context.Context) (s sample, err error) {
	template, err := b.templateDir("minimal", smallMB)
	if err != nil {
		return s, err
	}
	hw, err := hardwareOf(template)
	if err != nil {
		return s, err
	}
	l, err := b.newLab(ctx, 1)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	vm, err := l.restore(ctx, 0, template, hw)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, vm.stop()) }()
	if _, err := vm.guest.exec(ctx, "true"); err != nil {
		return s, err
	}
	if err := pause(ctx, settleBefore); err != nil {
		return s, err
	}
	pss, err := pssOf(vm.cmd.Process.Pid)
	return summarize(pss), err
}

// clones are sandboxes of one template that do nothing.
type clones struct {
	b    *bench
	list []*wrenn.Sandbox
}

// grow makes them n.
func (c *clones) grow(ctx context.Context, n int) error {
	for len(c.list) < n {
		made, err := together(min(startAtOnce, n-len(c.list)), func(int) (*wrenn.Sandbox, error) {
			return c.b.create(ctx, "minimal", smallMB)
		})
		var live []*wrenn.Sandbox
		for _, sb := range made {
			if sb != nil {
				live = append(live, sb)
			}
		}
		c.list = append(c.list, live...)
		if err != nil {
			return err
		}
		for _, sb := range live {
			if _, err := sb.Exec(ctx, "true"); err != nil {
				return err
			}
		}
	}
	return c.b.awaitReadyVMs(ctx)
}

func (c *clones) remove(ctx context.Context) error {
	_, err := together(len(c.list), func(i int) (struct{}, error) { return struct{}{}, c.b.remove(ctx, c.list[i]) })
	return err
}

// pss is that of each VMM.
func (c *clones) pss() ([]float64, error) {
	var out []float64
	for _, sb := range c.list {
		r, err := c.b.record(sb.ID)
		if err != nil {
			return nil, err
		}
		mb, err := pssOf(r.VM.PID)
		if err != nil {
			return nil, err
		}
		out = append(out, mb)
	}
	return out, nil
}

// programs looks at the programs while all clones are idle.
func (c *clones) programs(ctx context.Context, idle usage) error {
	n := len(c.list)
	before, err := cpuTime(c.b.stack.Agent.PID())
	if err != nil {
		return err
	}
	began := time.Now()
	if err := pause(ctx, cpuWatch); err != nil {
		return err
	}
	after, err := cpuTime(c.b.stack.Agent.PID())
	if err != nil {
		return err
	}
	busy := 100 * (after - before).Seconds() / time.Since(began).Seconds()
	loaded, err := c.b.programs()
	if err != nil {
		return err
	}
	c.b.add(fmt.Sprintf("resident memory of wrenn-cp, %d VMs", n), "MB", summarize(loaded.cp), nil, nil)
	c.b.add(fmt.Sprintf("resident memory of wrenn-agent, %d VMs", n), "MB", summarize(loaded.agent), nil, nil)
	c.b.add("wrenn-agent's memory per VM", "MB", summarize((loaded.agent-idle.agent)/float64(n)), nil, nil)
	c.b.add(fmt.Sprintf("CPU of wrenn-agent, %d idle VMs, heartbeat 2 s", n), "%", summarize(busy), nil, atMost(1, "%"))
	return nil
}

func pssOf(pid int) (float64, error) { return field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:") }

// field reads a line like "VmRSS:   1234 kB" of a file in /proc, in MB.
func field(path, name string) (float64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			kB, err := strconv.ParseFloat(f[1], 64)
			return kB / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

func memAvailable() (int, error) {
	mb, err := field("/proc/meminfo", "MemAvailable:")
	return int(mb), err
}

// cpuTime is what a process has computed so far.
func cpuTime(pid int) (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:])) // from field 3 on
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * time.Second / clockTick, err
}

// pause lets time pass that is itself part of what is measured.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func sum(values []float64) (total float64) {
	for _, v := range values {
		total += v
	}
	return total
}
