package fleet

import (
	"fmt"
	"slices"
	"strings"
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
}

// Candidate is a registered, online host as placement sees it.
type Candidate struct {
	ID          string
	Own         bool // a byoc host of the team that asks
	Draining    bool
	HasTemplate bool
	Capacity    Resources // what sandboxes may take in all
	Reserved    Resources // what they have taken
	Sandboxes   int64
	Limit       int64 // most sandboxes; 0 is no limit

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
	isFull        = "at its sandbox limit"
	lacksCPU      = "not enough vCPUs"
	lacksMemory   = "not enough memory"
	lacksDisk     = "not enough disk"
)

// Place picks the host for a request: of those that fit, the team's own come first, then the one that is
// least taken afterwards by the resource it has least of. If none fits, hostID is empty and reason tells
// why, for the user to read. It is a pure function: the same arguments give the same answer in any order.
func Place(req Request, hosts []Candidate) (hostID, reason string) {
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
		return best.ID, ""
	}
	return "", explain(req, len(hosts), why)
}

func (h *Candidate) refuses(req Request) string {
	after := h.after(req)
	switch {
	case !h.HasTemplate:
		return lacksTemplate
	case h.Draining:
		return isDraining
	case h.Limit > 0 && h.Sandboxes >= h.Limit:
		return isFull
	case after.VCPUs > h.Capacity.VCPUs:
		return lacksCPU
	case after.MemoryMB > h.Capacity.MemoryMB, h.FreeMemoryMB >= 0 && req.MemoryMB > h.FreeMemoryMB:
		return lacksMemory
	case after.DiskMB > h.Capacity.DiskMB, h.FreeDiskMB >= 0 && h.FreeDiskMB < minFreeDiskMB:
		return lacksDisk
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

func explain(req Request, hosts int, why map[string]int) string {
	if hosts == 0 {
		return "no host is online; register one, or wait until one is back"
	}
	var parts []string
	for _, r := range []string{lacksTemplate, isDraining, isFull, lacksCPU, lacksMemory, lacksDisk} {
		if n := why[r]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d × %s", n, r))
		}
	}
	return fmt.Sprintf("none of the %d online hosts has room for %d vCPUs, %d MB memory, %d MB disk of template %q (%s); delete sandboxes, ask for less, or add a host",
		hosts, req.VCPUs, req.MemoryMB, req.DiskMB, req.Template, strings.Join(slices.Clip(parts), ", "))
}
