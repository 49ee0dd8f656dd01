package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

func TestMain(m *testing.M) { os.Exit(storetest.Run(m)) }

// screen is a terminal that several goroutines may write to.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func run(ctx context.Context, env map[string]string, in string, args ...string) (stdout, stderr *screen, err error) {
	stdout, stderr = &screen{}, &screen{}
	return stdout, stderr, Run(ctx, args, func(k string) string { return env[k] }, Stdio{strings.NewReader(in), stdout, stderr})
}

func goodEnv(t *testing.T) map[string]string {
	t.Helper()
	return map[string]string{
		"DATABASE_URL": storetest.EmptyDatabase(t), "REDIS_URL": storetest.Redis(t), "JWT_SECRET": strings.Repeat("s", 32),
		"WRENN_ENCRYPTION_KEY": strings.Repeat("ab", 32), "CP_LISTEN_ADDR": "127.0.0.1:0",
	}
}

func TestMisconfigurationNamesTheVariable(t *testing.T) {
	t.Parallel()
	for variable, value := range map[string]string{
		"DATABASE_URL": "", "REDIS_URL": "", "JWT_SECRET": "short", "WRENN_ENCRYPTION_KEY": "xyz", "CP_LISTEN_ADDR": "8000", "LOG_LEVEL": "loud",
		"CP_CA_FILE": "/no/such/file", "CP_PUBLIC_URL": "not a url", "CP_SIGNUP": "perhaps", "CP_TRUSTED_PROXIES": "10.0.0.1", "CP_CPU_OVERCOMMIT": "0",
		"CP_DISK_OVERCOMMIT": "x", "CP_MEMORY_RESERVE_MB": "-1",
	} {
		t.Run(variable, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"DATABASE_URL": "postgres://x/y", "REDIS_URL": "redis://x", "JWT_SECRET": strings.Repeat("s", 32), "WRENN_ENCRYPTION_KEY": strings.Repeat("ab", 32)}
			env[variable] = value
			_, _, err := run(t.Context(), env, "")
			if err == nil || !strings.Contains(err.Error(), variable) || strings.Count(err.Error(), "\n") != 0 {
				t.Errorf("said %v", err)
			}
		})
	}
	_, _, err := run(t.Context(), nil, "")
	for _, want := range []string{"DATABASE_URL", "REDIS_URL", "JWT_SECRET", "WRENN_ENCRYPTION_KEY", "openssl rand -hex 32"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("with nothing set, %s is not named: %v", want, err)
		}
	}
}

func TestHelpDocumentsTheEnvironment(t *testing.T) {
	t.Parallel()
	out, _, err := run(t.Context(), nil, "", "--help")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("config.go")
	if err != nil {
		t.Fatal(err)
	}
	read := regexp.MustCompile(`env\("([A-Z_]+)"\)`).FindAllStringSubmatch(string(source), -1)
	if len(read) < 10 {
		t.Fatalf("found %d variables in config.go", len(read))
	}
	for _, m := range read {
		if !strings.Contains(out.String(), m[1]) {
			t.Errorf("%s is not in --help", m[1])
		}
	}
}

// program is a running wrenn-cp.
type program struct {
	t    *testing.T
	errs *screen
	done chan error
	stop func() error
}

func start(t *testing.T, env map[string]string) *program {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := &program{t: t, errs: &screen{}, done: make(chan error, 1)}
	go func() {
		p.done <- Run(ctx, nil, func(k string) string { return env[k] }, Stdio{strings.NewReader(""), io.Discard, p.errs})
	}()
	p.stop = sync.OnceValue(func() error {
		cancel()
		return <-p.done
	})
	t.Cleanup(func() { _ = p.stop() })
	return p
}

// url waits until the program serves.
func (p *program) url() string {
	p.t.Helper()
	listen := regexp.MustCompile(`listen=(\S+)`)
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if m := listen.FindStringSubmatch(p.errs.String()); m != nil {
			return "http://" + m[1]
		}
		select {
		case err := <-p.done:
			p.done <- err
			p.t.Fatalf("ended: %v\n%s", err, p.errs)
		case <-deadline:
			p.t.Fatalf("did not come up:\n%s", p.errs)
		case <-tick.C:
		}
	}
}

