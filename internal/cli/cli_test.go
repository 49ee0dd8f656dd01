package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// testApp is the program with an environment and nothing behind it.
func testApp(env map[string]string) (*app, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	get := func(name string) string { return env[name] }
	return &app{getenv: get, stdio: Stdio{In: strings.NewReader(""), Out: &out, Err: &errs}, output: "table"}, &out, &errs
}

// run runs a command line without a control plane.
func run(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	get := func(name string) string { return env[name] }
	code = Run(context.Background(), args, get, Stdio{In: strings.NewReader(""), Out: &out, Err: &errs})
	return code, out.String(), errs.String()
}

func TestWhoWeAre(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	stack := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"HOME": home, "WRENN_HOME": stack}
	who := func() string {
		t.Helper()
		a, _, _ := testApp(env)
		acc, err := a.account()
		if err != nil {
			return err.Error()
		}
		return acc.URL + " " + acc.APIKey + " " + acc.Email
	}
	steps := []struct {
		what   string
		change func()
		want   string
	}{
		{"nothing", func() {}, errNotLoggedIn.Error()},
		{"a stack here", func() {
			write(filepath.Join(stack, "env"), "# comment\nWRENN_API_URL=http://here\nWRENN_API_KEY=k1\nWRENN_ADMIN_EMAIL=a@b\nexport WRENN_API_URL\n")
		}, "http://here k1 a@b"},
		{"a login goes before it", func() {
			write(filepath.Join(home, ".config/wrenn/config.json"), `{"url":"http://there","api_key":"k2","email":"c@d"}`)
		}, "http://there k2 c@d"},
		{"the environment goes before both", func() { env["WRENN_API_URL"], env["WRENN_API_KEY"] = "http://env", "k3" }, "http://env k3 "},
	}
	for _, s := range steps {
		s.change()
		if got := who(); got != s.want {
			t.Errorf("%s: %q, want %q", s.what, got, s.want)
		}
	}
}

func TestStackIsFoundAboveHere(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b")
	if err := errors.Join(os.MkdirAll(deep, 0o755), os.Mkdir(filepath.Join(dir, ".wrenn"), 0o755),
		os.WriteFile(filepath.Join(dir, ".wrenn", "stack.json"), []byte("{}"), 0o644)); err != nil {
		t.Fatal(err)
	}
	t.Chdir(deep)
	a, _, _ := testApp(nil)
	if got, err := a.stackHome(); err != nil || got != filepath.Join(dir, ".wrenn") {
		t.Errorf("found %q, %v", got, err)
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int32{"512": 512, "512M": 512, "2G": 2048, "2GiB": 2048, "1t": 1 << 20, "": 0} {
		var got int32
		if err := megabytesOf("--memory", text, &got); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"-1", "0", "1.5G", "G", "12K", "99999999999", "2000000G"} {
		var got int32
		if err := megabytesOf("--memory", text, &got); err == nil {
			t.Errorf("%q was taken for %d MB", text, got)
		}
	}
}

func TestSides(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]side{
		"box:/a/b": {"box", "/a/b"}, "box:": {"box", "."}, "a/b": {"", "a/b"}, "./a:b": {"", "./a:b"}, "-": {"", "-"}, ":x": {"", ":x"},
		"/tmp/a:b": {"", "/tmp/a:b"}, "box:a:b": {"box", "a:b"},
	} {
		if got := parseSide(text); got != want {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
	}
}

func TestTableShowsControlCharactersInsteadOfSendingThem(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	table(&b, []string{"NAME", "COMMAND"}, [][]string{{"x", "evil\x1b]0;title\x07\nnext"}})
	if strings.ContainsAny(b.String(), "\x1b\x07") || strings.Count(b.String(), "\n") != 2 {
		t.Errorf("%q", b.String())
	}
}

// archive makes a tar stream as a hostile sandbox would.
func archive(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		body := "bad"
		if h.Typeflag != tar.TypeReg {
			body = ""
		}
		h.Size = int64(len(body))
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestNothingOfASandboxLandsOutside(t *testing.T) {
	t.Parallel()
	for name, headers := range map[string][]tar.Header{
		"by name":          {{Name: "../escaped", Typeflag: tar.TypeReg}},
		"by absolute name": {{Name: "/escaped", Typeflag: tar.TypeReg}},
		"through a link":   {{Name: "out", Linkname: "..", Typeflag: tar.TypeSymlink}, {Name: "out/escaped", Typeflag: tar.TypeReg}},
		"over a link":      {{Name: "f", Linkname: "../escaped", Typeflag: tar.TypeSymlink}, {Name: "f", Typeflag: tar.TypeReg}},
		"by a hard link":   {{Name: "h", Linkname: "../secret", Typeflag: tar.TypeLink}, {Name: "h", Typeflag: tar.TypeReg}},
		"deep":             {{Name: "d", Typeflag: tar.TypeDir}, {Name: "d/../../escaped", Typeflag: tar.TypeReg}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			outside := t.TempDir()
			inside := filepath.Join(outside, "in")
			if err := errors.Join(os.Mkdir(inside, 0o755), os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600)); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(inside)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			a, _, _ := testApp(nil)
			_ = (&copier{app: a}).unpack(root, archive(t, headers...)) // refusing or containing are both well
			if _, err := os.Lstat(filepath.Join(outside, "escaped")); err == nil {
				t.Error("a file was written outside")
			}
			if raw, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(raw) != "secret" {
				t.Errorf("a file outside was changed: %q, %v", raw, err)
			}
		})
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err  error
		want string
	}{
		{errNotLoggedIn, "wrenn up"},
		{&wrenn.ConnectionError{URL: "http://127.0.0.1:8000", Err: errors.New("refused")}, "wrenn status"},
		{&wrenn.ConnectionError{URL: "https://wrenn.example.com", Err: errors.New("refused")}, "address"},
		{&wrenn.APIError{Code: wrenn.CodeNoCapacity}, "wrenn host ls"},
		{&wrenn.APIError{Code: wrenn.CodeUnauthorized}, "wrenn login"},
	} {
		if got := hint(tc.err); !strings.Contains(got, tc.want) {
			t.Errorf("%v: hint %q, want one with %q", tc.err, got, tc.want)
		}
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	env := map[string]string{"HOME": t.TempDir(), "WRENN_HOME": t.TempDir()}
	for _, tc := range []struct {
		args string
		code int
	}{
		{"--help", 0}, {"sandbox", 0}, {"completion bash", 0}, {"sandbox ls", exitFailure}, {"nonsense", exitUsage},
		{"sandbox get", exitUsage}, {"sandbox ls extra", exitUsage}, {"sandbox ls --nonsense", exitUsage}, {"sandbox exec x true", exitExec},
		{"reset", exitUsage}, {"up --egress sometimes", exitUsage}, {"up --port 70000", exitUsage}, {"down", 0},
	} {
		code, _, stderr := run(t, env, strings.Fields(tc.args)...)
		if code != tc.code {
			t.Errorf("wrenn %s: exit code %d, want %d\n%s", tc.args, code, tc.code, stderr)
		}
		if code != 0 && stderr == "" {
			t.Errorf("wrenn %s failed in silence", tc.args)
		}
	}
}

func TestUpSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	code, _, stderr := run(t, map[string]string{"HOME": t.TempDir(), "WRENN_HOME": t.TempDir(), "WRENN_BIN": t.TempDir()}, "up")
	if code != exitFailure || !strings.Contains(stderr, "wrenn-cp is missing: run `make build` first") {
		t.Errorf("code %d, %s", code, stderr)
	}
}

