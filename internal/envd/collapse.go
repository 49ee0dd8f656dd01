package envd

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	hugePage = 2 << 20
	// madvCollapse is MADV_COLLAPSE, from Linux 6.1 on.
	madvCollapse = 25
	// maxRegions bounds how much of our own map is read.
	maxRegions = 4096
)

type collapseResult struct {
	Regions     int   `json:"regions"`
	Chunks      int   `json:"chunks"`
	Collapsed   int   `json:"collapsed"`
	AlreadyHuge int   `json:"alreadyHuge"`
	Skipped     int   `json:"skipped"`
	ElapsedMS   int64 `json:"elapsedMs"`
}

// region is one anonymous writable mapping of this process.
type region struct {
	start, end uintptr
	huge       int // 2 MiB pages it has already
}

// collapse gathers the agent's own memory in huge pages, so that it touches fewer pages after a restore.
func (s *server) collapse(w http.ResponseWriter, _ *http.Request) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		writeError(w, http.StatusInternalServerError, "the agent's memory map cannot be read")
		return
	}
	defer f.Close()
	started := time.Now()
	regions, err := parseRegions(f)
	if err != nil {
		writeError(w, http.StatusInternalServerError, "the agent's memory map cannot be read")
		return
	}
	res := collapseResult{Regions: len(regions)}
	for _, r := range regions {
		collapseRegion(r, &res)
	}
	res.ElapsedMS = time.Since(started).Milliseconds()
	writeJSON(w, http.StatusOK, res)
}

func collapseRegion(r region, res *collapseResult) {
	accepted := 0
	for at := (r.start + hugePage - 1) &^ (hugePage - 1); at+hugePage <= r.end; at += hugePage {
		res.Chunks++
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, at, hugePage, madvCollapse); errno != 0 {
			res.Skipped++
			continue
		}
		accepted++
	}
	already := min(r.huge, accepted)
	res.AlreadyHuge += already
	res.Collapsed += accepted - already
}

// parseRegions reads /proc/PID/smaps: a header line "start-end perms offset dev inode [path]" and then
// "Name: value kB" lines for each mapping.
func parseRegions(r io.Reader) ([]region, error) {
	var list []region
	wanted := false
	lines := bufio.NewScanner(r)
	for lines.Scan() && len(list) < maxRegions {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) >= 5 && strings.Contains(f[0], "-"):
			from, to, _ := strings.Cut(f[0], "-")
			start, err1 := strconv.ParseUint(from, 16, 64)
			end, err2 := strconv.ParseUint(to, 16, 64)
			if err := errors.Join(err1, err2); err != nil {
				return nil, err
			}
			wanted = strings.HasPrefix(f[1], "rw-p") && f[4] == "0" && (len(f) == 5 || strings.HasPrefix(f[5], "[anon"))
			if wanted {
				list = append(list, region{start: uintptr(start), end: uintptr(end)})
			}
		case wanted && len(f) == 3 && f[0] == "AnonHugePages:":
			if kb, err := strconv.Atoi(f[1]); err == nil {
				list[len(list)-1].huge = kb << 10 / hugePage
			}
		}
	}
	return list, lines.Err()
}
