//go:build linux

package uffd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		programs := map[string]func([]string) error{Command: Main, "client": clientMain, "agent": agentMain}
		if run, ok := programs[os.Args[1]]; ok {
			if err := run(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			return
		}
	}
	goleak.VerifyTestMain(m)
}

// served is a memory file, of which page n is full of n+1, but for a hole.
type served struct {
	dir, memory, touches string
	link                 string // to dir: short enough for the address of a socket
}

const (
	halfPages = 256 // of each region
	allPages  = 2 * halfPages
	holeStart = 40
	holeEnd   = 48
)

func serveFile(t *testing.T) served {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: pid namespaces")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("a-path-that-is-longer-than-the-address-of-a-socket-", 3))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	short, err := os.MkdirTemp("", "uffd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	s := served{dir, filepath.Join(dir, "memory"), filepath.Join(dir, "touches"), filepath.Join(short, "dir")}
	if err := os.Symlink(dir, s.link); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(s.memory)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, pageSize)
	for n := range allPages {
		if n >= holeStart && n < holeEnd {
			continue
		}
		fillPage(page, uint64(n+1))
		if _, err := f.WriteAt(page, int64(n*pageSize)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// content is what a page must read as.
func content(page int) string {
	if page >= holeStart && page < holeEnd {
		return "0"
	}
	return strconv.Itoa(page + 1)
}

// start launches a server, and a client beneath it that is told what to do at control.
func (s served) start(control *os.File) (server, client *vmproc.Process, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	name := fmt.Sprintf("%d.sock", time.Now().UnixNano())
	server, err = Launch(Options{
		Program: []string{self}, ID: "test", Memory: s.memory, Touches: s.touches, Socket: filepath.Join(s.dir, name), Stderr: os.Stderr,
	})
	if err != nil {
		return nil, nil, err
	}
	client, err = vmproc.Launch(vmproc.Spec{
		Path: self, Args: []string{"client", filepath.Join(s.link, name), strconv.Itoa(halfPages)},
		Files: []*os.File{control}, Stderr: os.Stderr, Beneath: server,
	})
	return server, client, err
}

// vmm is a client under test.
type vmm struct {
	*testing.T
	server, client *vmproc.Process
	control        net.Conn
	answers        *bufio.Reader
	reaped         chan struct{}
}

func (s served) run(t *testing.T) *vmm {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	v := &vmm{T: t, reaped: make(chan struct{})}
	if v.control, err = net.FileConn(ours); err != nil {
		t.Fatal(err)
	}
	v.answers = bufio.NewReader(v.control)
	if v.server, v.client, err = s.start(theirs); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.reaped)
		_, _ = v.client.Reap(), v.server.Reap()
	}()
	t.Cleanup(v.end)
	return v
}