func TestRemoteExitCodes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		exit wrenn.Exit
		want int
	}{{wrenn.Exit{Code: 0}, 0}, {wrenn.Exit{Code: 7}, 7}, {wrenn.Exit{Code: 137, Signal: "SIGKILL"}, 137}, {wrenn.Exit{Code: -1, TimedOut: true}, exitTimedOut}, {wrenn.Exit{Code: 300}, 1}} {
		got := 0
		var e *exitError
		if errors.As(remoteExit(&tc.exit), &e) {
			got = e.code
		}
		if got != tc.want {
			t.Errorf("%+v: %d, want %d", tc.exit, got, tc.want)
		}
	}
}

func TestStepsWithoutATerminal(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	var p localstack.Progress = newSteps(&b)
	done := p.Step("PostgreSQL")
	done("started", nil)
	done("twice is once", nil)
	p.Step("Redis")("", errors.New("no"))
	text := b.String()
	if strings.Count(text, "\n") != 2 || !strings.Contains(text, "✓ PostgreSQL") || !strings.Contains(text, "✗ Redis") || strings.Contains(text, "\r") {
		t.Errorf("%q", text)
	}
}

func TestAge(t *testing.T) {
	t.Parallel()
	for ago, want := range map[time.Duration]string{5 * time.Second: "5s", 90 * time.Second: "1m", 3 * time.Hour: "3h", 72 * time.Hour: "3d", -time.Hour: "0s"} {
		if got := age(time.Now().Add(-ago)); got != want {
			t.Errorf("%v ago: %q, want %q", ago, got, want)
		}
	}
}

// Not on a terminal there is a line for each step, and of what is counted one a second; with -o json nothing.
func TestShowing(t *testing.T) {
	t.Parallel()
	a, _, errs := testApp(nil)
	o := &operation{w: errs, what: "saving the sandbox"}
	for _, p := range []api.Progress{
		{Step: "saving_memory", Done: 1 << 20, Total: 512 << 20, Unit: api.ProgressUnitBytes},
		{Step: "saving_memory", Done: 2 << 20, Total: 512 << 20, Unit: api.ProgressUnitBytes},
		{Step: "starting_children", Done: 1, Total: 5, Unit: api.ProgressUnitSandboxes},
		{Step: "making_durable\x1b[2J"},
	} {
		o.tell(p)
	}
	want := "  … saving the sandbox: saving memory, 1.0 MiB of 512.0 MiB\n  … saving the sandbox: starting children, 1 of 5\n  … saving the sandbox: making durable·[2J\n"
	if errs.String() != want {
		t.Errorf("it shows %q", errs)
	}
	a.output = "json"
	ctx, done := a.showing(t.Context(), "creating the sandbox")
	done()
	if ctx != t.Context() || errs.String() != want {
		t.Errorf("with -o json: %q", errs)
	}
}
