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
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernelPackage depends on the newest kernel for virtual machines in Debian.
const kernelPackage = "linux-image-cloud-"

// guestModules are what a guest needs before it has its root file system; their dependencies are added.
// Drivers that a hypervisor does not offer devices for do nothing.
func guestModules() []string {
	return []string{"virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon"}
}

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
	arch, err := output(ctx, "dpkg", "--print-architecture")
	if err != nil {
		return have, err
	}
	tmp, err := os.MkdirTemp(b.kernels, "tmp-")
	if err != nil {
		return have, err
	}
	defer os.RemoveAll(tmp)
	pkg, err := kernelDependency(ctx, kernelPackage+strings.TrimSpace(arch))
	if err != nil {
		return have, err
	}
	b.step("download %s", pkg)
	deb, version, err := download(ctx, tmp, pkg)
	if err != nil {
		return have, err
	}
	if _, err := output(ctx, "dpkg-deb", "-x", deb, filepath.Join(tmp, "root")); err != nil {
		return have, err
	}
	info := kernelInfo{Package: pkg, Version: version, Inputs: inputs}
	if info.Modules, err = installKernel(filepath.Join(tmp, "root"), b.kernels); err != nil {
		return have, err
	}
	b.step("kernel %s %s with %d modules", pkg, version, len(info.Modules))
	return info, writeJSON(metaPath, info)
}

// kernelDependency is the package with the kernel that the meta package stands for.
func kernelDependency(ctx context.Context, meta string) (string, error) {
	out, err := output(ctx, "apt-cache", "depends", "--no-recommends", "--no-suggests", meta)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if dep, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + dep, nil
		}
	}
	return "", fmt.Errorf("package %s is not known to apt; run `apt-get update`, or set AGENT_KERNEL_PATH to a kernel of your own", meta)
}

func download(ctx context.Context, dir, pkg string) (file, version string, err error) {
	cmd := exec.CommandContext(ctx, "apt-get", "download", "-q", pkg)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("apt-get download %s: %w\n%s", pkg, err, out)
	}
	debs, err := filepath.Glob(filepath.Join(dir, pkg+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", "", fmt.Errorf("apt-get download %s left no package", pkg)
	}
	version, err = output(ctx, "dpkg-deb", "-f", debs[0], "Version")
	return debs[0], strings.TrimSpace(version), err
}

// installKernel puts the kernel and the modules that guests need from an unpacked package into dir.
func installKernel(root, dir string) ([]string, error) {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return nil, errors.New("the package holds no kernel")
	}
	modules, err := resolveModules(filepath.Join(root, "lib/modules"), guestModules())
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

// resolveModules gives the files of the wanted modules and of all that they depend on, each after its
// dependencies.
func resolveModules(dir string, wanted []string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(d.Name(), ".ko"); err == nil && ok {
			files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []string
	var visit func(name string) error
	visit = func(name string) error {
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("module %s is not in the kernel package", name)
		}
		if slices.Contains(order, path) {
			return nil
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
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
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
