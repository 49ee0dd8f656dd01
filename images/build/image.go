package main

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// manifest is NAME.json.
type manifest struct {
	Name        string `json:"name"`
	Version     int    `json:"version"` // of this format
	Arch        string `json:"arch"`
	CreatedFrom string `json:"created_from"`
	Packages    []pkg  `json:"packages"`
	SizeBytes   int64  `json:"size_bytes"`
	UsedBytes   int64  `json:"used_bytes"` // on this machine's disk
	SHA256      string `json:"sha256"`
	EnvdVersion string `json:"envd_version"`
	EnvdSHA256  string `json:"envd_sha256"`
	Kernel      string `json:"kernel"`
	DefaultUser string `json:"default_user"`
	Inputs      string `json:"inputs"` // digest of recipe, sources and this program
}

type pkg struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

//go:embed *.go
var sourceFiles embed.FS

// sourceText is part of this program's own text: a change of it makes anew what it made.
func sourceText(names ...string) string {
	var b strings.Builder
	for _, name := range names {
		raw, err := sourceFiles.ReadFile(name)
		if err != nil {
			panic(err) // not embedded: a misspelt name
		}
		b.Write(raw)
	}
	return b.String()
}

// image makes one image, brings only its guest agent up to date, or finds it good.
func (b *builder) image(ctx context.Context, r recipe, kernel kernelInfo) error {
	src, err := hostSource(ctx)
	if err != nil {
		return err
	}
	inputs := digest(sourceText("rootfs.go", "ext4.go", "image.go"), r.name, strings.Join(src.lines, "\n"))
	have, err := readManifest(b.manifestPath(r.name))
	if err == nil && have.Inputs == inputs && !b.force && fileExists(b.imagePath(r.name)) {
		return b.refresh(ctx, r.name, have)
	}
	b.step("%s: install %d packages and what they need", r.name, len(r.packages))
	scratch := b.scratch(r.name)
	if err := errors.Join(os.RemoveAll(scratch), os.Mkdir(scratch, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	archive := filepath.Join(scratch, "root.tar")
	packages, err := debootstrap(ctx, r, src, archive)
	if err != nil {
		return err
	}
	b.step("%s: write the file system, %d packages", r.name, len(packages))
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	target := filesystem{path: filepath.Join(scratch, "root.ext4"), size: diskSize, uuid: r.uuid, label: r.name, epoch: epoch}
	if err := target.populate(ctx, f, []extraFile{{b.envd, "/usr/local/bin/envd", 0o755}}); err != nil {
		return err
	}
	if err := target.check(ctx); err != nil {
		return err
	}
	m := manifest{
		Name: r.name, Version: 1, CreatedFrom: "debian " + src.suite, Packages: packages,
		Kernel: kernel.Package + " " + kernel.Version, DefaultUser: "user", Inputs: inputs,
	}
	if m.Arch, err = goArch(ctx); err != nil {
		return err
	}
	return b.publish(ctx, target.path, m)
}

// publish completes the manifest and puts both files in place; the manifest last, since it vouches for
// the image.
func (b *builder) publish(ctx context.Context, file string, m manifest) error {
	if err := m.measure(ctx, file, b.envd); err != nil {
		return err
	}
	if err := os.Remove(b.manifestPath(m.Name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(file, b.imagePath(m.Name)); err != nil {
		return err
	}
	if err := writeJSON(b.manifestPath(m.Name), m); err != nil {
		return err
	}
	b.step("%s: ready, %d MiB on disk, sha256 %s", m.Name, m.UsedBytes>>20, m.SHA256[:16])
	return nil
}

// refresh puts the current guest agent into an image whose agent is another one.
func (b *builder) refresh(ctx context.Context, name string, have manifest) error {
	sum, err := hashFile(b.envd)
	if err != nil {
		return err
	}
	if sum == have.EnvdSHA256 {
		b.step("%s: up to date", name)
		return nil
	}
	return b.inject(ctx, b.imagePath(name))
}

// inject replaces the guest agent in an image, and brings the manifest beside it up to date if there is
// one. It works on a copy: whoever clones the image meanwhile gets the old one or the new one.
func (b *builder) inject(ctx context.Context, image string) error {
	tmp := image + ".new"
	defer os.Remove(tmp)
	if out, err := exec.CommandContext(ctx, "cp", "--reflink=auto", "--sparse=always", image, tmp).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, clip(string(out)))
	}
	dir, err := os.MkdirTemp(filepath.Dir(image), "tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	target := filesystem{path: tmp, epoch: epoch}
	s := &script{dir: dir, links: map[string]int{}}
	s.cmd("cd", "/usr/local/bin")
	s.cwd = "/usr/local/bin"
	if target.has(ctx, "/usr/local/bin/envd") {
		s.cmd("rm", "envd")
	}
	s.file("/usr/local/bin/envd", b.envd, 0o755, 0, 0, epoch)
	if err := target.run(ctx, s); err != nil {
		return err
	}
	if err := target.check(ctx); err != nil {
		return err
	}
	manifestFile := strings.TrimSuffix(image, ".ext4") + ".json"
	m, err := readManifest(manifestFile)
	if err != nil {
		b.step("%s: guest agent replaced; there is no manifest beside it", image)
		return os.Rename(tmp, image)
	}
	if err := m.measure(ctx, tmp, b.envd); err != nil {
		return err
	}
	if err := os.Rename(tmp, image); err != nil {
		return err
	}
	b.step("%s: guest agent replaced, sha256 %s", m.Name, m.SHA256[:16])
	return writeJSON(manifestFile, m)
}

// has tells whether the file system has such a file.
func (f filesystem) has(ctx context.Context, path string) bool {
	out, err := f.command(ctx, "debugfs", "-R", "stat "+path, f.path).Output()
	return err == nil && strings.Contains(string(out), "Inode:")
}

// measure fills in what can be read from the finished files.
func (m *manifest) measure(ctx context.Context, image, envd string) error {
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	m.SizeBytes = st.Size()
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		m.UsedBytes = sys.Blocks * 512
	}
	if m.SHA256, err = hashFile(image); err != nil {
		return err
	}
	if m.EnvdSHA256, err = hashFile(envd); err != nil {
		return err
	}
	abs, err := filepath.Abs(envd)
	if err != nil {
		return err
	}
	version, err := output(ctx, abs, "-version")
	m.EnvdVersion = strings.TrimSpace(strings.TrimPrefix(version, "envd "))
	return err
}

func readManifest(path string) (manifest, error) {
	var m manifest
	raw, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	return m, err
}

func writeJSON(path string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, f, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d %s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func goArch(ctx context.Context) (string, error) {
	out, err := output(ctx, "dpkg", "--print-architecture")
	return strings.TrimSpace(out), err // Debian's names of amd64 and arm64 are Go's
}

// output runs a command and gives its standard output; its errors are in the error.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return "", fmt.Errorf("%s: %w: %s", name, err, clip(string(ee.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return string(out), nil
}

func clip(s string) string {
	if s = strings.TrimSpace(s); len(s) > 2000 {
		return s[:2000] + " …"
	}
	return s
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
