//go:build linux

package firecracker

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// version is a release's, such as 1.16.1; what follows a hyphen tells apart but does not order.
type version struct {
	Major, Minor, Patch int
	Extra               string
}

var versionPattern = regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.-]+)?`)

func parseVersion(s string) (version, bool) {
	m := versionPattern.FindStringSubmatch(s)
	if m == nil {
		return version{}, false
	}
	var v version
	for i, to := range []*int{&v.Major, &v.Minor, &v.Patch} {
		n, err := strconv.Atoi(m[i+1])
		if err != nil {
			return version{}, false
		}
		*to = n
	}
	v.Extra = m[4]
	return v, true
}

func (v version) String() string {
	return fmt.Sprintf("%d.%d.%d%s", v.Major, v.Minor, v.Patch, v.Extra)
}

func (v version) before(major, minor int) bool {
	return v.Major < major || (v.Major == major && v.Minor < minor)
}

// reports tells of a version with which a guest's free pages go back to the host, as it was seen to do since 1.16.
func (v version) reports() bool { return !v.before(1, 16) }

// compare puts a pre-release before its release.
func (v version) compare(w version) int {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch),
		-cmp.Compare(min(len(v.Extra), 1), min(len(w.Extra), 1)), cmp.Compare(v.Extra, w.Extra))
}

// Binary is an installed Firecracker with the jailer of its release.
type Binary struct {
	Version string `json:"version"` // e.g. "1.16.1"
	Format  string `json:"format"`  // of the snapshots it makes, e.g. "8.0.0"
	Path    string `json:"path"`
	Jailer  string `json:"jailer"` // "" if there is none of the same version

	version version
}

// oldest is the first version that works: it has the entropy device, statistics of the balloon, and writes a
// diff into an existing memory file.
var oldest = version{Major: 1, Minor: 7}

const askTimeout = 10 * time.Second

// find lists the Firecrackers in a directory, or in the folders of releases below it, newest first. The
// names are those of the releases' archives, or the plain ones: firecracker[-v1.16.1-x86_64] and jailer likewise.
func find(ctx context.Context, dir string) ([]Binary, error) {
	var found []Binary
	for _, pattern := range []string{"firecracker", "firecracker-*", "release-*/firecracker-*"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, wrenn.Wrap(err, wrenn.KindInvalidRequest, "AGENT_FIRECRACKER_DIR cannot be read")
		}
		for _, path := range paths {
			if b, ok := examine(ctx, path); ok {
				found = append(found, b)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b Binary) int { return b.version.compare(a.version) })
	return slices.CompactFunc(found, func(a, b Binary) bool { return a.Version == b.Version }), nil
}

// examine asks a program what it is.
func examine(ctx context.Context, path string) (Binary, bool) {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 || strings.HasSuffix(path, ".debug") {
		return Binary{}, false
	}
	v, ok := askVersion(ctx, path, "Firecracker", "--version")
	if !ok || v.before(oldest.Major, oldest.Minor) {
		return Binary{}, false
	}
	format, ok := askVersion(ctx, path, "", "--snapshot-version")
	if !ok {
		return Binary{}, false
	}
	b := Binary{Version: v.String(), Format: format.String(), Path: path, version: v}
	jailer := filepath.Join(filepath.Dir(path), strings.Replace(filepath.Base(path), "firecracker", "jailer", 1))
	if w, ok := askVersion(ctx, jailer, "Jailer", "--version"); ok && w == v {
		b.Jailer = jailer
	}
	return b, true
}

func askVersion(ctx context.Context, path, name, argument string) (version, bool) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, argument).Output()
	if err != nil || !strings.Contains(string(out), name) {
		return version{}, false
	}
	return parseVersion(string(out))
}
