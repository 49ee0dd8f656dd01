package wrenn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Files are the files of a sandbox, as seen by one of its users. Paths are relative to the user's home
// unless they begin with "/".
type Files struct {
	sandbox *Sandbox
	user    string
}

// Files gives the sandbox's files as its default user sees them.
func (s *Sandbox) Files() Files { return Files{sandbox: s} }

// As gives the files as another user sees them.
func (f Files) As(user string) Files { return Files{sandbox: f.sandbox, user: user} }

// FileInfo describes a file or directory.
type FileInfo = api.FileEntry

// Reader is an open file. Size is -1 if it is not known.
type Reader struct {
	io.ReadCloser
	Size int64
}

// Open reads a file as a stream. The caller closes it.
func (f Files) Open(ctx context.Context, path string) (*Reader, error) {
	req, err := f.sandbox.client.request(ctx, call{method: http.MethodGet, path: f.sandbox.path("/files"), query: f.query(path)}, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/octet-stream")
	res, err := f.sandbox.client.http.Do(req)
	if err != nil {
		return nil, f.sandbox.client.connectionError(ctx, err)
	}
	if res.StatusCode != http.StatusOK {
		defer res.Body.Close()
		return nil, readError(res)
	}
	return &Reader{ReadCloser: res.Body, Size: res.ContentLength}, nil
}

// Read reads a whole file into memory.
func (f Files) Read(ctx context.Context, path string) ([]byte, error) {
	r, err := f.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, f.sandbox.client.connectionError(ctx, fmt.Errorf("reading %s: %w", path, err))
	}
	return data, nil
}

// Write makes or replaces a file with what r gives, as a stream of any size; directories on the way
// are made. It is not repeated on failure, since r can be read only once.
func (f Files) Write(ctx context.Context, path string, r io.Reader) (*FileInfo, error) {
	source := &sourceReader{r: r}
	req, err := f.sandbox.client.request(ctx, call{method: http.MethodPut, path: f.sandbox.path("/files"), query: f.query(path)}, source)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	if s, ok := r.(interface{ Len() int }); ok { // a buffer knows its length
		req.ContentLength = int64(s.Len())
		if s.Len() == 0 {
			req.Body = http.NoBody
		}
	}
	var info FileInfo
	err = f.send(ctx, req, &info)
	if source.err != nil {
		return nil, source.err // the caller's own reader failed
	}
	return &info, err
}

func (f Files) send(ctx context.Context, req *http.Request, out *FileInfo) error {
	res, err := f.sandbox.client.http.Do(req)
	if err != nil {
		return f.sandbox.client.connectionError(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		return readError(res)
	}
	return decode(res.Body, out)
}

// sourceReader remembers why reading the caller's data failed.
type sourceReader struct {
	r   io.Reader
	err error
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// List gives the entries of a directory, and of those below it down to depth levels (1 is the
// directory alone).
func (f Files) List(ctx context.Context, path string, depth int) ([]FileInfo, error) {
	q := f.query(path)
	if depth > 1 {
		q.Set("depth", strconv.Itoa(depth))
	}
	var l api.FileList
	_, err := f.sandbox.client.do(ctx, call{method: http.MethodGet, path: f.sandbox.path("/files/list"), query: q, out: &l})
	return l.Entries, err
}

// Stat describes a file or directory.
func (f Files) Stat(ctx context.Context, path string) (*FileInfo, error) {
	var info FileInfo
	_, err := f.sandbox.client.do(ctx, call{method: http.MethodGet, path: f.sandbox.path("/files/stat"), query: f.query(path), out: &info})
	return &info, err
}

// Mkdir makes a directory and those on the way to it. One that is there is CodeAlreadyExists.
func (f Files) Mkdir(ctx context.Context, path string) (*FileInfo, error) {
	var info FileInfo
	_, err := f.sandbox.client.do(ctx, call{method: http.MethodPost, path: f.sandbox.path("/files/mkdir"),
		body: api.MakeDirRequest{Path: path, User: f.user}, out: &info})
	return &info, err
}

// Move moves a file or directory.
func (f Files) Move(ctx context.Context, from, to string) (*FileInfo, error) {
	var info FileInfo
	_, err := f.sandbox.client.do(ctx, call{method: http.MethodPost, path: f.sandbox.path("/files/move"),
		body: api.MoveFileRequest{Source: from, Destination: to, User: f.user}, out: &info})
	return &info, err
}

// Remove removes a file, or a directory with all in it.
func (f Files) Remove(ctx context.Context, path string) error {
	_, err := f.sandbox.client.do(ctx, call{method: http.MethodDelete, path: f.sandbox.path("/files"), query: f.query(path)})
	return err
}

func (f Files) query(path string) url.Values {
	q := url.Values{"path": {path}}
	set(q, "user", f.user)
	return q
}
