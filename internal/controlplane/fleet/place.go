package fleet

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Resources are what a sandbox takes of a host.
type Resources struct {
	VCPUs    int64
	MemoryMB int64
	DiskMB   int64
}

// Request asks for a place for one sandbox.
type Request struct {
	Resources
	Template string
	Needs    Needs // of the saved memory that it begins with; empty for none
	Saved    bool  // it begins with a saved moment, on the only host that has it
	Resume   bool  // it is on the host already, with its disk
}

// Candidate is a registered, online host as placement sees it.
type Candidate struct {
	ID          string
	Own         bool // a byoc host of the team that asks
	Draining    bool
	HasTemplate bool // or the saved moment that is asked for
	Has         []Needs
	Capacity    Resources // what sandboxes may take in all
	Reserved    Resources // what they have taken
	Sandboxes   int64     // those that are not paused
	Limit       int64     // most sandboxes that can run; 0 is no limit

	FreeMemoryMB int64 // as last reported; negative if it never was
	FreeDiskMB   int64
}

// minFreeDiskMB is what a host must really have free before it gets a sandbox: disks are sparse, so the
// reservation alone does not tell.
const minFreeDiskMB = 512

// reasons why a host does not fit, in the order they are told.
const (
	lacksTemplate = "no template"
	isDraining    = "draining"
	doesNotFit    = "another hypervisor or CPU"
	isFull        = "at its sandbox limit"
	lacksCPU      = "not enough vCPUs"
	lacksMemory   = "not enough memory"
	lacksDisk     = "not enough disk"
	diskIsFull    = "almost no free disk"
)

var reasons = []string{lacksTemplate, isDraining, doesNotFit, isFull, lacksCPU, lacksMemory, lacksDisk, diskIsFull}

// Place picks the host for a request: of those that fit, the team's own come first, then the one that is
// least taken afterwards by the resource it has least of. If none fits, hostID is empty and the refusal tells
// why, for the user to read. It is a pure function: the same arguments give the same answer in any order.
func Place(req Request, hosts []Candidate) (hostID string, refusal *wrenn.Error) {
	var best *Candidate
	why := map[string]int{}
	for i := range hosts {
		h := &hosts[i]
		if r := h.refuses(req); r != "" {
			why[r]++
			continue
		}
		if best == nil || better(h, best, req) {
			best = h
		}
	}
	if best != nil {
		return best.ID, nil
	}
	return "", refuse(req, hosts, why)
}

func (h *Candidate) refuses(req Request) string {
	after := h.after(req)
	switch {
	case !h.HasTemplate:
		return lacksTemplate
	case h.Draining && !req.Resume: // what is on it already may go on
		return isDraining
	case req.Needs.lacks(h.Has) != "":
		return doesNotFit
	case h.Limit > 0 && h.Sandboxes >= h.Limit:
		return isFull
	case after.VCPUs > h.Capacity.VCPUs:
		return lacksCPU
	case after.MemoryMB > h.Capacity.MemoryMB, h.FreeMemoryMB >= 0 && req.MemoryMB > h.FreeMemoryMB:
		return lacksMemory
	case after.DiskMB > h.Capacity.DiskMB && !req.Resume:
		return lacksDisk
	case h.FreeDiskMB >= 0 && h.FreeDiskMB < minFreeDiskMB:
		return diskIsFull
	}
	return ""
}

func (h *Candidate) after(req Request) Resources {
	return Resources{
		VCPUs:    h.Reserved.VCPUs + req.VCPUs,
		MemoryMB: h.Reserved.MemoryMB + req.MemoryMB,
		DiskMB:   h.Reserved.DiskMB + req.DiskMB,
	}
}

// take books a sandbox that was placed on the host.
func (h *Candidate) take(req Request) {
	h.Reserved = h.after(req)
	h.Sandboxes++
}

// share is how much of its scarcest resource would be taken.
func (h *Candidate) share(req Request) float64 {
	after := h.after(req)
	return max(
		float64(after.VCPUs)/float64(h.Capacity.VCPUs),
		float64(after.MemoryMB)/float64(h.Capacity.MemoryMB),
		float64(after.DiskMB)/float64(h.Capacity.DiskMB),
	)
}

