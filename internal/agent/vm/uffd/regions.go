//go:build linux

package uffd

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// region is a part of a VM's RAM: where the VMM has it, and where it is in the memory file.
type region struct {
	base, size, offset uint64
}

// maxRegions is more than any VMM has: one on each side of the gap below 4 GiB, and few more.
const maxRegions = 64

// parseRegions reads what a VMM says of its memory, and trusts none of it: the file is size bytes long.
func parseRegions(raw []byte, size uint64) ([]region, error) {
	var said []struct {
		Base   uint64 `json:"base_host_virt_addr"`
		Size   uint64 `json:"size"`
		Offset uint64 `json:"offset"`
		Page   uint64 `json:"page_size"`
		KiB    uint64 `json:"page_size_kib"` // of older releases, which meant bytes by it for a while
	}
	if err := json.Unmarshal(raw, &said); err != nil {
		return nil, fmt.Errorf("regions: %w", err)
	}
	if len(said) == 0 || len(said) > maxRegions {
		return nil, fmt.Errorf("%d regions", len(said))
	}
	var all []region
	for i, s := range said {
		r := region{s.Base, s.Size, s.Offset}
		if err := r.check(size); err != nil {
			return nil, fmt.Errorf("region %d: %w", i, err)
		}
		if page := max(s.Page, s.KiB); page != 0 && page != pageSize && (s.Page != 0 || page != pageSize>>10) {
			return nil, fmt.Errorf("region %d: pages of %d", i, page)
		}
		if slices.ContainsFunc(all, r.overlaps) {
			return nil, fmt.Errorf("region %d overlaps another", i)
		}
		all = append(all, r)
	}
	return all, nil
}

func (r region) check(fileSize uint64) error {
	switch {
	case r.size == 0 || r.size%pageSize != 0 || r.base%pageSize != 0 || r.offset%pageSize != 0:
		return errors.New("not whole pages")
	case r.base+r.size < r.base:
		return errors.New("beyond the address space")
	case r.offset > fileSize || r.size > fileSize-r.offset:
		return errors.New("beyond the memory file")
	}
	return nil
}

// overlaps tells whether two regions share an address or a byte of the file.
func (r region) overlaps(other region) bool {
	return r.base < other.base+other.size && other.base < r.base+r.size ||
		r.offset < other.offset+other.size && other.offset < r.offset+r.size
}

// cut is what a range of addresses has in common with the region, in pages of the memory file.
func (r region) cut(start, end uint64) (first, last uint64) {
	start, end = max(start, r.base), min(end, r.base+r.size)
	if start >= end {
		return 0, 0
	}
	return (start - r.base + r.offset) / pageSize, (end - r.base + r.offset + pageSize - 1) / pageSize
}
