package kernel

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// vmlinux is what the images below hold: some of it is calls, as in machine code of x86.
var vmlinux = append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel \xe8\x05\x01\x00\x00"), 300)...)

// vmlinuxXZ is vmlinux as the kernel's build packs it (scripts/xz_wrap.sh), with calls made absolute:
// xz --check=crc32 --x86 --lzma2=dict=32MiB
//
//go:embed testdata/vmlinux.xz
var vmlinuxXZ []byte

// compressors make payloads as the kernel's build does: gzip as it is, the others with the size behind.
func compressors(t testing.TB) map[string][]byte {
	t.Helper()
	sized := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, uint32(len(vmlinux))) }
	pack := func(open func(io.Writer) (io.WriteCloser, error)) []byte {
		var b bytes.Buffer
		w, err := open(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(vmlinux); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	return map[string][]byte{
		"gzip": pack(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }),
		"xz":   sized(bytes.Clone(vmlinuxXZ)),
		"zstd": sized(pack(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })),
		"lz4": sized(pack(func(w io.Writer) (io.WriteCloser, error) {
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.LegacyOption(true))
		})),
		"none": vmlinux,
	}
}

// bzImage lays a payload out as the boot protocol says, with other things around it.
func bzImage(payload []byte) []byte {
	const sects, offset = 3, 100
	image := make([]byte, (sects+1)*512+offset)
	image[offSetupSects] = sects
	copy(image[offHeaderMagic:], "HdrS")
	binary.LittleEndian.PutUint16(image[offVersion:], 0x020f)
	binary.LittleEndian.PutUint32(image[offPayloadOffset:], offset)
	binary.LittleEndian.PutUint32(image[offPayloadLength:], uint32(len(payload)))
	return append(append(image, payload...), "the rest of the image"...)
}

func TestVmlinuxOutOfEveryCompression(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	for name, payload := range compressors(t) {
		src := filepath.Join(t.TempDir(), "vmlinuz")
		if err := os.WriteFile(src, bzImage(payload), 0o600); err != nil {
			t.Fatal(err)
		}
		path, err := Vmlinux(t.Context(), src, cache)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, vmlinux) {
			t.Errorf("%s: %d bytes that are not the kernel's %d, %v", name, len(got), len(vmlinux), err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Perm() != 0o644 {
			t.Errorf("%s: the VMM's uid cannot read it: %v, %v", name, fi.Mode(), err)
		}
		again, err := Vmlinux(t.Context(), src, cache)
		after, statErr := os.Stat(again)
		if err != nil || statErr != nil || !os.SameFile(fi, after) {
			t.Errorf("%s: extracted twice: %q, %v", name, again, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(cache, ".vmlinux-*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestVmlinuxIsUsedAsItIs(t *testing.T) {
	t.Parallel()
	src := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(src, vmlinux, 0o600); err != nil {
		t.Fatal(err)
	}
	if path, err := Vmlinux(t.Context(), src, t.TempDir()); err != nil || path != src {
		t.Errorf("%q, %v", path, err)
	}
}

func TestDamagedKernelsAreRefusedAndLeaveNothing(t *testing.T) {
	t.Parallel()
	good := bzImage(compressors(t)["xz"])
	change := func(at int, to byte) []byte { b := bytes.Clone(good); b[at] = to; return b }
	for name, image := range map[string][]byte{
		"empty":                nil,
		"short":                []byte("x"),
		"no header":            change(offHeaderMagic, 'X'),
		"old protocol":         change(offVersion+1, 1),
		"payload outside":      change(offPayloadLength+3, 0x7f),
		"offset outside":       change(offPayloadOffset+3, 0xff),
		"cut off":              good[:len(good)/2],
		"damaged stream":       change((3+1)*512+100+60, good[(3+1)*512+100+60]^0xff),
		"unknown compression":  bzImage([]byte("what is this, and how long is it?")),
		"payload is not a ELF": bzImage(gzipped(t, []byte("not a kernel"))),
	} {
		cache := t.TempDir()
		src := filepath.Join(t.TempDir(), "vmlinuz")
		if err := os.WriteFile(src, image, 0o600); err != nil {
			t.Fatal(err)
		}
		path, err := Vmlinux(t.Context(), src, cache)
		if wrenn.KindOf(err) != wrenn.KindInvalidRequest || !strings.Contains(err.Error(), "kernel") {
			t.Errorf("%s: %q, %v", name, path, err)
		}
		if entries, err := os.ReadDir(cache); err != nil || len(entries) > 0 {
			t.Errorf("%s: left over: %v, %v", name, entries, err)
		}
	}
	if _, err := Vmlinux(t.Context(), filepath.Join(t.TempDir(), "absent"), t.TempDir()); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
		t.Errorf("absent: %v", err)
	}
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// FuzzExtract looks for images that crash the parser or make it write something else than an ELF.
func FuzzExtract(f *testing.F) {
	for _, payload := range compressors(f) {
		f.Add(bzImage(payload))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		var out bytes.Buffer
		if err := extract(&limited{&out, 64 << 20}, image); err == nil && !bytes.HasPrefix(out.Bytes(), elfMagic) {
			t.Errorf("extracted %d bytes that are no ELF", out.Len())
		}
	})
}

// limited keeps the fuzzer within its memory: a small image may hold a large kernel.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(b []byte) (int, error) {
	if l.left -= len(b); l.left < 0 {
		return 0, io.ErrShortWrite
	}
	return l.w.Write(b)
}
