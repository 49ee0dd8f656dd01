package envd

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/boot"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	"github.com/wrenn-sandbox/wrenn/internal/gen/filesystem/filesystemconnect"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
)

// patience bounds every test's waiting; nothing waits that long when it works.
const patience = 30 * time.Second

// agent is a whole guest agent on loopback. Its user database knows "user" (who runs the test, at home in
// a directory of the test) and, when root runs the test, "other" with two supplementary groups.
type agent struct {
	url     string
	home    string
	store   *settings.Store
	machine *fakeMachine
	process processconnect.ProcessClient
	files   filesystemconnect.FilesystemClient
}

// fakeMachine remembers what was done to it.
type fakeMachine struct {
	mu       sync.Mutex
	identity boot.Identity
	calls    []string
}

func (m *fakeMachine) did(what string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, what)
	return nil
}

// done lists what was done, in order.
func (m *fakeMachine) done() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.calls, " ")
}

func (m *fakeMachine) Assume(id boot.Identity) error {
	m.mu.Lock()
	m.identity = id
	m.mu.Unlock()
	return m.did("assume")
}
func (m *fakeMachine) AdvanceClock(to time.Time) error {
	return m.did("clock:" + to.Format(time.RFC3339))
}
func (m *fakeMachine) PowerOff() error { return m.did("poweroff") }
func (m *fakeMachine) FreezeFS() error { return m.did("fsfreeze") }
func (m *fakeMachine) ThawFS() error   { return m.did("fsthaw") }

const (
	otherUID = 65531
	otherGID = 65532
)

func newAgent(t testing.TB) *agent {
	t.Helper()
	// Not t.TempDir, which other users may not enter.
	dir, err := os.MkdirTemp("", "envd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	a := &agent{home: filepath.Join(dir, "home"), machine: &fakeMachine{}}
	if err := os.Mkdir(a.home, 0o755); err != nil {
		t.Fatal(err)
	}
	db := account.Database{Passwd: filepath.Join(dir, "passwd"), Group: filepath.Join(dir, "group")}
	writeFile(t, db.Passwd, fmt.Sprintf("user:x:%d:%d::%s:/bin/bash\nother:x:%d:%d::/tmp:/bin/bash\n", os.Getuid(), os.Getgid(), a.home, otherUID, otherGID))
	writeFile(t, db.Group, fmt.Sprintf("user:x:%d:\nother:x:%d:\nextra:x:65530:other\nmore:x:65529:nobody,other\n", os.Getgid(), otherGID))
	if a.store, err = settings.Open(filepath.Join(dir, "settings.json")); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(New(Config{Settings: a.store, Users: db, Machine: a.machine, Log: slog.New(slog.DiscardHandler)}))
	t.Cleanup(srv.Close)
	a.url = srv.URL
	a.process = processconnect.NewProcessClient(srv.Client(), a.url, connect.WithProtoJSON())
	a.files = filesystemconnect.NewFilesystemClient(srv.Client(), a.url)
	return a
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// cancelContext has no deadline: a deadline would be sent as the command's time limit.
func cancelContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	timer := time.AfterFunc(patience, cancel)
	t.Cleanup(func() { timer.Stop(); cancel() })
	return ctx
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func basic(user string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"))
}

// do makes one HTTP request and gives the answer with its whole body.
func (a *agent) do(t testing.TB, method, path, body string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(testContext(t), method, a.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := (&http.Transport{DisableCompression: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var b strings.Builder
	if _, err := fmt.Fprint(&b, readAll(t, res)); err != nil {
		t.Fatal(err)
	}
	return res, b.String()
}

func wantStatus(t testing.TB, res *http.Response, body string, want int) {
	t.Helper()
	if res.StatusCode != want {
		t.Fatalf("%s %s: status %d, want %d; body %s", res.Request.Method, res.Request.URL, res.StatusCode, want, body)
	}
}

// result is a command's whole life as its reader saw it.
type result struct {
	pid            uint32
	stdout, stderr string
	pty            string
	keepalives     int
	end            *processpb.ProcessEvent_EndEvent
	err            error
}

// events is what Start and Connect streams have in common.
type events interface {
	Receive() bool
	Err() error
	Close() error
}

// follow reads a stream to its end, and checks the order of its events. A stream whose start was read
// already gives none.
func follow[M interface {
	GetEvent() *processpb.ProcessEvent
}](t testing.TB, stream interface {
	events
	Msg() M
}) result {
	t.Helper()
	defer stream.Close()
	var r result
	var out, errs, tty strings.Builder
	for n := 0; stream.Receive(); n++ {
		if r.end != nil {
			t.Error("an event after end")
		}
		switch ev := stream.Msg().GetEvent().GetEvent().(type) {
		case *processpb.ProcessEvent_Start:
			if n != 0 {
				t.Error("start is not the first event")
			}
			r.pid = ev.Start.GetPid()
		case *processpb.ProcessEvent_Data:
			out.Write(ev.Data.GetStdout())
			errs.Write(ev.Data.GetStderr())
			tty.Write(ev.Data.GetPty())
		case *processpb.ProcessEvent_End:
			r.end = ev.End
		case *processpb.ProcessEvent_Keepalive:
			r.keepalives++
		}
	}
	r.stdout, r.stderr, r.pty, r.err = out.String(), errs.String(), tty.String(), stream.Err()
	return r
}

func bash(script string) *processpb.StartRequest {
	return &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}}
}

// run starts a command and follows it to its end.
func (a *agent) run(t testing.TB, msg *processpb.StartRequest, header ...string) result {
	t.Helper()
	stream := a.start(t, cancelContext(t), msg, header...)
	return follow(t, stream)
}

func (a *agent) start(t testing.TB, ctx context.Context, msg *processpb.StartRequest, header ...string) *connect.ServerStreamForClient[processpb.StartResponse] {
	t.Helper()
	req := connect.NewRequest(msg)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header().Set(header[i], header[i+1])
	}
	stream, err := a.process.Start(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// begin starts a command and reads its first event.
func (a *agent) begin(t testing.TB, ctx context.Context, msg *processpb.StartRequest) (*connect.ServerStreamForClient[processpb.StartResponse], *processpb.ProcessSelector) {
	t.Helper()
	stream := a.start(t, ctx, msg)
	if !stream.Receive() {
		t.Fatalf("no start event: %v", stream.Err())
	}
	pid := stream.Msg().GetEvent().GetStart().GetPid()
	return stream, &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: pid}}
}

func wantCode(t testing.TB, err error, want connect.Code, text string) {
	t.Helper()
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.Code() != want || !strings.Contains(ce.Message(), text) {
		t.Fatalf("error %v, want code %v and a message with %q", err, want, text)
	}
}

// eventually waits for a condition outside of our reach, such as another process being gone.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}
