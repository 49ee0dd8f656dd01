package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// origin is what a new sandbox is cloned from.
type origin struct {
	machine  machine
	diskMB   int
	digest   string
	user     string
	parent   string // the checkpoint, if it is one
	template bool   // it is a template, not a saved moment
	shared   bool   // many are cloned from it
	cold     bool   // it had to be made first
	diskOnly bool   // its memory is left
}

// findOrigin finds or makes what a sandbox with this record is to be cloned from.
type findOrigin func(ctx context.Context, rec record) (origin, error)

// origin finds or makes what a create asks for.
func (s *Sandboxes) origin(ctx context.Context, rec record, src *agentv1.Source) (o origin, err error) {
	defer func() { o.diskOnly = src.GetDiskOnly() }()
	switch from := src.GetMoment().(type) {
	case *agentv1.Source_SnapshotId:
		if !wrenn.ValidID(wrenn.PrefixSnapshot, from.SnapshotId) {
			return origin{}, wrenn.Errorf(wrenn.KindInvalidRequest, "%q is not the id of a snapshot", from.SnapshotId)
		}
		return originMoment(rec, filepath.Join(s.snapshots, from.SnapshotId))
	case *agentv1.Source_Checkpoint:
		id := from.Checkpoint.GetCheckpointId()
		if !wrenn.ValidID(wrenn.PrefixSandbox, from.Checkpoint.GetSandboxId()) || !wrenn.ValidID(wrenn.PrefixCheckpoint, id) {
			return origin{}, wrenn.Errorf(wrenn.KindInvalidRequest, "the checkpoint or its sandbox has no valid id")
		}
		dir := filepath.Join(s.dir, sandboxesDir, from.Checkpoint.SandboxId, checkpointsDir, id)
		o, err := originMoment(rec, dir)
		o.parent, o.shared = id, false // few are made of a checkpoint
		return o, err
	}
	img, err := s.images.find(rec.Template)
	if err != nil {
		return origin{}, err
	}
	m, cold, err := s.template(ctx, img, rec.VCPUs, rec.MemoryMB)
	return origin{machine: m, diskMB: img.DiskMB(), digest: img.Digest, user: img.DefaultUser, template: true, shared: true, cold: cold}, err
}

// originMoment opens a saved moment. Its memory runs only in the size it was saved in.
func originMoment(rec record, dir string) (origin, error) {
	mo, err := loadMoment(dir)
	if err != nil {
		return origin{}, err
	}
	if rec.VCPUs != mo.VCPUs || rec.MemoryMB != mo.MemoryMB {
		return origin{}, wrenn.Errorf(wrenn.KindInvalidRequest, "the saved state has %d vCPUs and %d MiB of memory; a sandbox made from it has the same", mo.VCPUs, mo.MemoryMB).
			With("field", "memory_mb")
	}
	return origin{machine: mo.machine(), diskMB: mo.DiskMB, digest: mo.TemplateDigest, user: mo.User, shared: true}, nil
}

// moment is a saved state of a sandbox, kept apart from it: a checkpoint or a snapshot. Its directory
// holds moment.json, written last, and a machine.
type moment struct {
	ID             string    `json:"id"`
	Parent         string    `json:"parent,omitempty"`
	CreatedAt      time.Time `json:"created_at"`
	HasMemory      bool      `json:"has_memory"`
	VCPUs          int       `json:"vcpus"`
	MemoryMB       int       `json:"memory_mb"`
	DiskMB         int       `json:"disk_mb"`
	TemplateDigest string    `json:"template_digest"`
	User           string    `json:"user"`

	dir string
}

const (
	checkpointsDir = "checkpoints" // in a sandbox's directory
	momentFile     = "moment.json"
)

func (mo *moment) machine() machine { return machine(filepath.Join(mo.dir, machineDir)) }

func loadMoment(dir string) (*moment, error) {
	raw, err := os.ReadFile(filepath.Join(dir, momentFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "this host has no saved state %s", filepath.Base(dir))
	}
	if err != nil {
		return nil, err
	}
	mo := &moment{dir: dir}
	if err := json.Unmarshal(raw, mo); err != nil {
		return nil, fmt.Errorf("saved state %s: %w", filepath.Base(dir), err)
	}
	return mo, nil
}

func (mo *moment) save() error {
	raw, err := json.MarshalIndent(mo, "", "  ")
	if err != nil {
		return err
	}
	return write(forGood, filepath.Join(mo.dir, momentFile), append(raw, '\n'))
}

// report describes a moment with its sizes.
func (mo *moment) report() (*agentv1.Checkpoint, error) {
	size, own, err := mo.machine().usage()
	if err != nil {
		return nil, err
	}
	c := mo.describe()
	c.SizeBytes, c.OwnBytes = uint64(size), uint64(own)
	return c, nil
}

// describe is the moment without its sizes.
func (mo *moment) describe() *agentv1.Checkpoint {
	c := &agentv1.Checkpoint{
		Id: mo.ID, ParentId: mo.Parent, CreatedAt: timestamp(mo.CreatedAt), HasMemory: mo.HasMemory,
		Vcpus: uint32(mo.VCPUs), MemoryMb: uint64(mo.MemoryMB), DiskMb: uint64(mo.DiskMB), User: mo.User,
	}
	if man, err := mo.machine().load(); err == nil {
		c.Needs = man.report()
	}
	return c
}

// listMoments gives the whole moments below a directory.
func listMoments(dir string) ([]*moment, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*moment
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), unfinished) {
			continue
		}
		mo, err := loadMoment(filepath.Join(dir, e.Name()))
		if wrenn.KindOf(err) == wrenn.KindNotFound {
			continue // being removed
		}
		if err != nil {
			return nil, err
		}
		all = append(all, mo)
	}
	return all, nil
}

// unfinished ends the name of a directory that is being written.
const unfinished = ".new"
