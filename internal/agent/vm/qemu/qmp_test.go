//go:build linux

package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
