package envd

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/files"
)

func TestDownloadPartsAndConditions(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	writeFile(t, filepath.Join(a.home, "f"), "0123456789")
	get := func(method string, status int, want string, header ...string) *http.Response {
		t.Helper()
		res, out := a.do(t, method, "/files?path=f", "", header...)
		wantStatus(t, res, out, status)
		if out != want {
			t.Errorf("%v: body %q, want %q", header, out, want)
		}
		return res
	}
	res := get("GET", 200, "0123456789")
	tag, date := res.Header.Get("ETag"), res.Header.Get("Last-Modified")
	if res := get("HEAD", 200, ""); res.Header.Get("Content-Length") != "10" {
		t.Errorf("HEAD %v", res.Header)
	}
	if res := get("GET", 206, "234", "Range", "bytes=2-4"); res.Header.Get("Content-Range") != "bytes 2-4/10" {
		t.Errorf("range %v", res.Header)
	}
	get("GET", 206, "89", "Range", "bytes=-2")
	get("GET", 206, "89", "Range", "bytes=8-", "If-Range", tag)
	get("GET", 200, "0123456789", "Range", "bytes=8-", "If-Range", `"other"`)
	get("GET", 304, "", "If-None-Match", tag)
	get("GET", 304, "", "If-Modified-Since", date)
	get("GET", 412, "", "If-Match", `"other"`)
	get("GET", 206, "0", "Range", "bytes=0-0", "Accept-Encoding", "gzip")
	res, out := a.do(t, "GET", "/files?path=f", "", "Range", "bytes=20-")
	wantStatus(t, res, out, http.StatusRequestedRangeNotSatisfiable)
}

func TestDownloadGzipOnlyWhenAsked(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	text := strings.Repeat("text ", 10000)
	writeFile(t, filepath.Join(a.home, "f"), text)
	for accept, zipped := range map[string]bool{"": false, "identity": false, "gzip": true, "gzip;q=0": false, "gzip;q=0.5, identity": false, "deflate, gzip;q=1.0": true, "*;q=0, gzip": true} {
		res, out := a.do(t, "GET", "/files?path=f", "", "Accept-Encoding", accept)
		wantStatus(t, res, out, http.StatusOK)
		if got := res.Header.Get("Content-Encoding") == "gzip"; got != zipped {
			t.Errorf("Accept-Encoding %q: gzip %v", accept, got)
			continue
		}
		if zipped {
			z, err := gzip.NewReader(strings.NewReader(out))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := io.ReadAll(z)
			if err != nil {
				t.Fatal(err)
			}
			out = string(raw)
		}
		if out != text {
			t.Errorf("Accept-Encoding %q: %d bytes", accept, len(out))
		}
	}
	res, out := a.do(t, "GET", "/files?path=f", "", "Accept-Encoding", "*;q=0")
	wantStatus(t, res, out, http.StatusNotAcceptable)
}

func TestDownloadRefuses(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	if err := unix.Mkfifo(filepath.Join(a.home, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, status := range map[string]int{"/no/such/file": 404, "/": 400, "": 400, "pipe": 400, "/dev/null": 400} {
		res, out := a.do(t, "GET", "/files?path="+url.QueryEscape(path), "")
		wantStatus(t, res, out, status)
	}
}

func TestDownloadOfAFileTheKernelMakesUp(t *testing.T) {
	t.Parallel()
	res, out := newAgent(t).do(t, "GET", "/files?path=/proc/version", "")
	wantStatus(t, res, out, http.StatusOK)
	if !strings.Contains(out, "Linux") {
		t.Errorf("body %q", out)
	}
}

func TestSignedURLs(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	setToken(t, a, "secret")
	writeFile(t, filepath.Join(a.home, "f"), "signed")
	later, past := strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10), "1000000000"
	query := func(op, user, token, expiry string) string {
		q := url.Values{"path": {"f"}, "signature": {files.Sign("f", op, user, token, expiry)}}
		if user != "" {
			q.Set("username", user)
		}
		if expiry != "" {
			q.Set("signature_expiration", expiry)
		}
		return "/files?" + q.Encode()
	}
	for _, c := range []struct {
		name, path string
		status     int
	}{
		{"default user", query("read", "", "secret", ""), 200},
		{"named user", query("read", "user", "secret", ""), 200},
		{"not yet expired", query("read", "", "secret", later), 200},
		{"expired", query("read", "", "secret", past), 401},
		{"another token", query("read", "", "other", ""), 401},
		{"for writing", query("write", "", "secret", ""), 401},
		{"another path", strings.Replace(query("read", "", "secret", ""), "path=f", "path=%2Fetc%2Fpasswd", 1), 401},
		{"longer life", strings.Replace(query("read", "", "secret", past), past, later, 1), 401},
		{"bad expiry", query("read", "", "secret", "soon"), 400},
		{"no signature", "/files?path=f", 401},
	} {
		res, out := a.do(t, "GET", c.path, "")
		if res.StatusCode != c.status {
			t.Errorf("%s: status %d, want %d: %s", c.name, res.StatusCode, c.status, out)
		}
	}
	res, out := a.do(t, "POST", query("write", "", "secret", ""), "new", "Content-Type", octets)
	wantStatus(t, res, out, http.StatusOK)
	res, out = a.do(t, "POST", query("read", "", "secret", ""), "new", "Content-Type", octets)
	wantStatus(t, res, out, http.StatusUnauthorized)
}
