package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// image is a root file system that a sandbox can start from: NAME.ext4 in AGENT_IMAGES_PATH, with its
// manifest NAME.json.
type image struct {
	Name        string
	Path        string
	Digest      string // hex: the manifest's sha256, else time and size of the file
	SizeBytes   int64
	DefaultUser string
}

// DiskMB is the size of the image's disk, rounded up.
func (i image) DiskMB() int { return int((i.SizeBytes + 1<<20 - 1) >> 20) }

type images struct {
	dir   string
	store *storage.Store
	log   *slog.Logger
}

var imageName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// list gives the images that are there now, by name. A file that is no usable image is logged and left out.
func (s *images) list() ([]image, error) {
	paths, err := filepath.Glob(filepath.Join(s.dir, "*.ext4"))
	if err != nil {
		return nil, err
	}
	var all []image
	for _, path := range paths {
		img, err := readImage(path)
		if err != nil {
			s.log.Warn("image left out", "path", path, "err", err)
			continue
		}
		all = append(all, img)
	}
	slices.SortFunc(all, func(a, b image) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func (s *images) find(name string) (image, error) {
	all, err := s.list()
	if err != nil {
		return image{}, err
	}
	var names []string
	for _, img := range all {
		if img.Name == name {
			return img, nil
		}
		names = append(names, img.Name)
	}
	return image{}, wrenn.Errorf(wrenn.KindInvalidRequest, "this host has no template %q; it has: %s", name, strings.Join(names, ", ")).
		With("field", "template")
}

// open gives a path of the image on the volume of the sandboxes, from which clones are reflinks.
func (s *images) open(ctx context.Context, img image) (string, error) {
	return s.store.Import(ctx, img.Path, img.Name+"-"+img.Digest[:16])
}

func readImage(path string) (image, error) {
	img := image{Name: strings.TrimSuffix(filepath.Base(path), ".ext4"), Path: path, DefaultUser: "user"}
	if !imageName.MatchString(img.Name) {
		return image{}, fmt.Errorf("%q is not a template name", img.Name)
	}
	info, err := os.Stat(path)
	if err != nil {
		return image{}, err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return image{}, fmt.Errorf("not a disk image")
	}
	img.SizeBytes = info.Size()
	img.Digest = fmt.Sprintf("%016x%x", info.ModTime().UnixNano(), info.Size())
	raw, err := os.ReadFile(strings.TrimSuffix(path, ".ext4") + ".json")
	if os.IsNotExist(err) {
		return img, nil
	}
	if err != nil {
		return image{}, err
	}
	var manifest struct {
		SHA256      string `json:"sha256"`
		DefaultUser string `json:"default_user"`
	}
	if err := json.Unmarshal(raw, &manifest); err != nil {
		return image{}, fmt.Errorf("manifest: %w", err)
	}
	if len(manifest.SHA256) == 64 {
		img.Digest = manifest.SHA256
	}
	if manifest.DefaultUser != "" {
		img.DefaultUser = manifest.DefaultUser
	}
	return img, nil
}

// importTimeout bounds the copy of an image onto the volume, once per image.
const importTimeout = 5 * time.Minute
