package envd

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

type settingsValues = settings.Values

func readAll(t testing.TB, res *http.Response) string {
	t.Helper()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestHealthNeedsNoToken(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	setToken(t, a, "secret")
	res, body := a.do(t, "GET", "/health", "")
	wantStatus(t, res, body, http.StatusNoContent)
	if v := res.Header.Get("Envd-Version"); v != Version {
		t.Errorf("version %q", v)
	}
}

func setToken(t testing.TB, a *agent, token string) {
	t.Helper()
	if err := a.store.Update(func(v *settingsValues) { v.AccessToken = token }); err != nil {
		t.Fatal(err)
	}
}

func TestTokenIsAskedEverywhere(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	setToken(t, a, "secret")
	for _, c := range []struct{ method, path string }{
		{"GET", "/metrics"}, {"GET", "/envs"}, {"POST", "/init"}, {"POST", "/clock"}, {"GET", "/files?path=/etc/passwd"}, {"POST", "/files?path=x"},
		{"POST", "/files/compose"}, {"POST", "/freeze"}, {"POST", "/unfreeze"}, {"POST", "/fsfreeze"}, {"POST", "/fsthaw"}, {"POST", "/collapse"}, {"POST", "/shutdown"},
	} {
		for _, token := range []string{"", "wrong", "secret2"} {
			res, body := a.do(t, c.method, c.path, "", "X-Access-Token", token)
			wantStatus(t, res, body, http.StatusUnauthorized)
			var e struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal([]byte(body), &e); err != nil || e.Code != http.StatusUnauthorized || e.Message == "" {
				t.Errorf("%s %s: body %q", c.method, c.path, body)
			}
		}
	}
	if done := a.machine.done(); done != "" {
		t.Errorf("done without a token: %s", done)
	}
	wantCode(t, a.run(t, bash("true")).err, connect.CodeUnauthenticated, "X-Access-Token")
	_, err := a.files.Stat(testContext(t), connect.NewRequest(&filesystempb.StatRequest{Path: "/"}))
	wantCode(t, err, connect.CodeUnauthenticated, "X-Access-Token")
	if r := a.run(t, bash("echo in"), "X-Access-Token", "secret"); r.stdout != "in\n" {
		t.Errorf("with the token: %+v", r)
	}
}

func TestInit(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	body := `{"envVars":{"A":"1"},"accessToken":"t1","timestamp":"2026-11-23T10:00:00Z","defaultUser":"user","defaultWorkdir":"/tmp",
		"hostname":"sb1","machineId":"0123456789abcdef0123456789abcdef","entropy":"AAECAw==","nameservers":["172.31.255.1"],"hyperloopIP":"ignored","unknown":1}`
	res, out := a.do(t, "POST", "/init", body)
	wantStatus(t, res, out, http.StatusNoContent)
	id := a.machine.identity
	if id.Hostname != "sb1" || id.MachineID != "0123456789abcdef0123456789abcdef" || string(id.Entropy) != "\x00\x01\x02\x03" ||
		!id.Time.Equal(time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)) || len(id.Nameservers) != 1 {
		t.Errorf("identity %+v", id)
	}
	if got := a.machine.done(); got != "fsthaw assume" {
		t.Errorf("calls %s", got)
	}
	res, out = a.do(t, "POST", "/init", `{"accessToken":"t2"}`)
	wantStatus(t, res, out, http.StatusUnauthorized)
	res, out = a.do(t, "POST", "/init", `{"accessToken":"t2","envVars":{"B":"2"}}`, "X-Access-Token", "t1")
	wantStatus(t, res, out, http.StatusNoContent)
	res, out = a.do(t, "GET", "/envs", "", "X-Access-Token", "t2")
	wantStatus(t, res, out, http.StatusOK)
	if strings.TrimSpace(out) != `{"A":"1","B":"2"}` {
		t.Errorf("envs %s", out)
	}
	if r := a.run(t, bash("pwd"), "X-Access-Token", "t2"); r.stdout != "/tmp\n" {
		t.Errorf("default directory: %+v", r)
	}
}

// A restarted agent knows what its predecessor was told.
func TestSettingsSurviveARestart(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/deep/settings.json"
	first, err := settings.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Update(func(v *settingsValues) { v.AccessToken = "t" }); err != nil {
		t.Fatal(err)
	}
	second, err := settings.Open(path)
	if err != nil || second.Get().Admits("") || !second.Get().Admits("t") || second.Get().User != settings.DefaultUser {
		t.Fatalf("%+v %v", second, err)
	}
}

