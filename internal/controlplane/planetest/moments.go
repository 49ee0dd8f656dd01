package planetest

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// moments are the saved states of a host's sandboxes, as entries of tables.
type moments struct {
	checkpoints map[string]map[string]*agentv1.Checkpoint // by sandbox
	head        map[string]string                         // which checkpoint a sandbox descends from
	snapshots   map[string]*agentv1.Checkpoint
	resumes     int

	onSave   func(id string) error
	onResume func(id string) error
	onFork   func(*agentv1.ForkSandboxRequest) error
	onGuest  func(id string) error
	onWatch  func(ctx context.Context, id string, tell func(*agentv1.Progress) error) error
}

// HostNeeds is what saved memory of a host needs, as its heartbeats say that it has.
func HostNeeds() *agentv1.Needs {
	return &agentv1.Needs{Driver: "qemu", VmmVersion: "1", Acceleration: "tcg", Arch: "amd64", CpuModel: "test"}
}

// OnSave is called before a moment is saved, with the id it gets; its error is the answer.
func (h *Host) OnSave(fn func(id string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moments.onSave = fn
}

// OnResume is called before a sandbox is resumed; its error is the answer.
func (h *Host) OnResume(fn func(id string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moments.onResume = fn
}

// OnFork is called before a fork; its error is the answer.
func (h *Host) OnFork(fn func(*agentv1.ForkSandboxRequest) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moments.onFork = fn
}

// OnGuest is called when a request into a sandbox has reached the host, before it is looked whether it runs.
func (h *Host) OnGuest(fn func(id string)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moments.onGuest = func(id string) error { fn(id); return nil }
}

// Resumes is how often sandboxes were resumed.
func (h *Host) Resumes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.moments.resumes
}

// Saved tells whether the host has a checkpoint or snapshot of the id.
func (h *Host) Saved(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, of := range h.moments.checkpoints {
		if of[id] != nil {
			return true
		}
	}
	return h.moments.snapshots[id] != nil
}

// SetCheckpoint puts a checkpoint into the host's table behind the control plane's back; nil takes it out.
func (h *Host) SetCheckpoint(sandboxID, id string, c *agentv1.Checkpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c == nil {
		delete(h.moments.checkpoints[sandboxID], id)
		return
	}
	h.checkpointsOf(sandboxID)[id] = c
}

func (h *Host) checkpointsOf(sandboxID string) map[string]*agentv1.Checkpoint {
	if h.moments.checkpoints == nil {
		h.moments.checkpoints, h.moments.head, h.moments.snapshots = map[string]map[string]*agentv1.Checkpoint{}, map[string]string{}, map[string]*agentv1.Checkpoint{}
	}
	if h.moments.checkpoints[sandboxID] == nil {
		h.moments.checkpoints[sandboxID] = map[string]*agentv1.Checkpoint{}
	}
	return h.moments.checkpoints[sandboxID]
}

func call[T any](h *Host, hook func(*moments) func(T) error, arg T) error {
	h.mu.Lock()
	fn := hook(&h.moments)
	h.mu.Unlock()
	if fn == nil {
		return nil
	}
	return fn(arg)
}

// save makes the moment of a sandbox; h.mu is held.
func (h *Host) save(sandboxID, id string) (*agentv1.Checkpoint, error) {
	sb := h.boxes[sandboxID]
	if sb == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	}
	h.checkpointsOf(sandboxID)
	return &agentv1.Checkpoint{
		Id: id, ParentId: h.moments.head[sandboxID], CreatedAt: timestamppb.New(time.Now()), HasMemory: true, SizeBytes: 2000, OwnBytes: 1000,
		Vcpus: sb.Vcpus, MemoryMb: sb.MemoryMb, DiskMb: sb.DiskMb, Needs: HostNeeds(),
	}, nil
}

