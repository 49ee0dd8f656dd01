package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// machine is a directory that holds what one virtual machine is made of. While the VM runs, its disk and
// memory are in use and change. At rest, device state and a manifest lie beside them, and together they
// are one moment of the machine: a paused sandbox, or a template that sandboxes are cloned from. The
// manifest is written last and removed first, so files without it are never taken for a moment.
type machine string

// machineDir is the machine of a sandbox, or of a moment of one, in its directory.
const machineDir = "machine"

// Names in a machine's directory.
const (
	diskFile     = "disk.ext4"
	memoryFile   = "memory"
	stateFile    = "state"
	manifestFile = "manifest.json"
	vmDir        = "vm" // the driver's sockets and logs, only while a VM exists
)

func (m machine) dir() string      { return string(m) }
func (m machine) disk() string     { return filepath.Join(string(m), diskFile) }
func (m machine) memory() string   { return filepath.Join(string(m), memoryFile) }
func (m machine) state() string    { return filepath.Join(string(m), stateFile) }
func (m machine) manifest() string { return filepath.Join(string(m), manifestFile) }
func (m machine) vm() string       { return filepath.Join(string(m), vmDir) }

const manifestVersion = 2

// manifest says what a machine at rest is and what can run it.
type manifest struct {
	Version int `json:"version"`
	needs
	VCPUs     int       `json:"vcpus"`
	MemoryMB  int       `json:"memory_mb"`
	DiskBytes int64     `json:"disk_bytes"`
	StateSHA  string    `json:"state_sha256"` // hex
	SavedAt   time.Time `json:"saved_at"`
	// BootID is of the host's boot in which the moment was saved. Until the files are known to be on disk
	// (Durable), they are good only as long as that boot lasts.
	BootID  string `json:"boot_id"`
	Durable bool   `json:"durable"`
	// Token is the access token that the guest agent in the saved memory knows; empty for a template.
	Token string `json:"token,omitempty"`
}

// needs is what saved memory was made by; it runs only where all of it is the same.
type needs struct {
	Driver     string `json:"driver"`
	VMMVersion string `json:"vmm_version"`
	Accel      string `json:"acceleration"`
	Arch       string `json:"arch"`
	CPUModel   string `json:"cpu_model"`
}

func needsOf(caps vm.Capabilities) needs {
	return needs{Driver: caps.Driver, VMMVersion: caps.Version, Accel: caps.Acceleration, Arch: caps.Arch, CPUModel: caps.CPUModel}
}

// rest takes a frozen VM's moment into m. The VM's disk must be in m already, in use or as a clone; its
// memory is too, or is cloned. token is what the guest agent knows.
func (m machine) rest(ctx context.Context, driver vm.Driver, handle vm.Handle, vcpus int, token string) error {
	if err := driver.Snapshot(ctx, handle, vm.SnapshotFiles{State: m.state(), Memory: m.memory(), Progress: bytesOf(ctx, stepMemory)}); err != nil {
		return err
	}
	disk, err := os.Stat(m.disk())
	if err != nil {
		return err
	}
	sum, err := checksum(m.state())
	if err != nil {
		return err
	}
	boot, err := vmproc.BootID()
	if err != nil {
		return err
	}
	caps := driver.Capabilities().Of(handle)
	return m.writeManifest(thisBoot, manifest{
		Version: manifestVersion, needs: needsOf(caps), VCPUs: vcpus, MemoryMB: handle.MemoryMB, DiskBytes: disk.Size(), StateSHA: sum,
		SavedAt: time.Now().UTC(), BootID: boot, Token: token,
	})
}

func (m machine) writeManifest(keep lasting, man manifest) error {
	raw, err := json.MarshalIndent(man, "", "  ")
	if err != nil {
		return err
	}
	return write(keep, m.manifest(), append(raw, '\n'))
}

