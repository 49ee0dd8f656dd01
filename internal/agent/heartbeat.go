package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/version"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// heartbeat is what the host tells the control plane every 30 s, and at once when something changed
// that nobody asked for.
type heartbeat struct {
	Specs          specs             `json:"specs"`
	Capacity       capacity          `json:"capacity"`
	FreeMemoryMB   int64             `json:"free_memory_mb"`
	FreeDiskMB     int64             `json:"free_disk_mb"`
	Load1          float64           `json:"load1"`
	Versions       map[string]string `json:"versions"`
	Driver         string            `json:"driver"`
	Acceleration   string            `json:"acceleration"`
	CPUModel       string            `json:"cpu_model"`
	Hypervisors    []needs           `json:"hypervisors"` // what saved memory can be resumed by
	Templates      []templateReport  `json:"templates"`
	StateRevision  uint64            `json:"state_revision"`
	Running        int               `json:"running"`
	SandboxesLimit int               `json:"sandboxes_limit"`
	Address        string            `json:"address,omitempty"`
	Certificate    certificateReport `json:"certificate"`
	CSRPEM         string            `json:"csr_pem,omitempty"`
}

// capacity is what the host offers to sandboxes in all.
type capacity struct {
	MemoryMB int64 `json:"memory_mb"`
	DiskMB   int64 `json:"disk_mb"`
}

type templateReport struct {
	Name        string `json:"name"`
	SHA256      string `json:"sha256"`
	DiskMB      int    `json:"disk_mb"`
	DefaultUser string `json:"default_user"`
}

// hostMemoryReserve is what the host keeps for itself, in MiB.
const hostMemoryReserve = 512

// heartbeats sends heartbeats until ctx ends. A refusal or an outage is logged once per change of
// condition; the sandboxes go on either way.
func (s *Sandboxes) heartbeats(ctx context.Context, line *reporting) {
	ticker := time.NewTicker(line.every)
	defer ticker.Stop()
	var last wrenn.Kind = "none"
	for {
		err := s.beat(ctx, line)
		if kind := wrenn.KindOf(err); kind != last && ctx.Err() == nil {
			last = kind
			s.logBeat(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-s.changed:
		}
	}
}

func (s *Sandboxes) logBeat(err error) {
	switch wrenn.KindOf(err) {
	case "":
		s.log.Info("the control plane hears this host")
	case wrenn.KindUnauthorized:
		s.log.Error("the control plane refuses this host's token: the host was deleted there; sandboxes go on, register again to be used", "err", err)
	default:
		s.log.Log(context.Background(), slog.LevelWarn, "the control plane does not hear this host; trying again", "err", err)
	}
}

// beat sends one heartbeat and does what the answer says; a certificate that is to be renewed is asked for
// with a second one, at once.
func (s *Sandboxes) beat(ctx context.Context, line *reporting) error {
	hb, err := s.heartbeat(line.limit)
	if err != nil {
		return err
	}
	again, err := line.send(ctx, hb)
	if err == nil && again {
		s.log.Info("renewing the host's certificate")
		_, err = line.send(ctx, hb)
	}
	return err
}

func (s *Sandboxes) heartbeat(limit int) (*heartbeat, error) {
	size, err := detectSpecs(s.store)
	if err != nil {
		return nil, err
	}
	_, freeMemory, err := memoryMB()
	if err != nil {
		return nil, err
	}
	freeDisk, totalDisk, err := s.store.Free()
	if err != nil {
		return nil, err
	}
	imgs, err := s.images.list()
	if err != nil {
		return nil, err
	}
	templates := make([]templateReport, 0, len(imgs))
	for _, i := range imgs {
		templates = append(templates, templateReport{i.Name, i.Digest, i.DiskMB(), i.DefaultUser})
	}
	list, revision := s.List()
	running := 0
	for _, sb := range list {
		if sb.State == protoState[wrenn.SandboxRunning] {
			running++
		}
	}
	caps := s.driver.Capabilities()
	hypervisors := []needs{needsOf(caps)}
	for _, other := range caps.Others {
		hypervisors = append(hypervisors, needsOf(other))
	}
	return &heartbeat{
		Specs: size, Capacity: capacity{MemoryMB: max(0, size.MemoryMB-hostMemoryReserve), DiskMB: totalDisk >> 20},
		FreeMemoryMB: freeMemory, FreeDiskMB: freeDisk >> 20, Load1: load1(),
		Versions: map[string]string{"agent": version.Version, "vmm": caps.Version, "kernel": kernelRelease()},
		Driver:   caps.Driver, Acceleration: caps.Acceleration, CPUModel: caps.CPUModel, Hypervisors: hypervisors,
		Templates: templates, StateRevision: revision, Running: running, SandboxesLimit: limit,
	}, nil
}