// CheckpointSandbox implements agentv1connect.AgentServiceHandler; it is idempotent by checkpoint id.
func (h *Host) CheckpointSandbox(_ context.Context, req *connect.Request[agentv1.CheckpointSandboxRequest]) (*connect.Response[agentv1.CheckpointSandboxResponse], error) {
	if err := call(h, func(m *moments) func(string) error { return m.onSave }, req.Msg.CheckpointId); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.checkpointsOf(req.Msg.Id)[req.Msg.CheckpointId]
	if c == nil {
		var err error
		if c, err = h.save(req.Msg.Id, req.Msg.CheckpointId); err != nil {
			return nil, err
		}
		h.moments.checkpoints[req.Msg.Id][c.Id] = c
		h.moments.head[req.Msg.Id] = c.Id
	}
	return connect.NewResponse(&agentv1.CheckpointSandboxResponse{Checkpoint: proto.CloneOf(c)}), nil
}

// ListCheckpoints implements agentv1connect.AgentServiceHandler.
func (h *Host) ListCheckpoints(_ context.Context, req *connect.Request[agentv1.ListCheckpointsRequest]) (*connect.Response[agentv1.ListCheckpointsResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	res := &agentv1.ListCheckpointsResponse{}
	for _, c := range h.checkpointsOf(req.Msg.Id) {
		res.Checkpoints = append(res.Checkpoints, proto.CloneOf(c))
	}
	return connect.NewResponse(res), nil
}

// DeleteCheckpoint implements agentv1connect.AgentServiceHandler.
func (h *Host) DeleteCheckpoint(_ context.Context, req *connect.Request[agentv1.DeleteCheckpointRequest]) (*connect.Response[agentv1.DeleteCheckpointResponse], error) {
	h.SetCheckpoint(req.Msg.Id, req.Msg.CheckpointId, nil)
	return connect.NewResponse(&agentv1.DeleteCheckpointResponse{}), nil
}

// RollbackSandbox implements agentv1connect.AgentServiceHandler.
func (h *Host) RollbackSandbox(_ context.Context, req *connect.Request[agentv1.RollbackSandboxRequest]) (*connect.Response[agentv1.RollbackSandboxResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sb, all := h.boxes[req.Msg.Id], h.checkpointsOf(req.Msg.Id)
	if sb == nil || all[req.Msg.CheckpointId] == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "this host has no saved state %s", req.Msg.CheckpointId)
	}
	if req.Msg.KeepAs != "" {
		c, err := h.save(req.Msg.Id, req.Msg.KeepAs)
		if err != nil {
			return nil, err
		}
		all[c.Id] = c
	}
	h.moments.head[sb.Id] = req.Msg.CheckpointId
	h.revision++
	sb.State, sb.Revision = agentv1.SandboxState_SANDBOX_STATE_RUNNING, sb.Revision+2
	return connect.NewResponse(&agentv1.RollbackSandboxResponse{Sandbox: proto.CloneOf(sb)}), nil
}

// ForkSandbox implements agentv1connect.AgentServiceHandler. A child whose hostname ends in "-bad" fails.
func (h *Host) ForkSandbox(ctx context.Context, req *connect.Request[agentv1.ForkSandboxRequest]) (*connect.Response[agentv1.ForkSandboxResponse], error) {
	if err := call(h, func(m *moments) func(*agentv1.ForkSandboxRequest) error { return m.onFork }, req.Msg); err != nil {
		return nil, err
	}
	h.mu.Lock()
	src := proto.CloneOf(h.boxes[req.Msg.Id])
	h.mu.Unlock()
	if src == nil {
		return nil, wrenn.Errorf(wrenn.KindNotFound, "no such sandbox")
	}
	res := &agentv1.ForkSandboxResponse{}
	for _, c := range req.Msg.Children {
		if strings.HasSuffix(c.Hostname, "-bad") {
			res.Results = append(res.Results, &agentv1.ForkSandboxResponse_Result{ErrorKind: string(wrenn.KindDiskFull), ErrorMessage: "the host's disk is full"})
			continue
		}
		made, err := h.CreateSandbox(ctx, connect.NewRequest(&agentv1.CreateSandboxRequest{
			Id: c.Id, OperationId: c.OperationId, Template: src.Template, Vcpus: src.Vcpus, MemoryMb: src.MemoryMb, DiskMb: src.DiskMb, Hostname: c.Hostname, Env: c.Env,
		}))
		if err != nil {
			return nil, err
		}
		res.Results = append(res.Results, &agentv1.ForkSandboxResponse_Result{Sandbox: made.Msg.Sandbox})
	}
	return connect.NewResponse(res), nil
}