// end ends the client, upon which the server must end by itself.
func (v *vmm) end() {
	v.Helper()
	v.control.Close()
	if err := v.client.Kill(context.Background()); err != nil {
		v.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := v.server.Wait(ctx); err != nil {
		v.Errorf("the server lives on without its client: %v", err)
		_ = v.server.Kill(context.Background())
	}
	<-v.reaped
}

func (v *vmm) tell(command string) {
	v.Helper()
	if _, err := fmt.Fprintln(v.control, command); err != nil {
		v.Fatal(err)
	}
}

func (v *vmm) ask(command string) string {
	v.Helper()
	v.tell(command)
	_ = v.control.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, err := v.answers.ReadString('\n')
	if err != nil {
		v.Fatalf("%s: %v", command, err)
	}
	return strings.TrimSpace(line)
}

func (v *vmm) expect(command, want string) {
	v.Helper()
	if got := v.ask(command); got != want {
		v.Errorf("%s: %q, want %q", command, got, want)
	}
}

func (v *vmm) reads(pages ...int) {
	v.Helper()
	for _, page := range pages {
		v.expect(fmt.Sprintf("read %d", page), content(page))
	}
}

func words(pages []int) string { return strings.Trim(fmt.Sprint(pages), "[]") }

func TestEveryPageIsTheFiles(t *testing.T) {
	v := serveFile(t).run(t)
	v.expect("present", "")
	for page := range allPages {
		v.reads((page*37 + 11) % allPages)
	}
}

func TestACrowdOfThreadsGetsItsPages(t *testing.T) {
	s := serveFile(t)
	for range 3 { // the second knows the first's touches
		v := s.run(t)
		v.expect("crowd", "ok")
		v.end()
	}
}

func TestRemovedPagesAreZero(t *testing.T) {
	v := serveFile(t).run(t)
	v.reads(1, 2, 3, 270)
	v.expect("write 2 99", "ok")
	for _, page := range []string{"2", "3", "270", "300"} { // of the last nothing is there yet
		v.expect("remove "+page, "ok")
	}
	v.reads(1)
	for _, page := range []string{"2", "3", "270", "300"} {
		v.expect("read "+page, "0")
	}
	v.expect("write 3 77", "ok")
	v.expect("read 3", "77")
	for range 50 { // the kernel refuses pages while it takes others out
		v.expect("remove 3", "ok")
		v.expect("read 3", "0")
	}
	v.reads(4, 6, 269, 271, 299, 301)
}

func TestWhatWasTouchedIsThereTheNextTime(t *testing.T) {
	s := serveFile(t)
	order := []int{400, 3, 41, 100, 500, 200, 260}
	first := s.run(t)
	second := s.run(t) // meanwhile: it must not disturb the notes
	second.reads(7, 8, 90)
	first.reads(order...)
	first.end()
	f, err := os.Open(s.touches)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	noted, err := readTouches(f, allPages*pageSize)
	if want := []uint32{25, 0, 2, 6, 31, 12, 16}; err != nil || !slices.Equal(noted, want) {
		t.Fatalf("noted %v, %v; want %v", noted, err, want)
	}
	var want []int
	for _, block := range slices.Sorted(slices.Values(noted)) {
		for page := range blockPages {
			want = append(want, int(block)*blockPages+page)
		}
	}
	third := s.run(t)
	for deadline := time.Now().Add(10 * time.Second); ; {
		got := third.ask("present")
		if got == words(want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there is %q, want %q", got, words(want))
		}
	}
	third.reads(order...)
	third.reads(0, 80, 511)
}

func TestTouchesAreSavedWhileTheVMRuns(t *testing.T) {
	s := serveFile(t)
	v := s.run(t)
	v.reads(9, 30, 10)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) { // nothing tells when a file has changed
		if f, err := os.Open(s.touches); err == nil {
			noted, err := readTouches(f, allPages*pageSize)
			f.Close()
			if err == nil && slices.Equal(noted, []uint32{0, 1}) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("no touches were saved")
		}
	}
}

// TestTheClientDiesWithItsServer has a fault wait while its server is killed: it must never be answered.
func TestTheClientDiesWithItsServer(t *testing.T) {
	v := serveFile(t).run(t)
	v.reads(1)
	if err := unix.Kill(v.server.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	v.tell("read 200")
	_ = v.control.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if line, err := v.answers.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("without a server the page is %q, %v", line, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := unix.Kill(v.server.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := v.client.Wait(ctx); err != nil {
		t.Errorf("the client lives on: %v", err)
	}
	_ = v.control.SetReadDeadline(time.Time{})
	if line, err := v.answers.ReadString('\n'); err == nil {
		t.Errorf("after its server's death the client read %q", line)
	}
}

// agentMain starts a server and its client, tells what they are, and waits to be killed.
func agentMain(args []string) error {
	r, _, err := os.Pipe()
	if err != nil {
		return err
	}
	s := served{dir: args[0], memory: args[1], link: args[2]}
	server, client, err := s.start(r)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode([]*vmproc.Process{server, client}); err != nil {
		return err
	}
	_, err = io.ReadAll(os.Stdin)
	return err
}

func TestTheClientDiesWithItsServerWhenNoAgentLives(t *testing.T) {
	s := serveFile(t)
	agent := exec.CommandContext(t.Context(), os.Args[0], "agent", s.dir, s.memory, s.link)
	agent.Stderr = os.Stderr
	stdin, err := agent.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	var both []*vmproc.Process
	if err = json.NewDecoder(out).Decode(&both); err != nil {
		t.Fatal(err)
	}
	_ = agent.Process.Kill()
	_ = agent.Wait()
	for _, p := range both {
		if alive, err := p.Alive(); err != nil || !alive {
			t.Fatalf("%d did not outlive its agent: %v", p.PID, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := unix.Kill(both[0].PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := both[1].Wait(ctx); err != nil {
		t.Errorf("the client lives on: %v", err)
	}
}
