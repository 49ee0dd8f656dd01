package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const recordVersion = 1

// record is all that is known of a sandbox, as it stands on disk in its directory. It is written before
// a side effect starts (with operation set) and after it ended (without), so a later agent can tell
// what was half done. Fields are only ever added.
type record struct {
	Version  int                `json:"version"`
	ID       string             `json:"id"`
	State    wrenn.SandboxState `json:"state"`
	Revision uint64             `json:"revision"`
	// OperationID made the last state change; a repeat of it is answered, not done again.
	OperationID string `json:"operation_id"`
	Reason      string `json:"reason,omitempty"`

	Template       string            `json:"template"`
	TemplateDigest string            `json:"template_digest"`
	VCPUs          int               `json:"vcpus"`
	MemoryMB       int               `json:"memory_mb"`
	DiskMB         int               `json:"disk_mb"`
	Parent         string            `json:"parent,omitempty"` // the checkpoint that the state descends from
	Env            map[string]string `json:"env,omitempty"`
	User           string            `json:"user"`
	Hostname       string            `json:"hostname"`
	MachineID      string            `json:"machine_id"`
	// AccessToken is what the guest agent knows; NextToken is what it is being told, kept first, so that
	// an agent that dies in between can still speak to the guest.
	AccessToken string `json:"access_token"`
	NextToken   string `json:"next_token,omitempty"`

	CreatedAt    time.Time `json:"created_at"`
	StartedAt    time.Time `json:"started_at,omitzero"`
	LastActiveAt time.Time `json:"last_active_at,omitzero"`
	Cold         bool      `json:"cold"`

	Slot int        `json:"slot"` // network slot, -1 if none
	VM   *vm.Handle `json:"vm,omitempty"`
	// HasMemory says that the machine is at rest with its memory, so that it can be resumed, not only booted.
	HasMemory bool `json:"has_memory,omitempty"`
	// Needs says, while it is paused with its memory, what can resume it.
	Needs *needs `json:"needs,omitempty"`
	// Before is set while a rollback is under way.
	Before *before `json:"before,omitempty"`
	// DurableAt is since when the paused machine survives a power cut of the host; zero while it may not.
	DurableAt time.Time `json:"durable_at,omitzero"`
}

// Names in a sandbox's directory, beside its machine.
const (
	recordFile = "record.json"
	consoleLog = "console.log"
)

// toRunning is the record of a sandbox whose guest knows who it is.
func (r *record) toRunning() {
	r.State, r.DurableAt = wrenn.SandboxRunning, time.Time{}
	if r.NextToken != "" {
		r.AccessToken, r.NextToken = r.NextToken, ""
	}
}

// toPaused is the record of a sandbox whose VM is gone, and whose machine is at rest in m.
func (r *record) toPaused(m machine, hasMemory bool) {
	r.State, r.VM, r.Slot, r.HasMemory, r.Reason, r.Needs = wrenn.SandboxPaused, nil, -1, hasMemory, "", nil
	r.DurableAt = time.Time{}
	if man, err := m.load(); err == nil && hasMemory {
		r.Needs = &man.needs
	}
}

// save replaces the record in dir, atomically and durably.
func (r *record) save(dir string) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeDurably(filepath.Join(dir, recordFile), append(raw, '\n'))
}

func loadRecord(dir string) (*record, error) {
	raw, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return nil, err
	}
	r := &record{Slot: -1}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("record of %s: %w", filepath.Base(dir), err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("record of %s has version %d, this agent knows %d", filepath.Base(dir), r.Version, recordVersion)
	}
	if r.ID != filepath.Base(dir) || !r.State.Valid() {
		return nil, fmt.Errorf("record of %s is damaged", filepath.Base(dir))
	}
	return r, nil
}

// writeDurably replaces a file, mode 0600, so that after a power cut either the old or the new content
// is there.
func writeDurably(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := writeSyncClose(f, content); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeSyncClose(f *os.File, content []byte) error {
	_, err := f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
