package agent

import (
	"path/filepath"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
)

// Moments names every saved moment of this host: the checkpoints of its sandboxes, and its snapshots. Those that
// are being saved are listed first: one that is saved by the time of the second look is then named twice, not missed.
func (s *Sandboxes) Moments() ([]*agentv1.ListMomentsResponse_Moment, error) {
	list, _ := s.List()
	dirs := map[string]string{"": s.snapshots}
	for _, sb := range list {
		dirs[sb.Id] = filepath.Join(s.dir, sandboxesDir, sb.Id, checkpointsDir)
	}
	out := s.saving.list()
	for id, dir := range dirs {
		all, err := listMoments(dir)
		if err != nil {
			return nil, err
		}
		for _, mo := range all {
			out = append(out, &agentv1.ListMomentsResponse_Moment{SandboxId: id, Checkpoint: mo.describe()})
		}
	}
	return out, nil
}

// Storage says what a sandbox costs on disk. What its checkpoints share with it counts as nobody's own.
func (s *Sandboxes) Storage(id string) (*agentv1.GetSandboxStorageResponse, error) {
	sb, err := s.get(id)
	if err != nil {
		return nil, err
	}
	out := &agentv1.GetSandboxStorageResponse{}
	if out.Checkpoints, err = s.Checkpoints(id); err != nil {
		return nil, err
	}
	m := sb.machine()
	if out.Disk, err = usageReport(m.disk()); err != nil {
		return nil, err
	}
	out.Memory, err = usageReport(m.memory(), m.state())
	return out, err
}

func usageReport(paths ...string) (*agentv1.GetSandboxStorageResponse_Usage, error) {
	size, own, err := usageOf(paths...)
	return &agentv1.GetSandboxStorageResponse_Usage{SizeBytes: uint64(size), OwnBytes: uint64(own)}, err
}
