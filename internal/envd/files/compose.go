package files

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
)

// Bounds of /files/compose.
const (
	maxComposeBody = 4 << 20
	maxSources     = 10_000
)

type composeRequest struct {
	SourcePaths []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// Compose answers POST /files/compose: it joins files into one, inside the kernel, and removes them.
func (s *Service) Compose(w http.ResponseWriter, r *http.Request) {
	var req composeRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxComposeBody)).Decode(&req); err != nil {
		fail(w, faultf(badRequest, "the body is not the JSON that is expected, or is longer than %d bytes", maxComposeBody))
		return
	}
	e, err := s.compose(r, req)
	if err != nil {
		fail(w, err)
		return
	}
	answer(w, http.StatusOK, e)
}

func (s *Service) compose(r *http.Request, req composeRequest) (written, error) {
	switch {
	case len(req.SourcePaths) == 0 || req.Destination == "":
		return written{}, faultf(badRequest, "source_paths and destination are needed")
	case len(req.SourcePaths) > maxSources:
		return written{}, faultf(badRequest, "source_paths has %d entries; at most %d are taken", len(req.SourcePaths), maxSources)
	}
	u, err := s.queryUser(r, map[string][]string{"username": {req.Username}})
	if err != nil {
		return written{}, err
	}
	dst, err := s.resolve(req.Destination, u)
	if err != nil {
		return written{}, err
	}
	var sources []string
	for _, p := range req.SourcePaths {
		abs, err := s.resolve(p, u)
		if err != nil {
			return written{}, err
		}
		sources = append(sources, abs)
	}
	if err := makeParents(dst, u); err != nil {
		return written{}, err
	}
	if st, err := os.Stat(dst); err == nil && !st.Mode().IsRegular() {
		return written{}, faultf(badRequest, "path '%s' is not a regular file", dst)
	}
	if err := join(sources, dst, u); err != nil {
		return written{}, err
	}
	slices.Sort(sources)
	for _, src := range slices.Compact(sources) {
		if src != dst {
			_ = os.Remove(src) // the result is there; somebody else may have removed the part
		}
	}
	return written{Path: dst, Name: filepath.Base(dst), Type: "file"}, nil
}

// join writes the sources one after the other beside dst and puts the result in place, so that a source
// may be the destination and a failure changes nothing.
func join(sources []string, dst string, u account.Account) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(dst), ".compose-")
	if err != nil {
		return explain(err, dst)
	}
	defer func() {
		tmp.Close()
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	for _, path := range sources {
		if err := appendFile(tmp, path); err != nil {
			return err
		}
	}
	if err := errors.Join(tmp.Chmod(0o644), chown(tmp.Name(), u)); err != nil {
		return explain(err, dst)
	}
	return explain(os.Rename(tmp.Name(), dst), dst)
}

func appendFile(dst *os.File, path string) error {
	src, _, err := openRegular(path)
	if err != nil {
		return err
	}
	defer src.Close()
	_, err = io.Copy(dst, src) // copy_file_range where the file system can
	if errors.Is(err, unix.ENOSPC) {
		return faultf(diskFull, "not enough disk space available")
	}
	return explain(err, path)
}
