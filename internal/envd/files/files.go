// Package files gives access to the guest's files: the service filesystem.Filesystem and the HTTP routes
// /files and /files/compose. It acts with the rights of the guest agent (root): who holds the access
// token may name any user, root too, so a user here decides who owns what is made and where relative
// paths begin, not what may be read. Contents are streamed, never held.
package files

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
)

// Service implements filesystemconnect.FilesystemHandler, and the HTTP handlers of /files.
type Service struct {
	users    account.Database
	settings *settings.Store

	mu         sync.Mutex
	watchers   map[string]*bufferedWatcher
	watcherSeq uint64
}

// NewService makes a service without watchers.
func NewService(users account.Database, set *settings.Store) *Service {
	return &Service{users: users, settings: set, watchers: map[string]*bufferedWatcher{}}
}

// fault is a failure that the caller may see; both edges (RPC, HTTP) map its kind.
type fault struct {
	kind    kind
	message string
	cause   error
}

type kind int

const (
	internal kind = iota
	badRequest
	badUser
	notFound
	exists
	denied
	diskFull
	tooMany
	notAcceptable
)

func (f *fault) Error() string { return f.message }
func (f *fault) Unwrap() error { return f.cause }

func faultf(k kind, format string, args ...any) *fault {
	return &fault{kind: k, message: fmt.Sprintf(format, args...)}
}

// explain turns an error of the file system into a fault about path.
func explain(err error, path string) error {
	var f *fault
	if err == nil || errors.As(err, &f) {
		return err
	}
	f = &fault{kind: internal, cause: err}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		f.kind, f.message = diskFull, "not enough disk space available"
	case errors.Is(err, os.ErrNotExist):
		f.kind, f.message = notFound, fmt.Sprintf("path '%s' does not exist", path)
	case errors.Is(err, os.ErrExist), errors.Is(err, unix.ENOTEMPTY):
		f.kind, f.message = exists, fmt.Sprintf("path '%s' already exists", path)
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EROFS), errors.Is(err, unix.ETXTBSY):
		f.kind, f.message = denied, fmt.Sprintf("path '%s': %s", path, bare(err))
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP),
		errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENXIO):
		f.kind, f.message = badRequest, fmt.Sprintf("path '%s': %s", path, bare(err))
	default:
		f.message = fmt.Sprintf("path '%s': %s", path, bare(err))
	}
	return f
}

// bare strips what Go adds to an error number.
func bare(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// user finds on whose behalf a request acts: the one it names, or the default.
func (s *Service) user(name string) (account.Account, error) {
	u, err := s.users.Lookup(cmp.Or(name, s.settings.Get().User))
	if err != nil {
		return u, faultf(badUser, "error looking up user: %s", err)
	}
	return u, nil
}

// caller is user for RPCs, which name it in the Authorization header.
func (s *Service) caller(h http.Header) (account.Account, error) {
	name, err := account.FromHeader(h.Get("Authorization"))
	if err != nil {
		return account.Account{}, faultf(badUser, "%s", err)
	}
	return s.user(name)
}

// resolve makes path absolute: relative ones begin in the user's home; none is the default directory, if
// /init set one, else the home.
func (s *Service) resolve(path string, u account.Account) (string, error) {
	if path == "" {
		path = s.settings.Get().Workdir
	}
	return absolute(path, u.Home)
}

func absolute(path, home string) (string, error) {
	switch {
	case len(path) >= unix.PathMax:
		return "", faultf(badRequest, "path is longer than %d bytes", unix.PathMax-1)
	case strings.ContainsRune(path, 0):
		return "", faultf(badRequest, "path contains a NUL byte")
	case path == "~":
		return filepath.Clean(home), nil
	case strings.HasPrefix(path, "~/"):
		return filepath.Join(home, path[2:]), nil
	case filepath.IsAbs(path):
		return filepath.Clean(path), nil
	default:
		return filepath.Join(home, path), nil
	}
}

// makeParents makes the directories above path that are missing, owned by u.
func makeParents(path string, u account.Account) error { return makeDirs(filepath.Dir(path), u) }

// makeDirs makes dir and what is missing above it, owned by u.
func makeDirs(dir string, u account.Account) error {
	st, err := os.Stat(dir)
	if err == nil {
		if !st.IsDir() {
			return faultf(badRequest, "path '%s' is not a directory", dir)
		}
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return explain(err, dir)
	}
	if err := makeDirs(filepath.Dir(dir), u); err != nil {
		return err
	}
	err = os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		// Somebody was quicker, or it is a link that leads nowhere: look again, once.
		if st, serr := os.Stat(dir); serr == nil && st.IsDir() {
			return nil
		}
	}
	if err != nil {
		return explain(err, dir)
	}
	return explain(chown(dir, u), dir)
}

// chown gives path itself (not what a link leads to) to u, if the agent is in a position to.
func chown(path string, u account.Account) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, int(u.UID), int(u.GID))
}
