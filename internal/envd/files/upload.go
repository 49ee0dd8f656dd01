package files

import (
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
)

// maxParts bounds the files of one multipart upload.
const maxParts = 10_000

// written is the contract's entry of an uploaded file.
type written struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Upload answers POST of /files.
func (s *Service) Upload(w http.ResponseWriter, r *http.Request) {
	list, err := s.upload(r)
	if err != nil {
		fail(w, err)
		return
	}
	answer(w, http.StatusOK, list)
}

func (s *Service) upload(r *http.Request) ([]written, error) {
	q, err := s.admit(r, opWrite)
	if err != nil {
		return nil, err
	}
	u, err := s.queryUser(r, q)
	if err != nil {
		return nil, err
	}
	meta, err := parseMetadata(r.Header)
	if err != nil {
		return nil, err
	}
	body, size, err := decoded(r)
	if err != nil {
		return nil, err
	}
	media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil, faultf(badRequest, "the Content-Type header is missing or cannot be read")
	}
	up := &uploader{service: s, user: u, meta: meta}
	switch media {
	case "multipart/form-data":
		return up.multipart(body, params["boundary"], q)
	case "application/octet-stream":
		return up.raw(body, size, q)
	default:
		return nil, faultf(badRequest, "Content-Type '%s' is not taken; send multipart/form-data or application/octet-stream", media)
	}
}

// decoded gives the body without its Content-Encoding, and its size if that is known, else -1.
func decoded(r *http.Request) (io.Reader, int64, error) {
	switch strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))) {
	case "", "identity":
		return r.Body, r.ContentLength, nil
	case "gzip":
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, 0, faultf(badRequest, "the body is not gzip")
		}
		return z, -1, nil
	default:
		return nil, 0, faultf(badRequest, "Content-Encoding '%s' is not taken; supported: [identity, gzip]", printableOnly(r.Header.Get("Content-Encoding")))
	}
}

// uploader writes the files of one request.
type uploader struct {
	service *Service
	user    account.Account
	meta    map[string]string
}

func (up *uploader) raw(body io.Reader, size int64, q url.Values) ([]written, error) {
	if q.Get("path") == "" {
		return nil, faultf(badRequest, "the query parameter path is missing")
	}
	e, err := up.write(q.Get("path"), body, size)
	if err != nil {
		return nil, err
	}
	return []written{e}, nil
}

// write stores one file, whole or with an error.
func (up *uploader) write(name string, content io.Reader, size int64) (written, error) {
	path, err := up.service.resolve(name, up.user)
	if err != nil {
		return written{}, err
	}
	if err := makeParents(path, up.user); err != nil {
		return written{}, err
	}
	f, made, err := openForWriting(path, size)
	if err != nil {
		return written{}, err
	}
	err = up.fill(f, path, content)
	if cerr := f.Close(); err == nil {
		err = explain(cerr, path)
	}
	if err != nil {
		if made {
			_ = os.Remove(path) // half a file is worse than none
		}
		return written{}, err
	}
	return written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: up.meta}, nil
}

// fill gives the file its owner, content and metadata.
func (up *uploader) fill(f *os.File, path string, content io.Reader) error {
	if os.Geteuid() == 0 {
		if err := f.Chown(int(up.user.UID), int(up.user.GID)); err != nil {
			return explain(err, path)
		}
	}
	if err := writeMetadata(int(f.Fd()), path, up.meta); err != nil {
		return err
	}
	src := &source{r: content}
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, src, make([]byte, 256<<10)); err != nil {
		if src.err != nil {
			return faultf(badRequest, "the upload broke off: %s", broken(src.err))
		}
		return explain(err, path)
	}
	return nil
}

// openForWriting opens path, emptied, or makes it. It refuses before the old content is touched what
// cannot fit; it writes in place, so that who watches or has the file open sees the new content.
func openForWriting(path string, size int64) (f *os.File, made bool, err error) {
	f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NONBLOCK, 0o644)
	if err == nil {
		made = true
	} else if errors.Is(err, os.ErrExist) {
		f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o644)
	}
	if errors.Is(err, unix.EISDIR) {
		return nil, false, faultf(badRequest, "path '%s' is a directory", path)
	}
	if err != nil {
		return nil, false, explain(err, path)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = faultf(badRequest, "path '%s' is not a regular file", path)
	default:
		if err = room(f, st.Size(), size); err == nil {
			err = f.Truncate(0)
		}
	}
	if err != nil {
		f.Close()
		if made {
			_ = os.Remove(path)
		}
		return nil, false, explain(err, path)
	}
	return f, made, nil
}

// room tells whether size bytes fit where have bytes will be given back.
func room(f *os.File, have, size int64) error {
	var fs unix.Statfs_t
	if size <= 0 {
		return nil
	}
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return err
	}
	if free := int64(fs.Bavail)*fs.Bsize + have; size > free {
		return faultf(diskFull, "not enough disk space available: the file has %d bytes, free are %d", size, free)
	}
	return nil
}

// source remembers whether reading failed, to tell a broken upload from a failing disk.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

func broken(err error) string {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "the body ended early"
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader):
		return "the gzip data is damaged"
	default:
		return "the body could not be read"
	}
}
