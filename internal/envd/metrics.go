package envd

import (
	"bufio"
	"errors"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// metricsBody is the contract's, and the agent's version.
type metricsBody struct {
	Timestamp   int64   `json:"ts"`
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"`
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
	EnvdVersion string  `json:"envd_version"`
}

func (s *server) metrics(w http.ResponseWriter, _ *http.Request) {
	m := metricsBody{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU(), EnvdVersion: Version}
	var disk unix.Statfs_t
	mem, err := readMeminfo()
	if err = errors.Join(err, unix.Statfs("/", &disk)); err == nil {
		m.CPUUsedPct, err = s.cpu.used()
	}
	if err != nil {
		s.Log.Error("metrics failed", "error", err)
		writeError(w, http.StatusInternalServerError, "the kernel's counters cannot be read")
		return
	}
	m.MemTotal, m.MemUsed, m.MemCache = mem.total, mem.total-mem.available, mem.cached
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	block := uint64(disk.Bsize)
	m.DiskTotal, m.DiskUsed = disk.Blocks*block, (disk.Blocks-disk.Bfree)*block
	writeJSON(w, http.StatusOK, m)
}

// cpuMeter tells how busy the CPUs were between two calls that are at least cpuWindow apart; calls that
// come faster get the last value again.
type cpuMeter struct {
	mu         sync.Mutex
	at         time.Time
	busy, all  uint64
	percentage float64
}

const cpuWindow = 200 * time.Millisecond

func (c *cpuMeter) used() (float64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() && time.Since(c.at) < cpuWindow {
		return c.percentage, nil
	}
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	busy, all, err := parseStat(f)
	if err != nil {
		return 0, err
	}
	if all > c.all && busy >= c.busy { // the first call covers the time since boot
		pct := 100 * float64(busy-c.busy) / float64(all-c.all)
		c.percentage = math.Round(pct*100) / 100
	}
	c.at, c.busy, c.all = time.Now(), busy, all
	return c.percentage, nil
}

// parseStat reads the first line of /proc/stat (proc_stat(5)): user nice system idle iowait irq softirq
// steal, in ticks.
func parseStat(r io.Reader) (busy, all uint64, err error) {
	line, err := bufio.NewReader(io.LimitReader(r, 4096)).ReadString('\n')
	f := strings.Fields(line)
	if err != nil || len(f) < 9 || f[0] != "cpu" {
		return 0, 0, errors.New("/proc/stat is not as expected")
	}
	for i, s := range f[1:9] {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		all += n
		if i != 3 && i != 4 { // idle, iowait
			busy += n
		}
	}
	return busy, all, nil
}

type meminfo struct{ total, available, cached uint64 }

func readMeminfo() (meminfo, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return meminfo{}, err
	}
	defer f.Close()
	return parseMeminfo(f)
}

// parseMeminfo reads proc_meminfo(5), in bytes.
func parseMeminfo(r io.Reader) (meminfo, error) {
	var m meminfo
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		kb, err := strconv.ParseUint(f[1], 10, 54)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			m.total = kb << 10
		case "MemAvailable:":
			m.available = kb << 10
		case "Cached:":
			m.cached = kb << 10
		}
	}
	if m.total == 0 || m.available > m.total {
		return m, errors.Join(errors.New("/proc/meminfo is not as expected"), lines.Err())
	}
	return m, nil
}
