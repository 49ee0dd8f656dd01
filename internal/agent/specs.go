package agent

import (
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
)

// specs are the host's size, as registration and heartbeats carry it.
type specs struct {
	Arch     string `json:"arch"`
	CPUCores int    `json:"cpu_cores"`
	MemoryMB int64  `json:"memory_mb"`
	DiskGB   int64  `json:"disk_gb"`
}

// detectSpecs reads the host's size; store is where sandboxes' disks go.
func detectSpecs(store *storage.Store) (specs, error) {
	total, _, err := memoryMB()
	if err != nil {
		return specs{}, err
	}
	_, disk, err := store.Free()
	if err != nil {
		return specs{}, err
	}
	return specs{Arch: runtime.GOARCH, CPUCores: runtime.NumCPU(), MemoryMB: total, DiskGB: disk >> 30}, nil
}

// memoryMB reads total and available memory (proc(5), /proc/meminfo), in MiB.
func memoryMB() (total, available int64, err error) {
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch kb, _ := strconv.ParseInt(f[1], 10, 64); f[0] {
		case "MemTotal:":
			total = kb >> 10
		case "MemAvailable:":
			available = kb >> 10
		}
	}
	return total, available, nil
}

// load1 is the load average over a minute.
func load1() float64 {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(raw), " ")
	v, _ := strconv.ParseFloat(first, 64)
	return v
}

// kernelRelease is uname -r of the host.
func kernelRelease() string {
	raw, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(raw))
}
