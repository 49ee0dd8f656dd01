package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// kernelPackage depends on Debian's newest kernel. It is the flavour for every machine, not the smaller one for clouds, which
// leaves out CONFIG_VMGENID (docs/security.md).
const kernelPackage = "linux-image-"

// guestModules are what a guest needs before it has its root file system; their dependencies are added.
// Drivers that a hypervisor does not offer devices for do nothing.
func guestModules() []string {
	return []string{"ext4", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon"}
}

// checksums are what ext4 asks the kernel for by another name, which is then to be there. Which there are depends on the
// processor.
func checksums() []string { return []string{"crc32c_generic", "crc32c_intel"} }

// kernelInfo is kept beside the kernel as kernel.json.
type kernelInfo struct {
	Package string   `json:"package"`
	Version string   `json:"version"`
	Modules []string `json:"modules"` // file names below modules/, in loading order
	Inputs  string   `json:"inputs"`
}

// kernel makes vmlinuz and modules/ unless they are there.
func (b *builder) kernel(ctx context.Context) (kernelInfo, error) {
	metaPath := filepath.Join(b.kernels, "kernel.json")
	inputs := digest(sourceText("kernel.go"))
	var have kernelInfo
	if raw, err := os.ReadFile(metaPath); err == nil && json.Unmarshal(raw, &have) == nil && have.Inputs == inputs && !b.force {
		if _, err := os.Stat(filepath.Join(b.kernels, "vmlinuz")); err == nil {
			return have, nil
		}
	}
	tmp, err := os.MkdirTemp(b.kernels, "tmp-")
	if err != nil {
		return have, err
	}
	defer os.RemoveAll(tmp)
	apt, err := openArchive(ctx, filepath.Join(tmp, "apt"))
	if err != nil {
		return have, err
	}
	b.step("look for Debian's kernel in %s", apt.suite)
	pkg, err := apt.kernel(ctx)
	if err != nil {
		return have, err
	}
	b.step("download %s", pkg)
	deb, version, err := apt.download(ctx, pkg)
	if err != nil {
		return have, err
	}
	if _, err := output(ctx, "dpkg-deb", "-x", deb, filepath.Join(tmp, "root")); err != nil {
		return have, err
	}
	info := kernelInfo{Package: pkg, Version: version, Inputs: inputs}
	if info.Modules, err = installKernel(ctx, filepath.Join(tmp, "root"), b.kernels); err != nil {
		return have, err
	}
	b.step("kernel %s %s with %d modules", pkg, version, len(info.Modules))
	return info, writeJSON(metaPath, info)
}

// aptArchive is Debian's, as images have it, whatever apt on this machine is set up for.
type aptArchive struct {
	dir, suite, config string
}

// openArchive reads what is in the archive; dir is for its lists and for what is downloaded.
func openArchive(ctx context.Context, dir string) (aptArchive, error) {
	src, err := hostSource(ctx)
	if err != nil {
		return aptArchive{}, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return aptArchive{}, err
	}
	a := aptArchive{dir: dir, suite: src.suite, config: filepath.Join(dir, "apt.conf")}
	for _, sub := range []string{"etc", "lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return aptArchive{}, err
		}
	}
	options := append([]string{
		fmt.Sprintf(`Dir::Etc %q`, filepath.Join(dir, "etc")), fmt.Sprintf(`Dir::State::lists %q`, filepath.Join(dir, "lists")),
		fmt.Sprintf(`Dir::Cache %q`, filepath.Join(dir, "cache")), `Dir::State::status "/dev/null"`, `APT::Sandbox::User ""`,
		`Acquire::Languages "none"`,
	}, src.options...)
	err = errors.Join(
		os.WriteFile(a.config, []byte(strings.Join(options, ";\n")+";\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "etc/sources.list"), []byte(strings.Join(src.lines, "\n")+"\n"), 0o600),
	)
	if err != nil {
		return aptArchive{}, err
	}
	_, err = a.run(ctx, "apt-get", "update", "-q")
	return a, err
}

// run runs one of apt's programs on the archive.
func (a aptArchive) run(ctx context.Context, name string, args ...string) (string, error) {
	return output(ctx, "env", append([]string{"--chdir=" + a.dir, "APT_CONFIG=" + a.config, name}, args...)...)
}

// kernel is the package that kernelPackage stands for.
func (a aptArchive) kernel(ctx context.Context) (string, error) {
	arch, err := output(ctx, "dpkg", "--print-architecture")
	if err != nil {
		return "", err
	}
	meta := kernelPackage + strings.TrimSpace(arch)
	out, err := a.run(ctx, "apt-cache", "depends", "--no-recommends", "--no-suggests", meta)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if dep, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + dep, nil
		}
	}
	return "", fmt.Errorf("there is no package %s in Debian %s", meta, a.suite)
}

func (a aptArchive) download(ctx context.Context, pkg string) (file, version string, err error) {
	if _, err := a.run(ctx, "apt-get", "download", "-q", pkg); err != nil {
		return "", "", err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, pkg+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", "", fmt.Errorf("apt-get download %s left no package", pkg)
	}
	version, err = output(ctx, "dpkg-deb", "-f", debs[0], "Version")
	return debs[0], strings.TrimSpace(version), err
}

// installKernel puts the kernel and the modules that guests need from an unpacked package into dir.
func installKernel(ctx context.Context, root, dir string) ([]string, error) {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return nil, errors.New("the package holds no kernel")
	}
	modules, err := resolveModules(ctx, root)
	if err != nil {
		return nil, err
	}
	modDir := filepath.Join(dir, "modules")
	if err := errors.Join(os.RemoveAll(modDir), os.MkdirAll(modDir, 0o755)); err != nil {
		return nil, err
	}
	var names []string
	for _, path := range modules {
		names = append(names, filepath.Base(path))
		if err := os.Rename(path, filepath.Join(modDir, filepath.Base(path))); err != nil {
			return nil, err
		}
	}
	return names, os.Rename(kernels[0], filepath.Join(dir, "vmlinuz"))
}

// resolveModules gives the files of the modules that guests need and of all that these depend on, each after its
// dependencies.
func resolveModules(ctx context.Context, root string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(strings.TrimSuffix(d.Name(), packed), ".ko"); err == nil && ok {
			files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []string
	done := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("module %s is not in the kernel package", name)
		}
		path, err := unpack(ctx, path)
		if err != nil {
			return err
		}
		deps, err := moduleDepends(path)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, dep := range deps {
			if err := visit(dep); err != nil {
				return err
			}
		}
		order = append(order, path)
		return nil
	}
	there := slices.DeleteFunc(checksums(), func(name string) bool { return files[name] == "" })
	for _, name := range append(there, guestModules()...) {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// packed is how the names of compressed modules end, as from Debian 13 on.
const packed = ".xz"

func unpack(ctx context.Context, path string) (string, error) {
	plain, ok := strings.CutSuffix(path, packed)
	if !ok {
		return path, nil
	}
	_, err := output(ctx, "xz", "--decompress", path)
	return plain, err
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// moduleDepends reads the "depends" of a module's .modinfo section.
func moduleDepends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("not a kernel module")
	}
	raw, err := section.Data()
	if err != nil {
		return nil, err
	}
	var deps []string
	for _, entry := range bytes.Split(raw, []byte{0}) {
		if list, ok := strings.CutPrefix(string(entry), "depends="); ok && list != "" {
			for _, d := range strings.Split(list, ",") {
				deps = append(deps, moduleName(d))
			}
		}
	}
	return deps, nil
}