func better(a, b *Candidate, req Request) bool {
	if a.Own != b.Own {
		return a.Own
	}
	if sa, sb := a.share(req), b.share(req); sa != sb {
		return sa < sb
	}
	return a.ID < b.ID
}

// refuse says why no host takes the request. Disk alone is its own kind: no waiting for others helps.
func refuse(req Request, hosts []Candidate, why map[string]int) *wrenn.Error {
	switch {
	case len(hosts) == 0:
		return wrenn.Errorf(wrenn.KindNoCapacity, "no host is online; register one, or wait until one is back")
	case why[diskIsFull] > 0 && why[diskIsFull]+why[lacksTemplate]+why[isDraining] == len(hosts):
		free := int64(0)
		for _, h := range hosts {
			if h.refuses(req) == diskIsFull {
				free = max(free, h.FreeDiskMB)
			}
		}
		return wrenn.Errorf(wrenn.KindDiskFull, "no host has enough free disk: the most is %d MB, at least %d MB must be free; delete sandboxes, checkpoints or snapshots, or add a host", free, minFreeDiskMB).
			With("free_disk_mb", free).With("needed_disk_mb", minFreeDiskMB)
	case req.Resume, req.Saved:
		return refuseHere(req, hosts[0])
	}
	var parts []string
	for _, r := range reasons {
		if n := why[r]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d × %s", n, r))
		}
	}
	return wrenn.Errorf(wrenn.KindNoCapacity, "none of the %d online hosts has room for %d vCPUs, %d MB memory, %d MB disk of template %q (%s); delete sandboxes, ask for less, or add a host",
		len(hosts), req.VCPUs, req.MemoryMB, req.DiskMB, req.Template, strings.Join(slices.Clip(parts), ", "))
}

// refuseHere says what the only host of a saved moment lacks to run it.
func refuseHere(req Request, h Candidate) *wrenn.Error {
	switch h.refuses(req) {
	case doesNotFit:
		return wrenn.Errorf(wrenn.KindNoCapacity, "its host cannot run it any more: %s; give the host back what it had, or boot its disk without the memory (`disk_only`)", req.Needs.lacks(h.Has))
	case isDraining:
		return wrenn.Errorf(wrenn.KindNoCapacity, "its host is draining and takes nothing new; try again when it is back in use")
	case isFull:
		return wrenn.Errorf(wrenn.KindNoCapacity, "its host runs as many sandboxes as it may (%d); pause or delete one there", h.Limit)
	}
	lacks := Resources{
		VCPUs:    max(0, h.Reserved.VCPUs+req.VCPUs-h.Capacity.VCPUs),
		MemoryMB: max(0, h.Reserved.MemoryMB+req.MemoryMB-h.Capacity.MemoryMB),
	}
	if h.FreeMemoryMB >= 0 {
		lacks.MemoryMB = max(lacks.MemoryMB, req.MemoryMB-h.FreeMemoryMB)
	}
	if !req.Resume {
		lacks.DiskMB = max(0, h.Reserved.DiskMB+req.DiskMB-h.Capacity.DiskMB)
	}
	return wrenn.Errorf(wrenn.KindNoCapacity, "its host has no room to run it: it lacks %s; pause or delete other sandboxes there, or try again later", lacks).
		With("missing_vcpus", lacks.VCPUs).With("missing_memory_mb", lacks.MemoryMB).With("missing_disk_mb", lacks.DiskMB)
}

// String names what is not zero.
func (r Resources) String() string {
	var parts []string
	for _, part := range []struct {
		n    int64
		what string
	}{{r.VCPUs, " vCPUs"}, {r.MemoryMB, " MB of memory"}, {r.DiskMB, " MB of disk"}} {
		if part.n != 0 {
			parts = append(parts, strconv.FormatInt(part.n, 10)+part.what)
		}
	}
	return strings.Join(parts, " and ")
}
