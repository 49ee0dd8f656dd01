package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const recordVersion = 1

// record is all that is known of a sandbox, as it stands on disk in its directory. It is written before
// a side effect starts (with operation set) and after it ended (without), so a later agent can tell
// what was half done. Fields are only ever added.
type record struct {
	Version int `json:"version"`
	// BootID is of the host's boot in which this was written, Writes counts how often it was: the one of two
	// records that counts more is the later one.
	BootID string `json:"boot_id,omitempty"`
	Writes uint64 `json:"writes,omitempty"`

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
	recordFile  = "record.json"      // survives a power cut
	passingFile = "record.boot.json" // what was written since, and counts as long as the host's boot lasts
	consoleLog  = "console.log"
)

// lasting says what a record must survive. The end of the agent, always. A power cut ends every VM and
// with it what most records tell: which one runs, what it is being asked. Only where a sandbox or its files
// come, go or change places, or memory is promised to be kept, is the time taken to bring the record to disk.
type lasting bool

const (
	thisBoot lasting = false
	forGood  lasting = true
)

// revisionsLost is more than the state changes that one boot can have made and a power cut have taken back.
const revisionsLost = 1 << 24

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
	r.DurableAt, r.Before = time.Time{}, nil
	if man, err := m.load(); err == nil && hasMemory {
		r.Needs = &man.needs
	}
}

// save writes the record to dir, atomically.
func (r *record) save(dir string, keep lasting) error {
	boot, err := vmproc.BootID()
	if err != nil {
		return err
	}
	r.BootID = boot
	r.Writes++
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	name := recordFile
	if keep == thisBoot {
		name = passingFile
	}
	return write(keep, filepath.Join(dir, name), append(raw, '\n'))
}

// loadRecord gives the latest record of dir that is still good.
func loadRecord(dir string) (*record, error) {
	r, err := readRecord(dir, recordFile)
	if err != nil {
		return nil, err
	}
	boot, err := vmproc.BootID()
	if err != nil {
		return nil, err
	}
	if passing, err := readRecord(dir, passingFile); err == nil && passing.BootID == boot && passing.Writes > r.Writes {
		return passing, nil
	}
	return r, nil
}

func readRecord(dir, name string) (*record, error) {
	raw, err := os.ReadFile(filepath.Join(dir, name))
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

// write replaces a file, mode 0600: whoever reads it finds the old content or the new, forGood also after a power
// cut.
func write(keep lasting, path string, content []byte) error {
	if err := replace(keep, path, content); err != nil || keep == thisBoot {
		return err
	}
	return storage.Sync(filepath.Dir(path))
}

// replace is write without what brings the new name to disk.
func replace(keep lasting, path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(content)
	if keep == forGood {
		err = errors.Join(err, f.Sync())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