// checksum is a file's SHA-256, in hex.
func checksum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// load reads the manifest of a machine at rest and checks what it says; os.ErrNotExist says that it is not
// at rest.
func (m machine) load() (*manifest, error) {
	raw, err := os.ReadFile(m.manifest())
	if err != nil {
		return nil, err
	}
	if len(bytes.Trim(raw, "\x00")) == 0 { // its name came to disk before a power cut, and not what it says
		return nil, fmt.Errorf("manifest of %s is empty: %w", filepath.Base(m.dir()), os.ErrNotExist)
	}
	man := &manifest{}
	if err := json.Unmarshal(raw, man); err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", filepath.Base(m.dir()), err)
	}
	if man.Version != manifestVersion {
		return nil, fmt.Errorf("manifest of %s has version %d, this agent knows %d", filepath.Base(m.dir()), man.Version, manifestVersion)
	}
	boot, err := vmproc.BootID()
	if err != nil {
		return nil, err
	}
	if !man.Durable && man.BootID != boot {
		return nil, fmt.Errorf("the host restarted before %s was safe on its disk: %w", filepath.Base(m.dir()), os.ErrNotExist)
	}
	if sum, err := checksum(m.state()); err != nil || sum != man.StateSHA {
		return nil, errors.Join(fmt.Errorf("device state of %s is damaged", filepath.Base(m.dir())), err)
	}
	if memory, err := os.Stat(m.memory()); err != nil || memory.Size() != int64(man.MemoryMB)<<20 {
		return nil, errors.Join(fmt.Errorf("memory of %s is damaged", filepath.Base(m.dir())), err)
	}
	return man, nil
}

// fits tells whether a driver can run this moment, and if not, why.
func (man *manifest) fits(caps vm.Capabilities) error {
	differs := func(what, want, have string) error {
		return wrenn.Errorf(wrenn.KindInvalidState, "the saved memory needs %s %s, this host has %s", what, want, have).
			With("needs", want).With("has", have)
	}
	for _, other := range caps.Others {
		if man.fits(other) == nil {
			return nil
		}
	}
	switch {
	case man.Driver != caps.Driver:
		return differs("the hypervisor", man.Driver, caps.Driver)
	case man.VMMVersion != caps.Version:
		return differs(man.Driver, man.VMMVersion, caps.Version)
	case man.Accel != caps.Acceleration:
		return differs("acceleration", man.Accel, caps.Acceleration)
	case man.Arch != caps.Arch || man.CPUModel != caps.CPUModel:
		return differs("the CPU", man.Arch+" "+man.CPUModel, caps.Arch+" "+caps.CPUModel)
	}
	return nil
}

// report is what the control plane places by; nil for none.
func (n *needs) report() *agentv1.Needs {
	if n == nil {
		return nil
	}
	return &agentv1.Needs{Driver: n.Driver, VmmVersion: n.VMMVersion, Acceleration: n.Accel, Arch: n.Arch, CpuModel: n.CPUModel}
}

// wake removes what makes m a moment, as its VM is about to change it.
func (m machine) wake() error {
	err := os.Remove(m.manifest())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return storage.Sync(m.dir())
}

// atRest tells whether m is a saved moment with memory.
func (m machine) atRest() bool {
	_, err := m.load()
	return err == nil
}

// cloneFrom makes m a clone of src, which is at rest or has only a disk.
func (m machine) cloneFrom(ctx context.Context, store *storage.Store, src machine) error {
	if err := os.Mkdir(m.dir(), 0o711); err != nil {
		return err
	}
	if err := store.Clone(ctx, src.disk(), m.disk()); err != nil || !src.atRest() {
		return err
	}
	for _, f := range []struct{ from, to string }{{src.memory(), m.memory()}, {src.state(), m.state()}, {src.manifest(), m.manifest()}} {
		if err := store.Clone(ctx, f.from, f.to); err != nil {
			return err
		}
	}
	return nil
}

// sync makes all of a machine at rest survive a power cut, and has its manifest say so.
func (m machine) sync() error {
	if err := m.syncFiles(); err != nil {
		return err
	}
	return m.markDurable()
}

// markDurable is for a machine whose files are on disk. One that is not at rest has nothing to say it.
func (m machine) markDurable() error {
	man, err := m.load()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || man.Durable {
		return err
	}
	man.Durable = true
	return m.writeManifest(forGood, *man)
}

func (m machine) syncFiles() error {
	for _, path := range []string{m.disk(), m.memory(), m.state(), m.dir()} {
		if err := storage.Sync(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// usage is what m takes alone and what removing it would free, in bytes.
func (m machine) usage() (size, own int64, err error) {
	return usageOf(m.disk(), m.memory(), m.state())
}

// usageOf sums what files take alone and what removing them would free; those that are not there take nothing.
func usageOf(paths ...string) (size, own int64, err error) {
	for _, path := range paths {
		s, o, err := storage.Usage(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, 0, err
		}
		size, own = size+s, own+o
	}
	return size, own, nil
}
