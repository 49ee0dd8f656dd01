//go:build linux

package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

const greeting = `{"QMP":{"version":{},"capabilities":[]}}`

// serveQMP plays QEMU: it greets, and answers each line with what answer returns; "" hangs up.
func serveQMP(t *testing.T, greeting string, answer func(line string) string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, greeting)
			lines := bufio.NewScanner(conn)
			for lines.Scan() {
				text := answer(lines.Text())
				if text == "" {
					break
				}
				fmt.Fprintln(conn, text)
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return path
}

func TestMonitorPassesOverEventsAndReadsAnswers(t *testing.T) {
	t.Parallel()
	socket := serveQMP(t, greeting, func(line string) string {
		if strings.Contains(line, "qmp_capabilities") {
			return `{"return":{}}`
		}
		return `{"event":"STOP","timestamp":{}}` + "\n" + `{"return":{"running":true,"status":"running"}}`
	})
	m, err := connect(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	status, err := m.status(t.Context())
	if err != nil || !status.Running {
		t.Errorf("%+v, %v", status, err)
	}
}

func TestMonitorTellsRefusalsApart(t *testing.T) {
	t.Parallel()
	socket := serveQMP(t, greeting, func(line string) string {
		if strings.Contains(line, "qmp_capabilities") {
			return `{"return":{}}`
		}
		return `{"error":{"class":"GenericError","desc":"no such luck"}}`
	})
	m, err := connect(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	var refused *qmpError
	if err := m.execute(t.Context(), "cont", nil, nil); !errors.As(err, &refused) || refused.Command != "cont" || refused.Desc != "no such luck" {
		t.Errorf("%v", err)
	}
}

func TestMonitorWithstandsABadPeer(t *testing.T) {
	t.Parallel()
	ok := `{"return":{}}`
	for name, peer := range map[string]struct {
		greeting string
		answer   func(string) string
	}{
		"no JSON":            {"hello", func(string) string { return ok }},
		"no greeting":        {ok, func(string) string { return ok }},
		"hangs up":           {greeting, func(string) string { return "" }},
		"endless line":       {greeting, func(string) string { return strings.Repeat("x", qmpLine+10) }},
		"endless events":     {greeting, func(string) string { return strings.Repeat(`{"event":"X"}`+"\n", qmpEvents+1) + ok }},
		"another JSON value": {greeting, func(string) string { return "[1,2]" }},
	} {
		m, err := connect(t.Context(), serveQMP(t, peer.greeting, peer.answer))
		if err == nil {
			m.close()
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestMonitorEndsWithItsContext(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	release := make(chan struct{})
	socket := serveQMP(t, greeting, func(line string) string {
		if strings.Contains(line, "qmp_capabilities") {
			return `{"return":{}}`
		}
		asked <- struct{}{}
		<-release
		return ""
	})
	defer close(release)
	m, err := connect(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	begun := time.Now()
	if err := m.execute(ctx, "stop", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if took := time.Since(begun); took > qmpTimeout/2 {
		t.Errorf("it took %s", took)
	}
}

func FuzzMonitorMessage(f *testing.F) {
	for _, s := range []string{greeting, `{"return":{}}`, `{"event":"STOP"}`, `{"error":{"class":"a","desc":"b"}}`, "[]", "", "{"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		line, err := readLine(bufio.NewReaderSize(strings.NewReader(string(b)), 16), 64)
		if len(line) > 64 {
			t.Errorf("a line of %d bytes, %v", len(line), err)
		}
		if msg, err := parseMessage(b); err == nil && msg.Error != nil {
			_ = msg.Error.Error()
		}
	})
}

func FuzzStateHeader(f *testing.F) {
	f.Add([]byte(stateMagic + `{"version":"7.2.22","vcpus":1}` + "\nQEVM"))
	f.Add([]byte(stateMagic + "\n"))
	f.Add([]byte("QEVM"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, n, err := parseHeader(b); err == nil && (n <= len(stateMagic) || n > len(b) || b[n-1] != '\n') {
			t.Errorf("the header of %q ends at %d", b, n)
		}
	})
}

func TestAConnectionIsKeptForWhatComesNext(t *testing.T) {
	t.Parallel()
	var connected atomic.Int32
	socket := serveQMP(t, greeting, func(line string) string {
		switch {
		case strings.Contains(line, "qmp_capabilities"):
			connected.Add(1)
		case strings.Contains(line, "no"):
			return `{"error":{"class":"GenericError","desc":"no"}}`
		}
		return `{"return":{}}`
	})
	boot, err := vmproc.BootID()
	stat, statErr := os.ReadFile("/proc/self/stat")
	if err := errors.Join(err, statErr); err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // from the third of proc(5) on
	started, err := strconv.ParseUint(fields[22-3], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	d := New(Verdict{KVM: true}, Options{})
	h := vm.Handle{Socket: socket, PID: os.Getpid(), StartTime: started, BootID: boot}
	say := func(command string) func(*monitor) error {
		return func(m *monitor) error { return m.execute(t.Context(), command, nil, nil) }
	}
	for i, step := range []struct {
		command string
		refused bool
		total   int32
	}{{"stop", false, 1}, {"cont", false, 1}, {"no", true, 1}, {"stop", false, 2}} {
		err := d.talk(t.Context(), h, say(step.command))
		if (err != nil) != step.refused || connected.Load() != step.total {
			t.Fatalf("step %d, %s: %v, %d connections so far", i, step.command, err, connected.Load())
		}
	}
	// One that another waits for is not kept: QEMU serves one at a time.
	other := make(chan error, 1)
	err = d.talk(t.Context(), h, func(m *monitor) error {
		go func() { other <- d.talk(t.Context(), h, say("stop")) }()
		for waits := false; !waits; runtime.Gosched() {
			d.lines.mu.Lock()
			waits = d.lines.of[*process(h)].users == 2
			d.lines.mu.Unlock()
		}
		return say("stop")(m)
	})
	if err := errors.Join(err, <-other); err != nil {
		t.Error(err)
	}
}
