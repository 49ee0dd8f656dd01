//go:build linux

package firecracker

import (
	"fmt"
	"net/http"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// request is one that this driver sends. All of them are made in this file, and a test holds them against
// Firecracker's own description of its API (src/firecracker/swagger/firecracker.yaml).
type request struct {
	method, path string
	body         any
}

// Names of devices, which a snapshot refers to.
const (
	networkID = "net"
	balloonS  = 10 // seconds between statistics of the balloon
)

func diskID(i int) string { return fmt.Sprintf("disk%d", i) }

type machineConfig struct {
	VCPUs      int  `json:"vcpu_count"`
	MemoryMB   int  `json:"mem_size_mib"`
	SMT        bool `json:"smt"`
	TrackDirty bool `json:"track_dirty_pages"`
}

type bootSource struct {
	Kernel  string `json:"kernel_image_path"`
	Initrd  string `json:"initrd_path,omitempty"`
	Cmdline string `json:"boot_args"`
}

type drive struct {
	ID        string      `json:"drive_id"`
	Path      string      `json:"path_on_host"`
	Root      bool        `json:"is_root_device"`
	ReadOnly  bool        `json:"is_read_only"`
	CacheType string      `json:"cache_type"`
	Limit     rateLimiter `json:"rate_limiter"`
}

type partialDrive struct {
	ID    string      `json:"drive_id"`
	Path  string      `json:"path_on_host,omitempty"`
	Limit rateLimiter `json:"rate_limiter"`
}

// rateLimiter lets through what its buckets are refilled with.
type rateLimiter struct {
	Bandwidth tokenBucket `json:"bandwidth"`
	Ops       tokenBucket `json:"ops"`
}

type tokenBucket struct {
	Size     int64 `json:"size"`
	RefillMS int64 `json:"refill_time"`
}

type networkInterface struct {
	ID  string `json:"iface_id"`
	TAP string `json:"host_dev_name"`
	MAC string `json:"guest_mac"`
}

type balloon struct {
	AmountMB     int  `json:"amount_mib"`
	DeflateOnOOM bool `json:"deflate_on_oom"`
	StatsS       int  `json:"stats_polling_interval_s"`
	Report       bool `json:"free_page_reporting,omitempty"` // memory that the guest frees goes back to the host
}

type balloonUpdate struct {
	AmountMB int `json:"amount_mib"`
}

type action struct {
	Type string `json:"action_type"`
}

type vmState struct {
	State string `json:"state"`
}

type snapshotCreate struct {
	Type   string `json:"snapshot_type"`
	State  string `json:"snapshot_path"`
	Memory string `json:"mem_file_path"`
}

type snapshotLoad struct {
	State   string        `json:"snapshot_path"`
	Memory  memoryBackend `json:"mem_backend"`
	Resume  bool          `json:"resume_vm"`
	Track   bool          `json:"track_dirty_pages,omitempty"`
	OldDiff bool          `json:"enable_diff_snapshots,omitempty"` // what Firecracker before 1.13 calls Track
}

type memoryBackend struct {
	Type string `json:"backend_type"`
	Path string `json:"backend_path"`
}

// What a guest needs on Firecracker's machine: it ends by a reset of the keyboard controller, whose mouse and
// multiplexer are not there to be looked for.
const machineWords = "console=ttyS0 reboot=k pci=off 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd "

// coldStart is all that describes a VM which boots, but not the start itself.
func coldStart(cfg vm.Config, limit rateLimiter, v version) []request {
	boot := bootSource{Kernel: kernelPath, Cmdline: machineWords + cfg.Cmdline}
	if cfg.Initrd != "" {
		boot.Initrd = initrdPath
	}
	all := []request{
		{http.MethodPut, "/machine-config", machineConfig{VCPUs: cfg.VCPUs, MemoryMB: cfg.MemoryMB, TrackDirty: true}},
		{http.MethodPut, "/boot-source", boot},
		{http.MethodPut, "/entropy", struct{}{}},
		{http.MethodPut, "/balloon", balloon{DeflateOnOOM: true, StatsS: balloonS, Report: v.reports()}},
	}
	for i, disk := range cfg.Disks {
		// Writeback: a flush of the guest is one on the host, or a power cut loses what the guest holds for written.
		all = append(all, request{http.MethodPut, "/drives/" + diskID(i), drive{
			ID: diskID(i), Path: diskPath(i), ReadOnly: disk.ReadOnly, CacheType: "Writeback", Limit: limit,
		}})
	}
	if cfg.Net.TAP != "" {
		all = append(all, request{http.MethodPut, "/network-interfaces/" + networkID, networkInterface{
			ID: networkID, TAP: cfg.Net.TAP, MAC: cfg.Net.MAC,
		}})
	}
	return all
}

// restore loads a snapshot and leaves the VM frozen.
func restore(memory memoryBackend, v version) request {
	load := snapshotLoad{State: statePath, Memory: memory, Track: true}
	if v.before(1, 13) {
		load.Track, load.OldDiff = false, true
	}
	return request{http.MethodPut, "/snapshot/load", load}
}

// updateDisk gives a restored disk the limits of now. One that was to grow the VMM looks at again, and tells the guest
// its size.
func updateDisk(i int, disk vm.Disk, limit rateLimiter) request {
	update := partialDrive{ID: diskID(i), Limit: limit}
	if disk.GrowTo != 0 {
		update.Path = diskPath(i)
	}
	return request{http.MethodPatch, "/drives/" + diskID(i), update}
}

func instanceStart() request {
	return request{http.MethodPut, "/actions", action{Type: "InstanceStart"}}
}

func pause() request  { return request{http.MethodPatch, "/vm", vmState{State: "Paused"}} }
func resume() request { return request{http.MethodPatch, "/vm", vmState{State: "Resumed"}} }

// snapshotDiff writes the device state, and into the memory file the pages that changed since the last time.
func snapshotDiff() request {
	return request{http.MethodPut, "/snapshot/create", snapshotCreate{Type: "Diff", State: newStatePath, Memory: memoryPath}}
}

func describe() request { return request{http.MethodGet, "/", nil} }

func balloonStatistics() request { return request{http.MethodGet, "/balloon/statistics", nil} }

func setBalloon(mb int) request {
	return request{http.MethodPatch, "/balloon", balloonUpdate{AmountMB: mb}}
}