// SaveSnapshot implements agentv1connect.AgentServiceHandler; it is idempotent by snapshot id.
func (h *Host) SaveSnapshot(_ context.Context, req *connect.Request[agentv1.SaveSnapshotRequest]) (*connect.Response[agentv1.SaveSnapshotResponse], error) {
	if err := call(h, func(m *moments) func(string) error { return m.onSave }, req.Msg.SnapshotId); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c, err := h.save(req.Msg.Id, req.Msg.SnapshotId)
	if err != nil {
		return nil, err
	}
	if old := h.moments.snapshots[c.Id]; old != nil {
		c = old
	}
	h.moments.snapshots[c.Id] = c
	return connect.NewResponse(&agentv1.SaveSnapshotResponse{Snapshot: proto.CloneOf(c)}), nil
}

// DeleteSnapshot implements agentv1connect.AgentServiceHandler.
func (h *Host) DeleteSnapshot(_ context.Context, req *connect.Request[agentv1.DeleteSnapshotRequest]) (*connect.Response[agentv1.DeleteSnapshotResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.moments.snapshots, req.Msg.SnapshotId)
	return connect.NewResponse(&agentv1.DeleteSnapshotResponse{}), nil
}

// ListMoments implements agentv1connect.AgentServiceHandler.
func (h *Host) ListMoments(context.Context, *connect.Request[agentv1.ListMomentsRequest]) (*connect.Response[agentv1.ListMomentsResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	res := &agentv1.ListMomentsResponse{}
	for id, of := range h.moments.checkpoints {
		for _, c := range of {
			res.Moments = append(res.Moments, &agentv1.ListMomentsResponse_Moment{SandboxId: id, Checkpoint: proto.CloneOf(c)})
		}
	}
	for _, c := range h.moments.snapshots {
		res.Moments = append(res.Moments, &agentv1.ListMomentsResponse_Moment{Checkpoint: proto.CloneOf(c)})
	}
	return connect.NewResponse(res), nil
}

// GetSandboxStorage implements agentv1connect.AgentServiceHandler.
func (h *Host) GetSandboxStorage(_ context.Context, req *connect.Request[agentv1.GetSandboxStorageRequest]) (*connect.Response[agentv1.GetSandboxStorageResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.checkpointsOf(req.Msg.Id)
	res := &agentv1.GetSandboxStorageResponse{
		Disk: &agentv1.GetSandboxStorageResponse_Usage{SizeBytes: 5000, OwnBytes: 50}, Memory: &agentv1.GetSandboxStorageResponse_Usage{SizeBytes: 700, OwnBytes: 70},
	}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		res.Checkpoints = append(res.Checkpoints, proto.CloneOf(all[id]))
	}
	return connect.NewResponse(res), nil
}

// OnWatch tells the progress of operations on a sandbox; without it nothing is told.
func (h *Host) OnWatch(fn func(ctx context.Context, id string, tell func(*agentv1.Progress) error) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moments.onWatch = fn
}

// WatchProgress implements agentv1connect.AgentServiceHandler.
func (h *Host) WatchProgress(ctx context.Context, req *connect.Request[agentv1.WatchProgressRequest], stream *connect.ServerStream[agentv1.WatchProgressResponse]) error {
	h.mu.Lock()
	fn := h.moments.onWatch
	h.mu.Unlock()
	if fn == nil {
		return nil
	}
	return fn(ctx, req.Msg.Id, func(p *agentv1.Progress) error {
		return stream.Send(&agentv1.WatchProgressResponse{Progress: p})
	})
}
