package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// mke2fs -d copies ctimes and the order of directories from the host's file system, so its result is
// different each time, and needs the files to be unpacked with their owners. Instead the file system is
// made empty and filled by one debugfs script in the order of the archive: no root, no mounts, and the
// same archive gives the same bytes.

// features are named one by one, so that the host's mke2fs.conf does not matter. Everything is known to
// every kernel from 4.x on.
const features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// filesystem is what to make.
type filesystem struct {
	path  string
	size  int64
	uuid  string
	label string
	epoch int64 // every time that is not a file's mtime
}

// populate makes the file system and fills it from the archive and the extra files.
func (f filesystem) populate(ctx context.Context, archive io.Reader, extra []extraFile) error {
	if err := f.format(ctx); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(f.path), "tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	s := &script{dir: tmp, links: map[string]int{}}
	if err := s.fromTar(archive); err != nil {
		return err
	}
	for _, e := range extra {
		s.file(e.path, e.source, e.mode, 0, 0, f.epoch)
	}
	return f.run(ctx, s)
}

// extraFile is a file of the host that root owns in the image.
type extraFile struct {
	source, path string
	mode         int64
}

func (f filesystem) format(ctx context.Context) error {
	if err := os.Remove(f.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(f.path, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(f.path, f.size); err != nil {
		return err
	}
	// Inode tables and journal are zeroed here (as holes), or every guest would do it to its own copy.
	return f.tool(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "1",
		"-O", features, "-J", "size=16", "-U", f.uuid, "-L", f.label, "-M", "/",
		"-E", "hash_seed="+f.uuid+",root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", f.path)
}

// run feeds a script to debugfs. debugfs reports errors only in words, so any word is an error.
func (f filesystem) run(ctx context.Context, s *script) error {
	if s.err != nil {
		return s.err
	}
	s.finish()
	file := filepath.Join(s.dir, "script")
	if err := os.WriteFile(file, s.buf.Bytes(), 0o600); err != nil {
		return err
	}
	cmd := f.command(ctx, "debugfs", "-w", "-f", file, f.path)
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("debugfs: %w: %s", err, clip(stderr.String()))
	}
	for line := range strings.Lines(stderr.String()) {
		if !strings.HasPrefix(line, "debugfs 1.") {
			return fmt.Errorf("debugfs: %s", clip(stderr.String()))
		}
	}
	return nil
}

// check proves the file system sound and gives holes back to the host.
func (f filesystem) check(ctx context.Context) error {
	if err := f.tool(ctx, "e2fsck", "-f", "-n", f.path); err != nil {
		return err
	}
	return f.tool(ctx, "fallocate", "--dig-holes", f.path)
}

func (f filesystem) tool(ctx context.Context, name string, args ...string) error {
	if out, err := f.command(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, clip(string(out)))
	}
	return nil
}

func (f filesystem) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	epoch := strconv.FormatInt(f.epoch, 10)
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME="+epoch, "SOURCE_DATE_EPOCH="+epoch,
		"LC_ALL=C", "TZ=UTC", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	return cmd
}

// script is a debugfs script under construction.
type script struct {
	dir   string // of file contents
	buf   bytes.Buffer
	cwd   string
	count int
	links map[string]int // names of one file beyond the first
	err   error
}

// fromTar turns an archive into commands. Directories come before what is in them, as tar makes them.
func (s *script) fromTar(r io.Reader) error {
	archive := tar.NewReader(bufio.NewReaderSize(r, 1<<20))
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return s.err
		}
		if err != nil {
			return err
		}
		if err := s.entry(h, archive); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func (s *script) entry(h *tar.Header, content io.Reader) error {
	name := path.Clean("/" + h.Name)
	mtime := h.ModTime.Unix()
	switch h.Typeflag {
	case tar.TypeDir:
		if name != "/" && name != "/lost+found" {
			s.in(name)
			s.cmd("mkdir", path.Base(name))
		}
		s.inode(name, 0o040000|h.Mode, h.Uid, h.Gid, mtime)
	case tar.TypeReg:
		s.count++
		src := filepath.Join(s.dir, strconv.Itoa(s.count))
		f, err := os.Create(src)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.Copy(f, content); err != nil {
			return err
		}
		s.file(name, src, h.Mode, h.Uid, h.Gid, mtime)
	case tar.TypeSymlink:
		s.in(name)
		s.cmd("symlink", path.Base(name), h.Linkname)
		s.inode(name, 0o120777, h.Uid, h.Gid, mtime)
	case tar.TypeLink:
		target := path.Clean("/" + h.Linkname)
		s.in("/")
		s.cmd("ln", target, name)
		s.links[target]++
		s.cmd("set_inode_field", target, "links_count", strconv.Itoa(s.links[target]+1))
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return nil // /dev: the kernel's devtmpfs is mounted over it
	default:
		return fmt.Errorf("entry of type %q cannot be put into an image", h.Typeflag)
	}
	return s.xattrs(name, h.PAXRecords)
}

func (s *script) xattrs(name string, records map[string]string) error {
	for _, key := range sortedKeys(records) {
		attr, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		s.count++
		value := filepath.Join(s.dir, strconv.Itoa(s.count))
		if err := os.WriteFile(value, []byte(records[key]), 0o600); err != nil {
			return err
		}
		s.cmd("ea_set", "-f", value, name, attr)
	}
	return nil
}

func (s *script) file(name, source string, mode int64, uid, gid int, mtime int64) {
	s.in(name)
	s.cmd("write", source, path.Base(name))
	s.inode(name, 0o100000|mode, uid, gid, mtime)
}

func (s *script) inode(name string, mode int64, uid, gid int, mtime int64) {
	ref := path.Base(name)
	if name == "/" {
		ref = "/"
	}
	s.cmd("set_inode_field", ref, "mode", "0"+strconv.FormatInt(mode, 8))
	if uid != 0 {
		s.cmd("set_inode_field", ref, "uid", strconv.Itoa(uid))
	}
	if gid != 0 {
		s.cmd("set_inode_field", ref, "gid", strconv.Itoa(gid))
	}
	s.cmd("set_inode_field", ref, "mtime", "@"+strconv.FormatInt(mtime, 10))
}

// in goes to the directory that holds name.
func (s *script) in(name string) {
	if dir := path.Dir(name); dir != s.cwd {
		s.cmd("cd", dir)
		s.cwd = dir
	}
}

// cmd adds one command; debugfs splits it at blanks outside of double quotes.
func (s *script) cmd(words ...string) {
	for i, w := range words {
		if strings.ContainsAny(w, "\"\n") || w == "" {
			s.err = errors.Join(s.err, fmt.Errorf("name %q cannot be put into an image", w))
		}
		if i > 0 {
			s.buf.WriteByte(' ')
		}
		if strings.ContainsAny(w, " \t#") {
			w = `"` + w + `"`
		}
		s.buf.WriteString(w)
	}
	s.buf.WriteByte('\n')
}

// finish ends the script; debugfs wants a last command that is not the end of the file.
func (s *script) finish() { s.buf.WriteString("quit\n") }
