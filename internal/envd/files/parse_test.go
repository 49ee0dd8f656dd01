package files

import (
	"bytes"
	"io"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
)

func TestAbsolute(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"": "/home/u", "a": "/home/u/a", "../x": "/home/x", "/a/../b/": "/b", "~": "/home/u", "~/a": "/home/u/a", "~u": "/home/u/~u", "/../../etc": "/etc", "a//b/./c": "/home/u/a/b/c",
	} {
		if got, err := absolute(path, "/home/u"); got != want || err != nil {
			t.Errorf("absolute(%q) = %q, %v; want %q", path, got, err, want)
		}
	}
}

func FuzzAbsolute(f *testing.F) {
	f.Add("../../x")
	f.Add("~/a\x00")
	f.Fuzz(func(t *testing.T, path string) {
		got, err := absolute(path, "/home/u")
		if err == nil && (!filepath.IsAbs(got) || got != filepath.Clean(got) || strings.ContainsRune(got, 0)) {
			t.Errorf("absolute(%q) = %q", path, got)
		}
	})
}

func FuzzSignature(f *testing.F) {
	at := time.Unix(1_700_000_000, 0)
	f.Add("/home/user/f", "user", "secret", "1800000000", "v1_")
	f.Add("a:b", "", "t", "", "")
	f.Fuzz(func(t *testing.T, path, user, token, expiry, forged string) {
		q := url.Values{"path": {path}, "username": {user}, "signature": {Sign(path, opRead, user, token, expiry)}}
		if expiry != "" {
			q.Set("signature_expiration", expiry)
		}
		until, perr := strconv.ParseInt(expiry, 10, 64)
		alive := expiry == "" || (perr == nil && until >= at.Unix())
		if err := verifySignature(q, opRead, token, at); (err == nil) != alive {
			t.Errorf("a right signature, alive %v: %v", alive, err)
		}
		if forged != q.Get("signature") {
			q.Set("signature", forged)
			if verifySignature(q, opRead, token, at) == nil {
				t.Errorf("the signature %q was taken", forged)
			}
		}
	})
}

func FuzzWantsGzip(f *testing.F) {
	f.Add("gzip, deflate;q=0.5", "")
	f.Add("*;q=0", "bytes=0-1")
	f.Fuzz(func(t *testing.T, accept, rng string) {
		gz, err := wantsGzip(http.Header{"Accept-Encoding": {accept}, "Range": {rng}})
		if gz && (err != nil || (!strings.Contains(strings.ToLower(accept), "gzip") && !strings.Contains(accept, "*"))) {
			t.Errorf("Accept-Encoding %q: gzip %v %v", accept, gz, err)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	f.Add("X-Metadata-Key", "value")
	f.Fuzz(func(t *testing.T, name, value string) {
		meta, err := parseMetadata(http.Header{name: {value}})
		if err != nil {
			return
		}
		for k, v := range meta {
			if k == "" || len(k) > maxMetadataKey || !printable(k) || !printable(v) || len(k)+len(v)+len(metadataSpace) > maxMetadataTotal {
				t.Errorf("%q: %q was taken", k, v)
			}
		}
	})
}

func FuzzPartPath(f *testing.F) {
	f.Add(`form-data; name="file"; filename="a/b.txt"`, "", 0)
	f.Fuzz(func(t *testing.T, disposition, path string, n int) {
		got, err := partPath(disposition, path, n)
		if err == nil && got == "" {
			t.Error("a file without a name")
		}
		if _, _, perr := mime.ParseMediaType(disposition); perr != nil && path == "" && err == nil {
			t.Errorf("%q gave %q", disposition, got)
		}
	})
}

// fuzzService serves files of a directory of the test; no upload may leave it that names no way out.
func fuzzService(t testing.TB) (*Service, string) {
	t.Helper()
	home := t.TempDir()
	db := account.Database{Passwd: filepath.Join(home, ".passwd"), Group: filepath.Join(home, ".group")}
	line := "user:x:" + strconv.Itoa(os.Getuid()) + ":" + strconv.Itoa(os.Getgid()) + "::" + home + ":/bin/sh\n"
	for path, content := range map[string]string{db.Passwd: line, db.Group: ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set, err := settings.Open("")
	if err != nil {
		t.Fatal(err)
	}
	return NewService(db, set), home
}

func FuzzMultipart(f *testing.F) {
	f.Add([]byte("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\ndata\r\n--b--\r\n"), "b")
	f.Add([]byte("--b\r\n\r\n"), "")
	s, home := fuzzService(f)
	f.Fuzz(func(t *testing.T, body []byte, boundary string) {
		// The query's path keeps what is written in one known place.
		req := httptest.NewRequest(http.MethodPost, "/files?path="+url.QueryEscape(filepath.Join(home, "f")), bytes.NewReader(body))
		req.Header.Set("Content-Type", mime.FormatMediaType("multipart/form-data", map[string]string{"boundary": boundary}))
		w := httptest.NewRecorder()
		s.Upload(w, req)
		if w.Code != http.StatusOK && w.Code != http.StatusBadRequest {
			t.Errorf("status %d: %s", w.Code, w.Body)
		}
	})
}

func FuzzRange(f *testing.F) {
	f.Add("bytes=0-4", `"x"`)
	f.Add("bytes=-1,2-3", "")
	s, home := fuzzService(f)
	content := []byte("0123456789")
	if err := os.WriteFile(filepath.Join(home, "f"), content, 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, rng, ifRange string) {
		req := httptest.NewRequest(http.MethodGet, "/files?path=f", nil)
		req.Header["Range"], req.Header["If-Range"] = []string{rng}, []string{ifRange}
		w := httptest.NewRecorder()
		s.Download(w, req)
		switch w.Code {
		case http.StatusOK:
			if !bytes.Equal(w.Body.Bytes(), content) {
				t.Errorf("Range %q: %q", rng, w.Body)
			}
		case http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable:
		default:
			t.Errorf("Range %q: status %d", rng, w.Code)
		}
		_, _ = io.Copy(io.Discard, w.Body)
	})
}
