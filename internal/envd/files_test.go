package envd

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

const octets = "application/octet-stream"

func (a *agent) upload(t testing.TB, path, body string, header ...string) (*http.Response, string) {
	t.Helper()
	return a.do(t, "POST", "/files?path="+url.QueryEscape(path), body, append([]string{"Content-Type", octets}, header...)...)
}

func TestUploadMakesParentsAndAnswersEntries(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	res, out := a.upload(t, "deep/er/file.txt", "hello")
	wantStatus(t, res, out, http.StatusOK)
	path := filepath.Join(a.home, "deep/er/file.txt")
	if want := fmt.Sprintf(`[{"path":%q,"name":"file.txt","type":"file"}]`, path); strings.TrimSpace(out) != want {
		t.Errorf("answer %s, want %s", out, want)
	}
	if raw, err := os.ReadFile(path); err != nil || string(raw) != "hello" {
		t.Errorf("content %q %v", raw, err)
	}
	res, out = a.upload(t, path, "bye")
	wantStatus(t, res, out, http.StatusOK)
	res, out = a.do(t, "GET", "/files?path="+url.QueryEscape(path), "")
	wantStatus(t, res, out, http.StatusOK)
	if out != "bye" || res.Header.Get("Content-Type") != octets || res.Header.Get("Content-Length") != "3" {
		t.Errorf("download %q %v", out, res.Header)
	}
}

func TestUploadOwnership(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: files of another user")
	}
	a := newAgent(t)
	dir := filepath.Join(a.home, "new")
	res, out := a.do(t, "POST", "/files?username=other&path="+url.QueryEscape(dir+"/f"), "x", "Content-Type", octets)
	wantStatus(t, res, out, http.StatusOK)
	for _, p := range []string{dir, dir + "/f"} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if sys := st.Sys().(*syscall.Stat_t); sys.Uid != otherUID || sys.Gid != otherGID {
			t.Errorf("%s belongs to %d:%d", p, sys.Uid, sys.Gid)
		}
	}
}

