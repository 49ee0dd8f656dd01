//go:build linux

package firecracker

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/console"
)

// lineLimit bounds a line of log or metrics; what is longer is cut.
const lineLimit = 64 << 10

// attend reads what a VM's process writes into its FIFOs until it is gone, if this driver does not do so already:
// the console into its file, log and metrics into the agent's log. Firecracker drops what nobody reads, so all of
// them go on when the next agent waits for a VM that outlived its own.
func (d *Driver) attend(h vm.Handle) {
	if h.Socket == "" {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attended[*process(h)] {
		return
	}
	// The console's only writer is the VMM, so its end is the VMM's. The others Firecracker opens for reading, too.
	terminal, err := openFIFO(filepath.Join(workDir(h), consoleFile), unix.O_RDONLY)
	if err != nil {
		return // the VM is gone
	}
	d.attended[*process(h)] = true
	log := d.opts.Log.With("pid", h.PID)
	var others []*os.File
	warnings := &warnings{}
	for name, line := range map[string]func(*slog.Logger, []byte){logFile: warnings.logLine, metricsFile: logMetrics} {
		f, err := openFIFO(filepath.Join(workDir(h), name), unix.O_RDWR)
		if err != nil {
			log.Warn("cannot read what the VMM writes", "what", name, "err", err)
			continue
		}
		others = append(others, f)
		go readLines(f, func(b []byte) { line(log, b) })
	}
	go func() {
		if err := keepConsole(h.Console, terminal); err != nil {
			log.Warn("cannot keep the console of a VM", "err", err)
		}
		terminal.Close()
		for _, f := range others {
			f.Close()
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.attended, *process(h))
	}()
}

func openFIFO(path string, mode int) (*os.File, error) {
	return os.OpenFile(path, mode|unix.O_NONBLOCK, 0)
}

func keepConsole(path string, from io.Reader) error {
	if path == "" {
		_, err := io.Copy(io.Discard, from)
		return err
	}
	return console.Copy(path, from)
}

func readLines(f *os.File, line func([]byte)) {
	lines := bufio.NewReaderSize(f, lineLimit)
	for {
		b, err := lines.ReadSlice('\n')
		if len(b) > 0 {
			line(bytes.TrimSpace(b))
		}
		if err != nil && err != bufio.ErrBufferFull { //nolint:errorlint // the reader's own
			return // closed: the VM is gone
		}
	}
}

// warnings bounds what the agent's log gets of a VM: a guest can make Firecracker say a lot, by accesses to ports that
// its machine does not have, or by printing while no agent is there.
type warnings struct {
	until time.Time
	left  int
}

const (
	warningsEvery = time.Minute
	warningsMost  = 5
)

// logLine passes a line of Firecracker's log on.
func (w *warnings) logLine(log *slog.Logger, line []byte) {
	if now := time.Now(); now.After(w.until) {
		w.until, w.left = now.Add(warningsEvery), warningsMost
	}
	if w.left > 0 && strings.Contains(string(line), ":ERROR") {
		w.left--
		log.Warn("firecracker", "says", string(line))
		return
	}
	log.Debug("firecracker", "says", string(line))
}

// logMetrics passes on those counters that tell of trouble. Firecracker writes all of them once a minute.
func logMetrics(log *slog.Logger, line []byte) {
	var groups map[string]json.RawMessage
	if err := json.Unmarshal(line, &groups); err != nil {
		return // cut off
	}
	var told []any
	for group, raw := range groups {
		var counters map[string]any // numbers, but for aggregates
		if json.Unmarshal(raw, &counters) != nil {
			continue // the time stamp
		}
		for name, value := range counters {
			if n, ok := value.(float64); ok && n != 0 && trouble(name) {
				told = append(told, slog.Float64(group+"."+name, n))
			}
		}
	}
	if len(told) > 0 {
		log.Debug("firecracker metrics", told...)
	}
}

func trouble(counter string) bool {
	for _, part := range []string{"fail", "error", "throttled", "panic", "missed", "num_faults"} {
		if strings.Contains(counter, part) {
			return true
		}
	}
	return false
}
