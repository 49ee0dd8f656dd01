package files

import (
	"errors"
	"net/http"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	metadataHeader = "X-Metadata-"
	// metadataSpace is where metadata is kept among a file's extended attributes.
	metadataSpace    = "user.wrn."
	maxMetadataKey   = 255 - len(metadataSpace) // the kernel's limit of a name
	maxMetadataTotal = 4096                     // what fits beside an inode
)

// parseMetadata takes the metadata from the headers of an upload.
func parseMetadata(h http.Header) (map[string]string, error) {
	meta := map[string]string{}
	total := 0
	for name, values := range h {
		if len(name) < len(metadataHeader) || !strings.EqualFold(name[:len(metadataHeader)], metadataHeader) || len(values) == 0 {
			continue
		}
		key, value := strings.ToLower(name[len(metadataHeader):]), values[0]
		switch {
		case key == "":
			return nil, faultf(badRequest, "a metadata header has no key")
		case len(key) > maxMetadataKey:
			return nil, faultf(badRequest, "metadata key '%s…' is longer than %d bytes", key[:32], maxMetadataKey)
		case !printable(key), !printable(value):
			return nil, faultf(badRequest, "metadata '%s': keys and values must be printable US-ASCII", printableOnly(key))
		}
		meta[key] = value
		total += len(metadataSpace) + len(key) + len(value)
	}
	if total > maxMetadataTotal {
		return nil, faultf(badRequest, "the metadata takes %d bytes; at most %d fit", total, maxMetadataTotal)
	}
	return meta, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

func printableOnly(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return '?'
		}
		return r
	}, s)
}

// writeMetadata makes meta the file's metadata: what it had and meta does not is removed.
func writeMetadata(fd int, path string, meta map[string]string) error {
	for key := range listMetadata(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) }) {
		if _, keep := meta[key]; keep {
			continue
		}
		if err := unix.Fremovexattr(fd, metadataSpace+key); err != nil && !errors.Is(err, unix.ENODATA) {
			return explain(err, path)
		}
	}
	for key, value := range meta {
		err := unix.Fsetxattr(fd, metadataSpace+key, []byte(value), 0)
		switch {
		case errors.Is(err, unix.ENOTSUP):
			return faultf(badRequest, "the file system of '%s' keeps no metadata", path)
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
			return faultf(badRequest, "the metadata does not fit beside '%s'", path)
		case err != nil:
			return explain(err, path)
		}
	}
	return nil
}

// readMetadata gives the metadata of path, nil if there is none or it cannot be read.
func readMetadata(path string) map[string]string {
	var meta map[string]string
	for key := range listMetadata(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) }) {
		buf := make([]byte, maxMetadataTotal)
		n, err := unix.Lgetxattr(path, metadataSpace+key, buf)
		if err != nil || !printable(string(buf[:n])) {
			continue // removed meanwhile, or not ours
		}
		if meta == nil {
			meta = map[string]string{}
		}
		meta[key] = string(buf[:n])
	}
	return meta
}

func listMetadata(list func([]byte) (int, error)) map[string]struct{} {
	n, err := list(nil)
	if err != nil || n <= 0 {
		return nil
	}
	buf := make([]byte, min(n+1024, 64<<10))
	if n, err = list(buf); err != nil {
		return nil
	}
	keys := map[string]struct{}{}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if key, ok := strings.CutPrefix(name, metadataSpace); ok && key != "" && printable(key) {
			keys[key] = struct{}{}
		}
	}
	return keys
}
