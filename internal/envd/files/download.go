package files

import (
	"bytes"
	"compress/gzip"
	"io"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxMadeUp bounds files whose size the kernel does not tell (below /proc and /sys).
const maxMadeUp = 4 << 20

// Download answers GET and HEAD of /files.
func (s *Service) Download(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	q, err := s.admit(r, opRead)
	if err != nil {
		fail(w, err)
		return
	}
	u, err := s.queryUser(r, q)
	if err != nil {
		fail(w, err)
		return
	}
	if q.Get("path") == "" {
		fail(w, faultf(badRequest, "the query parameter path is missing"))
		return
	}
	path, err := s.resolve(q.Get("path"), u)
	if err != nil {
		fail(w, err)
		return
	}
	gz, err := wantsGzip(r.Header)
	if err != nil {
		fail(w, err)
		return
	}
	f, st, err := openRegular(path)
	if err != nil {
		fail(w, err)
		return
	}
	defer f.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	h.Set("Vary", "Accept-Encoding")
	var content io.ReadSeeker = f
	if st.Size() == 0 {
		if content, err = madeUp(f); err != nil {
			fail(w, explain(err, path))
			return
		}
	}
	if gz {
		sendGzip(w, r, content)
		return
	}
	// Not by time alone: two writes within a second differ in size or in nanoseconds.
	h.Set("ETag", `"`+strconv.FormatInt(st.Size(), 36)+"-"+strconv.FormatInt(st.ModTime().UnixNano(), 36)+`"`)
	http.ServeContent(w, r, "", st.ModTime(), content)
}

// openRegular opens a file for reading, and never waits for the other end of a pipe.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, explain(err, path)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
		err = explain(err, path)
	case st.IsDir():
		err = faultf(badRequest, "path '%s' is a directory", path)
	case !st.Mode().IsRegular():
		err = faultf(badRequest, "path '%s' is not a regular file", path)
	default:
		return f, st, nil
	}
	f.Close()
	return nil, nil, err
}

// madeUp reads a file that says it is empty, as those that the kernel makes up when read do.
func madeUp(f io.Reader) (io.ReadSeeker, error) {
	raw, err := io.ReadAll(io.LimitReader(f, maxMadeUp))
	return bytes.NewReader(raw), err
}

func sendGzip(w http.ResponseWriter, r *http.Request, content io.Reader) {
	w.Header().Set("Content-Encoding", "gzip")
	if r.Method == http.MethodHead {
		return
	}
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		fail(w, err)
		return
	}
	if _, err := io.Copy(z, content); err != nil {
		panic(http.ErrAbortHandler) // the client must not take a part for the whole
	}
	_ = z.Close() // the client may be gone
}

// wantsGzip reads Accept-Encoding (RFC 9110, 12.5.3): gzip only if it is named and not less liked than the
// plain bytes, and never for a part of a file.
func wantsGzip(h http.Header) (bool, error) {
	gz, identity, star := -1.0, -1.0, -1.0
	for field := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		name, params, _ := strings.Cut(field, ";")
		q := 1.0
		if v, ok := strings.CutPrefix(strings.ReplaceAll(strings.ToLower(params), " ", ""), "q="); ok {
			parsed, err := strconv.ParseFloat(v, 64)
			if err != nil || !(parsed >= 0 && parsed <= 1) {
				return false, faultf(badRequest, "the Accept-Encoding header cannot be read")
			}
			q = parsed
		}
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "gzip", "x-gzip":
			gz = q
		case "identity":
			identity = q
		case "*":
			star = q
		}
	}
	plain := identity > 0 || (identity < 0 && star != 0)
	switch {
	case h.Get("Range") != "" && plain:
		return false, nil
	case gz > 0 && gz >= identity:
		return true, nil
	case plain:
		return false, nil
	case gz > 0 || (gz < 0 && star > 0):
		return true, nil
	default:
		return false, faultf(notAcceptable, "no acceptable encoding found, supported: [identity, gzip]")
	}
}