func post(t *testing.T, url, body string, out any) int {
	t.Helper()
	res, err := http.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if out != nil {
		if err := json.Unmarshal(raw, out); err != nil {
			t.Fatalf("%v: %s", err, raw)
		}
	}
	return res.StatusCode
}

func TestFromNothingToAdmin(t *testing.T) {
	t.Parallel()
	env := goodEnv(t)
	if _, _, err := run(t.Context(), env, "", "migrate"); err != nil {
		t.Fatal(err)
	}
	out, _, err := run(t.Context(), env, "", "admin", "create", "--email", "Made@Example.com")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`password: (\S+)`).FindStringSubmatch(out.String())
	if m == nil || len(m[1]) < 20 {
		t.Fatalf("said %s", out)
	}
	if out, _, err = run(t.Context(), env, "a password of mine\n", "admin", "create", "--email", "given@example.com", "--password-stdin"); err != nil || strings.Contains(out.String(), "mine") {
		t.Fatal(out, err)
	}
	cp := start(t, env)
	url := cp.url()
	for email, password := range map[string]string{"made@example.com": m[1], "given@example.com": "a password of mine"} {
		var s struct {
			User struct {
				IsAdmin bool `json:"is_admin"`
			}
		}
		if status := post(t, url+"/v1/auth/login", fmt.Sprintf(`{"email":%q,"password":%q}`, email, password), &s); status != 200 || !s.User.IsAdmin {
			t.Errorf("%s: %d %+v", email, status, s)
		}
	}
	// An account that exists becomes an admin, with the new password.
	if status := post(t, url+"/v1/auth/signup", `{"email":"later@example.com","password":"first password"}`, nil); status != 201 {
		t.Fatal(status)
	}
	if _, _, err := run(t.Context(), env, "second password", "admin", "create", "--email", "later@example.com", "--password-stdin"); err != nil {
		t.Fatal(err)
	}
	for password, want := range map[string]int{"first password": 401, "second password": 200} {
		if got := post(t, url+"/v1/auth/login", fmt.Sprintf(`{"email":"later@example.com","password":%q}`, password), nil); got != want {
			t.Errorf("%s: %d", password, got)
		}
	}
	if err := cp.stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
	for _, bad := range [][]string{{"--email", "nobody"}, {"--email", "a@"}, {}, {"--email", "a@b.c", "--password-stdin"}} {
		if _, _, err := run(t.Context(), env, "short", append([]string{"admin", "create"}, bad...)...); err == nil {
			t.Errorf("admin create %v was taken", bad)
		}
	}
}

// Replicas that start at once share one CA; a replica with another key says so.
func TestReplicasShareTheCA(t *testing.T) {
	t.Parallel()
	env := goodEnv(t)
	for _, p := range []*program{start(t, env), start(t, env), start(t, env)} {
		p.url()
	}
	env = maps.Clone(env)
	env["WRENN_ENCRYPTION_KEY"] = strings.Repeat("cd", 32)
	if _, _, err := run(t.Context(), env, ""); err == nil || !strings.Contains(err.Error(), "WRENN_ENCRYPTION_KEY") {
		t.Errorf("with another key: %v", err)
	}
	ca, err := rpc.NewCA(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text, err := ca.PEM()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	env["CP_CA_FILE"] = file
	delete(env, "WRENN_ENCRYPTION_KEY")
	start(t, maps.Clone(env)).url()
	if err := os.WriteFile(file, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := run(t.Context(), env, ""); err == nil || !strings.Contains(err.Error(), "CP_CA_FILE") {
		t.Errorf("with a file that holds none: %v", err)
	}
}

func TestAddressInUse(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	env := goodEnv(t)
	env["CP_LISTEN_ADDR"] = ln.Addr().String()
	if _, _, err := run(t.Context(), env, ""); err == nil || !strings.Contains(err.Error(), "CP_LISTEN_ADDR") {
		t.Errorf("%v", err)
	}
}
