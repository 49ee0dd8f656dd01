package agent

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// cgroupParent holds the cgroups of this instance's VMs and nothing else.
func cgroupParent(cfg Config) string { return "wrenn-" + cfg.Instance }

func cgroupName(slot int) string { return fmt.Sprintf("slot-%d", slot) }

// killOrphans ends every VMM of this instance but those in the slots to keep, and returns when they are
// gone. A VMM is in its slot's cgroup from its first instruction, so one that no record names was started
// by an agent that died before it could write it down.
func killOrphans(cfg Config, keep map[int]bool) (killed int, err error) {
	return vmproc.Sweep(cgroupParent(cfg), func(name string) bool {
		digits, ok := strings.CutPrefix(name, "slot-")
		slot, err := strconv.Atoi(digits)
		return ok && err == nil && keep[slot]
	})
}
