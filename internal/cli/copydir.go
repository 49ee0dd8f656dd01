package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// Directories travel as one tar stream, made or taken apart by tar in the sandbox.

// maxTarErrors bounds what is kept of tar's complaints.
const maxTarErrors = 4 << 10

func (c *copier) uploadDir(ctx context.Context, from, to string) error {
	pr, pw := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := c.pack(pw, from)
		_ = pw.CloseWithError(err)
		packed <- err
	}()
	var complaints limited
	script := `mkdir -p -- "$0" && exec tar -x -f - -C "$0" --no-same-owner`
	exit, err := c.sandbox.Run(ctx, wrenn.StartOptions{Cmd: script, Args: []string{to}, Shell: true, User: c.user, Stdin: pr, Stderr: &complaints})
	_ = pr.CloseWithError(io.ErrClosedPipe)
	if perr := <-packed; perr != nil && !errors.Is(perr, io.ErrClosedPipe) {
		return perr
	}
	return tarError(exit, err, complaints.String())
}

func tarError(exit *wrenn.Exit, err error, complaints string) error {
	switch {
	case err != nil:
		return err
	case exit.Code != 0:
		return fmt.Errorf("tar in the sandbox failed: %s", strings.TrimSpace(complaints))
	}
	return nil
}

// pack writes a directory as tar: files, directories and symbolic links, with modes and times.
func (c *copier) pack(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || rel == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return c.packOne(tw, p, filepath.ToSlash(rel), info)
	})
	return errors.Join(err, tw.Close())
}

func (c *copier) packOne(tw *tar.Writer, p, name string, info os.FileInfo) error {
	target := ""
	switch mode := info.Mode(); {
	case mode&os.ModeSymlink != 0:
		var err error
		if target, err = os.Readlink(p); err != nil {
			return err
		}
	case !mode.IsRegular() && !mode.IsDir():
		c.note("left out %s: neither a file nor a directory", p)
		return nil
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
	if err := tw.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, &countingReader{Reader: io.LimitReader(f, info.Size()), copier: c})
	return err
}

func (c *copier) downloadDir(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(to)
	if err != nil {
		return err
	}
	defer root.Close()
	pr, pw := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := c.unpack(root, pr)
		_ = pr.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		unpacked <- err
	}()
	var complaints limited
	exit, err := c.sandbox.Run(ctx, wrenn.StartOptions{Cmd: "tar", Args: []string{"-c", "-f", "-", "-C", from, "."}, User: c.user,
		Stdin: strings.NewReader(""), Stdout: pw, Stderr: &complaints})
	_ = pw.CloseWithError(io.EOF)
	if uerr := <-unpacked; uerr != nil && (err == nil || !errors.Is(uerr, io.ErrUnexpectedEOF)) {
		return uerr
	}
	return tarError(exit, err, complaints.String())
}

// unpack takes a tar stream apart below root. The stream is a sandbox's, so it is not trusted: root
// lets no name and no link lead out of it.
func (c *copier) unpack(root *os.Root, r io.Reader) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r) // tar pads its end
			return err
		}
		if err != nil {
			return err
		}
		name := filepath.FromSlash(path.Clean(h.Name))
		if name == "." {
			continue
		}
		if !filepath.IsLocal(name) {
			return fmt.Errorf("the sandbox sent the name %q, which leads out of the directory", h.Name)
		}
		if err := c.unpackOne(root, name, h, tr); err != nil {
			return err
		}
	}
}

func (c *copier) unpackOne(root *os.Root, name string, h *tar.Header, r io.Reader) error {
	mode := h.FileInfo().Mode().Perm() & 0o755
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.Mkdir(name, mode|0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return nil
	case tar.TypeSymlink:
		_ = root.Remove(name)
		return root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		_ = root.Remove(name)
		return root.Link(filepath.FromSlash(path.Clean(h.Linkname)), name)
	case tar.TypeReg:
		_ = root.Remove(name) // never write through a link that is there
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, &countingReader{Reader: r, copier: c})
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return err
	}
	c.note("left out %s: neither a file nor a directory", h.Name)
	return nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxTarErrors - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
