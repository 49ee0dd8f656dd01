// Package kernel reads Linux kernel images: it gets the ELF (vmlinux) that a VMM starts directly out of a
// bzImage, whatever compression it has. It parses files that an operator chose, never what a guest sent,
// but trusts no length in them. It must not know VMs or boot anything.
package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
	"github.com/pierrec/lz4/v4"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	maxImage   = 256 << 20 // of a bzImage, in bytes
	maxVmlinux = 1 << 30   // of what is in it
	maxWindow  = 128 << 20 // of zstd and xz, as the kernel build uses at most
)

// Offsets in a bzImage, from the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst).
const (
	offSetupSects    = 0x1f1
	offHeaderMagic   = 0x202
	offVersion       = 0x206
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
	payloadVersion   = 0x0208 // first protocol version with a payload offset
)

var elfMagic = []byte("\x7fELF")

// Vmlinux returns the path of a file that is the ELF of the kernel at path: the file itself if it is one,
// else an extracted copy in cacheDir, made once for each content and readable by everyone.
func Vmlinux(ctx context.Context, path, cacheDir string) (string, error) {
	image, err := read(path)
	if err != nil {
		return "", err
	}
	if bytes.HasPrefix(image, elfMagic) {
		return path, nil
	}
	sum := sha256.Sum256(image)
	dst := filepath.Join(cacheDir, "vmlinux-"+hex.EncodeToString(sum[:12]))
	if _, err := os.Stat(dst); err == nil {
		return dst, nil
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", wrenn.Wrap(err, wrenn.KindInternal, "cannot keep the extracted kernel in %s", cacheDir)
	}
	tmp, err := os.CreateTemp(cacheDir, ".vmlinux-*")
	if err != nil {
		return "", wrenn.Wrap(err, wrenn.KindInternal, "cannot keep the extracted kernel in %s", cacheDir)
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // after the rename there is nothing of that name
	err = errors.Join(extract(tmp, image), tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), dst)
	}
	if err != nil {
		return "", wrenn.Wrap(err, wrenn.KindInvalidRequest, "cannot get a vmlinux out of the kernel %s; give AGENT_KERNEL_PATH a vmlinux or a bzImage", path)
	}
	return dst, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, wrenn.Wrap(err, wrenn.KindInvalidRequest, "the kernel %s does not exist", path)
	}
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot open the kernel %s", path)
	}
	defer f.Close()
	head := make([]byte, len(elfMagic))
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInvalidRequest, "the kernel %s is empty or unreadable", path)
	}
	if bytes.Equal(head, elfMagic) {
		return head, nil // the rest is not needed
	}
	rest, err := io.ReadAll(io.LimitReader(f, maxImage))
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot read the kernel %s", path)
	}
	return append(head, rest...), nil
}

// extract writes the ELF that is the payload of a bzImage.
func extract(w io.Writer, image []byte) error {
	payload, err := payloadOf(image)
	if err != nil {
		return err
	}
	elf, err := decompress(payload)
	if err != nil {
		return err
	}
	head := make([]byte, len(elfMagic))
	if _, err := io.ReadFull(elf, head); err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	if !bytes.Equal(head, elfMagic) {
		return errors.New("the payload is not an ELF file")
	}
	n, err := io.Copy(w, io.MultiReader(bytes.NewReader(head), io.LimitReader(elf, maxVmlinux)))
	if err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	if n > maxVmlinux {
		return fmt.Errorf("the vmlinux is larger than %d MiB", maxVmlinux>>20)
	}
	return nil
}

// payloadOf finds the compressed kernel in a bzImage.
func payloadOf(image []byte) ([]byte, error) {
	if len(image) < headerEnd || string(image[offHeaderMagic:offHeaderMagic+4]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	if v := binary.LittleEndian.Uint16(image[offVersion:]); v < payloadVersion {
		return nil, fmt.Errorf("boot protocol %#x is too old", v)
	}
	sects := int(image[offSetupSects])
	if sects == 0 {
		sects = 4 // the protocol's default
	}
	start := uint64(sects+1)*512 + uint64(binary.LittleEndian.Uint32(image[offPayloadOffset:]))
	length := uint64(binary.LittleEndian.Uint32(image[offPayloadLength:]))
	if start+length > uint64(len(image)) || length < 8 {
		return nil, errors.New("the payload lies outside of the file")
	}
	return image[start : start+length], nil
}

// decompress opens the payload by its first bytes. The build appends the size of the ELF, four bytes,
// behind all but gzip, which ends with it anyway.
func decompress(payload []byte) (io.Reader, error) {
	body := payload[:len(payload)-4]
	switch {
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		z.Multistream(false)
		return z, nil
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		// With the filter for x86 code (BCJ), which most libraries leave out and kernels of distributions use.
		z, err := xz.NewReader(bytes.NewReader(body), maxWindow)
		if err != nil {
			return nil, fmt.Errorf("xz: %w", err)
		}
		z.Multistream(false)
		return z, nil
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		return zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxVmlinux), zstd.WithDecoderMaxWindow(maxWindow))
	case bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")):
		return lz4.NewReader(bytes.NewReader(body)), nil
	case bytes.HasPrefix(payload, elfMagic):
		return bytes.NewReader(payload), nil
	}
	return nil, fmt.Errorf("unknown compression (payload begins with % x); known: gzip, xz, zstd, lz4", payload[:4])
}
