package fleet

import (
	"context"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
)

// Usage is what something takes on its host's disk.
type Usage struct {
	SizeBytes int64 // to store it alone
	OwnBytes  int64 // that nothing else there shares with it
}

// CheckpointUsage is the usage of one checkpoint.
type CheckpointUsage struct {
	Usage
	ID   string
	Name *string
}

// StorageUsage is what a sandbox costs.
type StorageUsage struct {
	Disk, Memory Usage
	Checkpoints  []CheckpointUsage
}

// Storage asks a sandbox's host what it costs on disk.
func (f *Fleet) Storage(ctx context.Context, teamID, id string) (StorageUsage, error) {
	sb, err := f.Get(ctx, teamID, id)
	if err != nil {
		return StorageUsage{}, err
	}
	if !sb.HostOnline {
		return StorageUsage{}, hostAway(sb.Sandbox.HostID)
	}
	ctx, cancel := context.WithTimeout(ctx, f.times.DeleteLimit)
	defer cancel()
	var res *agentv1.GetSandboxStorageResponse
	err = f.ask(ctx, sb.Sandbox.HostID, 0, func(ctx context.Context, t agents.Target) error {
		got, err := f.agents.Service(t).GetSandboxStorage(ctx, connect.NewRequest(&agentv1.GetSandboxStorageRequest{Id: id}))
		if err == nil {
			res = got.Msg
		}
		return err
	})
	if err != nil {
		return StorageUsage{}, err
	}
	rows, err := f.store.Team(teamID).ListCheckpoints(ctx, id)
	if err != nil {
		return StorageUsage{}, err
	}
	names := map[string]*string{}
	for _, row := range rows {
		names[row.ID] = row.Name
	}
	out := StorageUsage{Disk: usage(res.GetDisk()), Memory: usage(res.GetMemory())}
	for _, c := range res.GetCheckpoints() {
		out.Checkpoints = append(out.Checkpoints, CheckpointUsage{Usage: usage(c), ID: c.GetId(), Name: names[c.GetId()]})
	}
	return out, nil
}

func usage(u interface {
	GetSizeBytes() uint64
	GetOwnBytes() uint64
}) Usage {
	return Usage{int64(u.GetSizeBytes()), int64(u.GetOwnBytes())}
}