func TestInitRefuses(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	for _, body := range []string{
		"{", `{"hostname":"a b"}`, `{"hostname":"-a"}`, `{"machineId":"xyz"}`, `{"entropy":"%%%"}`, `{"nameservers":["dns.example"]}`,
		`{"nameservers":["1.1.1.1","1.1.1.1","1.1.1.1","1.1.1.1"]}`, `{"envVars":{"A=B":"c"}}`, `{"defaultUser":"nobody-at-all"}`, `{"timestamp":"yesterday"}`,
		`{"accessToken":"` + strings.Repeat("x", 2000) + `"}`, `{"envVars":{"A":"` + strings.Repeat("x", 2<<20) + `"}}`,
	} {
		res, out := a.do(t, "POST", "/init", body)
		if len(body) > 80 {
			body = body[:80]
		}
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: status %d %s", body, res.StatusCode, out)
		}
	}
	if done := a.machine.done(); done != "" || a.store.Get().AccessToken != "" {
		t.Errorf("a refused init changed something: %s", done)
	}
}

// A time that is told later changes nothing but the clock: it may come while the guest is made to stand still.
func TestClock(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	for _, body := range []string{"", "{}", `{"timestamp":"noon"}`, `{"timestamp":1}`, strings.Repeat(" ", 1<<11) + `{"timestamp":"2026-11-23T10:00:00Z"}`} {
		res, out := a.do(t, "POST", "/clock", body)
		wantStatus(t, res, out, http.StatusBadRequest)
	}
	res, out := a.do(t, "POST", "/clock", `{"timestamp":"2026-11-23T10:00:00Z"}`)
	wantStatus(t, res, out, http.StatusNoContent)
	if got := a.machine.done(); got != "clock:2026-11-23T10:00:00Z" {
		t.Errorf("done: %s", got)
	}
}

func TestMachineRoutes(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	for _, path := range []string{"/fsfreeze", "/fsthaw", "/shutdown", "/freeze", "/unfreeze"} {
		res, out := a.do(t, "POST", path, "")
		wantStatus(t, res, out, http.StatusNoContent)
		res, out = a.do(t, "GET", path, "")
		wantStatus(t, res, out, http.StatusMethodNotAllowed)
	}
	// Shutdown is answered before it is done.
	eventually(t, "the guest is switched off, after the rest", func() bool { return a.machine.done() == "fsfreeze fsthaw poweroff" })
	res, out := a.do(t, "POST", "/freeze?maxWaitMs=10", "")
	wantStatus(t, res, out, http.StatusOK)
	if !strings.Contains(out, `"unobservable":1`) {
		t.Errorf("without cgroups: %s", out)
	}
	res, out = a.do(t, "POST", "/freeze?mode=deep", "")
	wantStatus(t, res, out, http.StatusBadRequest)
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	res, out := newAgent(t).do(t, "GET", "/metrics", "")
	wantStatus(t, res, out, http.StatusOK)
	var m metricsBody
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatal(err)
	}
	if m.CPUCount < 1 || m.MemTotal == 0 || m.MemUsed == 0 || m.MemUsed > m.MemTotal || m.DiskTotal == 0 || m.DiskUsed > m.DiskTotal || m.CPUUsedPct < 0 || m.CPUUsedPct > 100 || m.EnvdVersion != Version {
		t.Errorf("metrics %+v", m)
	}
}

func TestCollapse(t *testing.T) {
	t.Parallel()
	res, out := newAgent(t).do(t, "POST", "/collapse", "")
	wantStatus(t, res, out, http.StatusOK)
	var c collapseResult
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Regions == 0 || c.Chunks != c.Collapsed+c.AlreadyHuge+c.Skipped {
		t.Errorf("%s %v", out, err)
	}
}

func TestUnknownRouteIs404(t *testing.T) {
	t.Parallel()
	res, out := newAgent(t).do(t, "GET", "/nothing", "")
	wantStatus(t, res, out, http.StatusNotFound)
}

// Answers are plain even for clients whose HTTP library accepts gzip.
func TestStreamsAreNotCompressed(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	res, out := a.do(t, "POST", "/process.Process/List", "{}", "Content-Type", "application/json", "Accept-Encoding", "gzip, br", "Connect-Protocol-Version", "1")
	wantStatus(t, res, out, http.StatusOK)
	if enc := res.Header.Get("Content-Encoding"); enc != "" || strings.TrimSpace(out) != "{}" {
		t.Errorf("encoding %q body %q", enc, out)
	}
	if _, err := a.process.List(testContext(t), connect.NewRequest(&processpb.ListRequest{})); err != nil {
		t.Error(err)
	}
}

// The real server speaks HTTP/1.1 and HTTP/2 without TLS on one port, both ways at once, and ends with its
// context.
func TestServe(t *testing.T) {
	t.Parallel()
	store, err := settings.Open("")
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, lis, New(Config{Settings: store, Users: account.System(), Log: slog.New(slog.DiscardHandler)}))
	}()
	for major, set := range map[int]func(*http.Protocols){1: func(p *http.Protocols) { p.SetHTTP1(true) }, 2: func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }} {
		protocols := new(http.Protocols)
		set(protocols)
		client := &http.Client{Transport: &http.Transport{Protocols: protocols}, Timeout: patience}
		res, err := client.Get("http://" + lis.Addr().String() + "/health")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusNoContent || res.ProtoMajor != major {
			t.Errorf("HTTP/%d: status %d over HTTP/%d", major, res.StatusCode, res.ProtoMajor)
		}
		client.CloseIdleConnections()
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}