func TestUploadRefuses(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	if err := unix.Mkfifo(filepath.Join(a.home, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(a.home, "plain"), "x")
	for _, c := range []struct {
		name, query string
		header      []string
		status      int
		text        string
	}{
		{"directory", "path=.", nil, 400, "is a directory"},
		{"no path", "", nil, 400, "path is missing"},
		{"below a file", "path=plain/x", nil, 400, "is not a directory"},
		{"pipe", "path=pipe", nil, 400, "path '"},
		{"long path", "path=" + strings.Repeat("a", 5000), nil, 400, "longer than"},
		{"long name", "path=" + strings.Repeat("a", 300), nil, 400, "name too long"},
		{"NUL", "path=a%00b", nil, 400, "NUL"},
		{"unknown user", "path=x&username=nobody-at-all", nil, 401, "unknown user"},
		{"bad query", "path=%zz", nil, 400, "query"},
		{"other type", "path=x", []string{"Content-Type", "text/plain"}, 400, "is not taken"},
		{"no boundary", "path=x", []string{"Content-Type", "multipart/form-data"}, 400, "boundary"},
		{"encoding", "path=x", []string{"Content-Encoding", "br"}, 400, "Content-Encoding"},
		{"not gzip", "path=x", []string{"Content-Encoding", "gzip"}, 400, "gzip"},
		{"metadata value", "path=x", []string{"X-Metadata-K", "\xff"}, 400, "US-ASCII"},
		{"metadata size", "path=x", []string{"X-Metadata-K", strings.Repeat("v", 4096)}, 400, "at most 4096"},
		{"metadata key", "path=x", []string{"X-Metadata-" + strings.Repeat("k", 247), "v"}, 400, "longer than 246"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			res, out := a.do(t, "POST", "/files?"+c.query, "body", append([]string{"Content-Type", octets}, c.header...)...)
			wantStatus(t, res, out, c.status)
			if !strings.Contains(out, c.text) {
				t.Errorf("message %s, want %q", out, c.text)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(a.home, "x")); err == nil {
		t.Error("a refused upload left a file")
	}
}

func TestBrokenUploadLeavesNoHalfFile(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	conn := a.dial(t)
	fmt.Fprintf(conn, "POST /files?path=half HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: 100\r\n\r\nonly this", octets)
	path := filepath.Join(a.home, "half")
	eventually(t, "the upload has begun", func() bool { _, err := os.Stat(path); return err == nil })
	conn.Close()
	eventually(t, "the half file is removed", func() bool { _, err := os.Stat(path); return err != nil })
}

// On a full file system: 507, and a file that was there keeps its content.
func TestFullDiskIs507(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	dir := filepath.Join(a.home, "small")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("needs root: mounting a small file system: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	res, out := a.upload(t, "small/kept", "old")
	wantStatus(t, res, out, http.StatusOK)
	big := strings.Repeat("x", 200<<10)
	res, out = a.upload(t, "small/kept", big)
	wantStatus(t, res, out, http.StatusInsufficientStorage)
	if raw, err := os.ReadFile(dir + "/kept"); err != nil || string(raw) != "old" {
		t.Errorf("the old content is %q %v", raw, err)
	}
	// Of a size that is not told in advance.
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = io.WriteString(z, big)
	_ = z.Close()
	res, out = a.upload(t, "small/new", zipped.String(), "Content-Encoding", "gzip")
	wantStatus(t, res, out, http.StatusInsufficientStorage)
	if _, err := os.Stat(dir + "/new"); err == nil {
		t.Error("half a file was left")
	}
	writeFile(t, filepath.Join(a.home, "part"), big)
	res, out = a.do(t, "POST", "/files/compose", `{"source_paths":["part"],"destination":"small/joined"}`)
	wantStatus(t, res, out, http.StatusInsufficientStorage)
	if left, _ := filepath.Glob(dir + "/.compose-*"); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestMultipart(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	form := func(names ...string) (string, string) {
		var b bytes.Buffer
		m := multipart.NewWriter(&b)
		_ = m.WriteField("ignored", "field")
		for i, n := range names {
			w, err := m.CreateFormFile("file", n)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(w, "content %d", i)
		}
		_ = m.Close()
		return b.String(), m.FormDataContentType()
	}
	body, ct := form("a/one.txt", "two.txt")
	res, out := a.do(t, "POST", "/files", body, "Content-Type", ct, "X-Metadata-Owner", "me")
	wantStatus(t, res, out, http.StatusOK)
	var list []struct {
		Path     string
		Metadata map[string]string
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].Path != filepath.Join(a.home, "a/one.txt") || list[1].Metadata["owner"] != "me" {
		t.Fatalf("answer %s", out)
	}
	if raw, err := os.ReadFile(filepath.Join(a.home, "two.txt")); err != nil || string(raw) != "content 1" {
		t.Errorf("%q %v", raw, err)
	}
	body, ct = form("ignored-name")
	res, out = a.do(t, "POST", "/files?path=named", body, "Content-Type", ct)
	wantStatus(t, res, out, http.StatusOK)
	if raw, err := os.ReadFile(filepath.Join(a.home, "named")); err != nil || string(raw) != "content 0" {
		t.Errorf("%q %v", raw, err)
	}
	body, ct = form("x", "y")
	res, out = a.do(t, "POST", "/files?path=named", body, "Content-Type", ct)
	wantStatus(t, res, out, http.StatusBadRequest)
	body, ct = form()
	res, out = a.do(t, "POST", "/files", body, "Content-Type", ct)
	wantStatus(t, res, out, http.StatusBadRequest)
	body, ct = form("cut")
	res, out = a.do(t, "POST", "/files", body[:len(body)-20], "Content-Type", ct)
	wantStatus(t, res, out, http.StatusBadRequest)
	if _, err := os.Stat(filepath.Join(a.home, "cut")); err == nil {
		t.Error("a cut off upload left a file")
	}
}

func TestMetadata(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	stat := func() map[string]string {
		t.Helper()
		res, err := a.files.Stat(testContext(t), connect.NewRequest(&filesystempb.StatRequest{Path: "f"}))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg.GetEntry().GetMetadata()
	}
	res, out := a.upload(t, "f", "x", "X-Metadata-Author", "me", "X-Metadata-Kind", "a b")
	if res.StatusCode == http.StatusBadRequest && strings.Contains(out, "keeps no metadata") {
		t.Skip("needs a file system with user attributes below the temporary directory")
	}
	wantStatus(t, res, out, http.StatusOK)
	if m := stat(); len(m) != 2 || m["author"] != "me" || m["kind"] != "a b" {
		t.Errorf("metadata %v", m)
	}
	res, out = a.upload(t, "f", "y", "X-Metadata-Kind", "c")
	wantStatus(t, res, out, http.StatusOK)
	if m := stat(); len(m) != 1 || m["kind"] != "c" {
		t.Errorf("metadata %v", m)
	}
	res, out = a.upload(t, "f", "y")
	wantStatus(t, res, out, http.StatusOK)
	if m := stat(); len(m) != 0 {
		t.Errorf("metadata %v", m)
	}
}

func TestCompose(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	for _, n := range []string{"1", "2", "3"} {
		writeFile(t, filepath.Join(a.home, n), "part"+n+" ")
	}
	res, out := a.do(t, "POST", "/files/compose", `{"source_paths":["1","2","3","1"],"destination":"out/whole"}`)
	wantStatus(t, res, out, http.StatusOK)
	if raw, err := os.ReadFile(filepath.Join(a.home, "out/whole")); err != nil || string(raw) != "part1 part2 part3 part1 " {
		t.Errorf("%q %v", raw, err)
	}
	if _, err := os.Stat(filepath.Join(a.home, "1")); err == nil {
		t.Error("the sources are still there")
	}
	writeFile(t, filepath.Join(a.home, "4"), "4")
	for body, status := range map[string]int{
		`{"source_paths":["4","none"],"destination":"w"}`: 404, `{"source_paths":[],"destination":"w"}`: 400, `{"source_paths":["4"]}`: 400, `{`: 400,
		`{"source_paths":["4"],"destination":"out"}`: 400, `{"source_paths":["4"],"destination":"w","username":"nobody-at-all"}`: 401,
	} {
		res, out := a.do(t, "POST", "/files/compose", body)
		wantStatus(t, res, out, status)
	}
	if _, err := os.Stat(filepath.Join(a.home, "4")); err != nil {
		t.Error("a failed compose removed a source")
	}
}

// 64 MB go through without being held: the agent's heap stays small.
func TestBigFilesAreStreamed(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	const size = 64 << 20
	req, err := http.NewRequestWithContext(testContext(t), http.MethodPost, a.url+"/files?path=big", io.LimitReader(zeros{}, size))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", octets)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, res, readAll(t, res), http.StatusOK)
	res, err = http.Get(a.url + "/files?path=big")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if n, err := io.Copy(io.Discard, res.Body); n != size || err != nil {
		t.Errorf("got %d bytes back: %v", n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
