package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCPIOIsWhatTheToolReads(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("needs the program cpio")
	}
	var b bytes.Buffer
	c := &cpio{w: &b}
	c.add("dir", 0o040755, nil)
	c.add("dir/file", 0o100644, []byte("hello"))
	c.addDevice("console", 0o020600, 5, 1)
	c.add("TRAILER!!!", 0, nil)
	if c.err != nil {
		t.Fatal(c.err)
	}
	list := exec.Command("cpio", "-tv", "--quiet")
	list.Stdin = bytes.NewReader(b.Bytes())
	out, err := list.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"drwxr-xr-x", "-rw-r--r--", "dir/file", "crw-------", "5,   1"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	dir := t.TempDir()
	unpack := exec.Command("cpio", "-i", "--quiet", "-d", "dir/file")
	unpack.Dir, unpack.Stdin = dir, bytes.NewReader(b.Bytes())
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "dir/file")); err != nil || string(raw) != "hello" {
		t.Errorf("%q %v", raw, err)
	}
}

func TestParseSources(t *testing.T) {
	t.Parallel()
	const key = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
	got := parseSources("Debian|http://m/debian|trixie|main\nDebian|http://m/debian|trixie|main\nDebian|http://m/debian|trixie|contrib\n" +
		"Debian|http://m/debian|trixie-backports|main\nDebian|http://m/security|trixie-security|main\nDebian|http://m/debian|bookworm|main\nOther|http://o|stable|main\n")
	want := source{suite: "trixie", lines: []string{key + "http://m/debian trixie main", key + "http://m/security trixie-security main"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got := parseSources("Ubuntu|http://u|noble|main\n"); got.suite != "bookworm" || len(got.lines) != 3 {
		t.Errorf("a machine without Debian's sources: %+v", got)
	}
}

func archive(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	when := time.Unix(1600000000, 0)
	for _, e := range []struct {
		h    tar.Header
		data string
	}{
		{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
		{tar.Header{Name: "./with space/", Typeflag: tar.TypeDir, Mode: 0o1777}, ""},
		{tar.Header{Name: "./with space/f#1", Typeflag: tar.TypeReg, Mode: 0o4750, Uid: 1000, Gid: 27}, "content"},
		{tar.Header{Name: "./hard", Typeflag: tar.TypeLink, Linkname: "./with space/f#1"}, ""},
		{tar.Header{Name: "./soft", Typeflag: tar.TypeSymlink, Linkname: "with space/f#1"}, ""},
		{tar.Header{Name: "./dev-null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""},
		{tar.Header{Name: "./big", Typeflag: tar.TypeReg, Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.color": "blue"}}, strings.Repeat("x", 3<<20)},
	} {
		e.h.Size, e.h.ModTime = int64(len(e.data)), when
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func populate(t *testing.T) string {
	t.Helper()
	f := filesystem{path: filepath.Join(t.TempDir(), "fs.ext4"), size: 64 << 20, uuid: recipes()[0].uuid, label: "test", epoch: epoch}
	for _, tool := range []string{"mke2fs", "debugfs", "e2fsck", "fallocate"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs the program " + tool)
		}
	}
	if err := f.populate(context.Background(), bytes.NewReader(archive(t)), nil); err != nil {
		t.Fatal(err)
	}
	if err := f.check(context.Background()); err != nil {
		t.Fatal(err)
	}
	return f.path
}

func TestFilesystemHoldsTheArchive(t *testing.T) {
	t.Parallel()
	image := populate(t)
	ask := func(request string) string {
		out, err := exec.Command("debugfs", "-R", request, image).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	if got := ask(`cat "/with space/f#1"`); got != "content" {
		t.Errorf("content %q", got)
	}
	stat := ask(`stat "/hard"`)
	for _, want := range []string{"Type: regular", "Mode:  04750", "User:  1000", "Group:    27", "Links: 2", "mtime: 0x5f5e1000"} {
		if !strings.Contains(stat, want) {
			t.Errorf("%q is not in\n%s", want, stat)
		}
	}
	if got := ask("stat /soft"); !strings.Contains(got, `Fast link dest: "with space/f#1"`) {
		t.Errorf("link\n%s", got)
	}
	if got := ask("stat /big"); !strings.Contains(got, "Size: 3145728") || !strings.Contains(got, `user.color (4) = "blue"`) {
		t.Errorf("big file\n%s", got)
	}
	if got := ask(`stat "/with space"`); !strings.Contains(got, "Mode:  01777") {
		t.Errorf("directory\n%s", got)
	}
}

func TestFilesystemIsTheSameEachTime(t *testing.T) {
	t.Parallel()
	sum := func() [32]byte {
		raw, err := os.ReadFile(populate(t))
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(raw)
	}
	if first, second := sum(), sum(); first != second {
		t.Error("the same archive gave two different file systems")
	}
}

func TestScriptRefusesNamesItCannotSay(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a\nrm /etc/passwd", `a"b`, ""} {
		s := &script{links: map[string]int{}}
		s.cmd("mkdir", name)
		if s.err == nil {
			t.Errorf("%q was taken", name)
		}
	}
}

// Without root the hooks run as another user, who may write into the tree and nowhere else; only what
// mmdebstrap does itself may.
func TestHooksWriteIntoTheTreeOnly(t *testing.T) {
	t.Parallel()
	downloads := 0
	for _, arg := range arguments(recipe{packages: []string{"bash"}}, source{suite: "bookworm"}, "/elsewhere/root.tar", "/elsewhere/list") {
		hook, ok := strings.CutPrefix(arg, "--customize-hook=")
		switch {
		case !ok:
		case strings.HasPrefix(hook, "download "):
			downloads++
		case strings.Contains(hook, "/elsewhere"):
			t.Errorf("a hook names a file outside the tree: %s", hook)
		}
	}
	if downloads != 1 {
		t.Errorf("%d downloads", downloads)
	}
}

// Debian 13 compresses its modules and has them below /usr. They are those of the kernel beside, so what is asked for is there.
func TestCompressedModulesComeAfterWhatTheyNeed(t *testing.T) {
	t.Parallel()
	kernels := filepath.Dir(os.Getenv("WRENN_TEST_KERNEL"))
	raw, err := os.ReadFile(filepath.Join(kernels, "kernel.json"))
	if err != nil {
		t.Skipf("needs a guest kernel: run `make images`, and set WRENN_TEST_KERNEL to its vmlinuz: %v", err)
	}
	var have kernelInfo
	if err := json.Unmarshal(raw, &have); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dir := filepath.Join(root, "usr/lib/modules/6.12")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(kernels, "modules"))); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("xz", files...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	modules, err := resolveModules(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range modules {
		modules[i] = filepath.Base(path)
	}
	if !slices.Equal(modules, have.Modules) {
		t.Errorf("got  %v\nwant %v", modules, have.Modules)
	}
}

func TestUnknownImage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	envd := filepath.Join(dir, "envd")
	if err := os.WriteFile(envd, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	err := run(context.Background(), []string{"-envd", envd, "-images", dir, "-kernels", dir, "nosuch"}, &bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("got %v", err)
	}
}
