package files

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

// maxEntries bounds a listing: its answer is one message.
const maxEntries = 50_000

// maxDepth bounds ListDir; the file system's own paths are not deeper.
const maxDepth = 2048

func rpcError(err error) error {
	var f *fault
	if err == nil {
		return nil
	}
	if !errors.As(err, &f) {
		return err
	}
	codes := map[kind]connect.Code{
		internal: connect.CodeInternal, badRequest: connect.CodeInvalidArgument, badUser: connect.CodeUnauthenticated, notFound: connect.CodeNotFound,
		exists: connect.CodeAlreadyExists, denied: connect.CodePermissionDenied, diskFull: connect.CodeResourceExhausted, tooMany: connect.CodeResourceExhausted,
	}
	return connect.NewError(codes[f.kind], errors.New(f.message))
}

// at resolves the path of an RPC.
func (s *Service) at(req connect.AnyRequest, path string) (target, error) {
	u, err := s.caller(req.Header())
	if err != nil {
		return target{}, rpcError(err)
	}
	abs, err := s.resolve(path, u)
	return target{user: u, path: abs}, rpcError(err)
}

// named is at for calls that change something: they must say what.
func (s *Service) named(req connect.AnyRequest, path string) (target, error) {
	if path == "" {
		return target{}, rpcError(faultf(badRequest, "the path is empty"))
	}
	return s.at(req, path)
}

// Stat describes one path.
func (s *Service) Stat(_ context.Context, req *connect.Request[filesystempb.StatRequest]) (*connect.Response[filesystempb.StatResponse], error) {
	t, err := s.at(req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := describe(t.path, s.users.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystempb.StatResponse{Entry: e}), nil
}

// MakeDir makes a directory and what is missing above it.
func (s *Service) MakeDir(_ context.Context, req *connect.Request[filesystempb.MakeDirRequest]) (*connect.Response[filesystempb.MakeDirResponse], error) {
	t, err := s.named(req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(t.path); err == nil {
		if st.IsDir() {
			return nil, rpcError(faultf(exists, "directory '%s' already exists", t.path))
		}
		return nil, rpcError(faultf(badRequest, "path '%s' already exists and is not a directory", t.path))
	}
	if err := makeDirs(t.path, t.user); err != nil {
		return nil, rpcError(err)
	}
	e, err := describe(t.path, s.users.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystempb.MakeDirResponse{Entry: e}), nil
}

// Move renames, also from one file system to another.
func (s *Service) Move(ctx context.Context, req *connect.Request[filesystempb.MoveRequest]) (*connect.Response[filesystempb.MoveResponse], error) {
	src, err := s.named(req, req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	dst, err := s.named(req, req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(src.path); err != nil {
		return nil, rpcError(explain(err, src.path))
	}
	if err := makeParents(dst.path, dst.user); err != nil {
		return nil, rpcError(err)
	}
	if err := move(ctx, src.path, dst.path); err != nil {
		return nil, rpcError(err)
	}
	e, err := describe(dst.path, s.users.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystempb.MoveResponse{Entry: e}), nil
}

func move(ctx context.Context, src, dst string) error {
	err := os.Rename(src, dst)
	if !errors.Is(err, unix.EXDEV) {
		return explain(err, dst)
	}
	// Between file systems a tree must be copied with all its attributes: every image has the tool for that.
	out, err := exec.CommandContext(ctx, "/bin/mv", "-T", "--", src, dst).CombinedOutput()
	switch {
	case err == nil:
		return nil
	case strings.Contains(string(out), unix.ENOSPC.Error()) || strings.Contains(string(out), "No space left"):
		return faultf(diskFull, "not enough disk space available")
	default:
		return faultf(internal, "path '%s' could not be moved to another file system", src)
	}
}

// Remove removes a file or a whole tree. What is not there is removed already.
func (s *Service) Remove(_ context.Context, req *connect.Request[filesystempb.RemoveRequest]) (*connect.Response[filesystempb.RemoveResponse], error) {
	t, err := s.named(req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if t.path == "/" {
		return nil, rpcError(faultf(badRequest, "the root directory cannot be removed"))
	}
	if err := os.RemoveAll(t.path); err != nil {
		return nil, rpcError(explain(err, t.path))
	}
	return connect.NewResponse(&filesystempb.RemoveResponse{}), nil
}

// ListDir lists a directory down to depth, in the order of paths. Links are listed, not followed.
func (s *Service) ListDir(ctx context.Context, req *connect.Request[filesystempb.ListDirRequest]) (*connect.Response[filesystempb.ListDirResponse], error) {
	t, err := s.at(req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	depth := int(min(req.Msg.GetDepth(), maxDepth))
	if depth < 1 {
		return nil, rpcError(faultf(badRequest, "depth must be at least 1"))
	}
	entries, err := s.list(ctx, t.path, depth)
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystempb.ListDirResponse{Entries: entries}), nil
}

func (s *Service) list(ctx context.Context, asked string, depth int) ([]*filesystempb.EntryInfo, error) {
	root, err := directory(asked)
	if err != nil {
		return nil, err
	}
	names := s.users.Names()
	var entries []*filesystempb.EntryInfo
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case path == root:
			return err
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed while we look
		case err != nil:
			return err
		case len(entries) >= maxEntries:
			return faultf(tooMany, "directory '%s' holds more than %d entries; list parts of it, or a smaller depth", asked, maxEntries)
		}
		rel := path[len(strings.TrimSuffix(root, "/"))+1:]
		if st, err := d.Info(); err == nil {
			e := entry(path, st, names)
			e.Path = filepath.Join(asked, rel)
			entries = append(entries, e)
		}
		if d.IsDir() && strings.Count(rel, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, explain(err, asked)
	}
	slices.SortFunc(entries, func(a, b *filesystempb.EntryInfo) int { return strings.Compare(a.Path, b.Path) })
	return entries, nil
}

// directory gives the real path of a directory.
func directory(path string) (string, error) {
	root, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", explain(err, path)
	}
	st, err := os.Stat(root)
	if err != nil {
		return "", explain(err, path)
	}
	if !st.IsDir() {
		return "", faultf(badRequest, "path '%s' is not a directory", path)
	}
	return root, nil
}
