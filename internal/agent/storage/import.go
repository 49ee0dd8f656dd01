package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// importDir holds the images of the store, inside Dir so that clones of them are reflinks. It begins
// with a dot: the agent's own directories are named by sandbox ids.
const importDir = ".images"

var importName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Import brings src into the store under a name and returns its path there. It is done once for one
// version of src (by path, size and time of change); an older version of the same name is removed, which
// does no harm to its clones.
func (s *Store) Import(ctx context.Context, src, name string) (string, error) {
	if !importName.MatchString(name) {
		return "", wrenn.Errorf(wrenn.KindInvalidRequest, "image name %q must be letters, digits, dots, dashes, and at most 128", name)
	}
	s.imports.Lock()
	defer s.imports.Unlock()
	fi, err := os.Stat(src)
	if err != nil {
		return "", fileError(err, "import", src)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%d\n%d", src, fi.Size(), fi.ModTime().UnixNano()))
	prefix := name + "@"
	dir := filepath.Join(s.dir, importDir)
	dst := filepath.Join(dir, prefix+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(dst); err == nil {
		return dst, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fileError(err, "import into", dir)
	}
	if err := s.needForImport(src, fi.Size()); err != nil {
		return "", err
	}
	if err := s.cloneDurably(ctx, src, dst); err != nil {
		return "", err
	}
	return dst, removeOlder(dir, prefix, dst)
}

// cloneDurably makes dst, and makes sure that after a power cut it is whole or absent.
func (s *Store) cloneDurably(ctx context.Context, src, dst string) error {
	tmp := dst + importTemp
	if err := os.Remove(tmp); err != nil && !os.IsNotExist(err) {
		return fileError(err, "import", src)
	}
	if err := s.Clone(ctx, src, tmp); err != nil {
		return err
	}
	if err := Sync(tmp); err != nil {
		return fileError(err, "import", src)
	}
	if err := os.Rename(tmp, dst); err != nil {
		return fileError(err, "import", src)
	}
	return fileError(Sync(filepath.Dir(dst)), "import", src)
}

func (s *Store) needForImport(src string, size int64) error {
	used, err := usedBytes(src)
	if err != nil {
		return fileError(err, "import", src)
	}
	return s.NeedSpace(min(used, size))
}

func removeOlder(dir, prefix, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fileError(err, "list", dir)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), prefix) && path != keep {
			if err := os.Remove(path); err != nil {
				return fileError(err, "remove", path)
			}
		}
	}
	return nil
}

// Sync brings a file, or a directory's entries, to disk (fsync(2)).
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
