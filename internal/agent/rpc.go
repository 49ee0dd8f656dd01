package agent

import (
	"context"
	"net/http"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1/agentv1connect"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

// maxRPCBody bounds a request of the control plane, in bytes; the environment is the largest part.
const maxRPCBody = 1 << 20

// rpcServer translates agent.proto to Sandboxes.
type rpcServer struct{ sandboxes *Sandboxes }

// handler serves the RPC and, beside it, the way to the guests.
func (s *Sandboxes) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(agentv1connect.NewAgentServiceHandler(rpcServer{s},
		connect.WithInterceptors(rpc.ServerErrors()), connect.WithReadMaxBytes(maxRPCBody)))
	mux.Handle("/sandboxes/{id}/envd/", guestProxy(s))
	return mux
}

// answer wraps a result, and logs a failure with its private cause.
func answer[T any](r rpcServer, what, id string, res *T, err error) (*connect.Response[T], error) {
	if err != nil {
		r.sandboxes.log.Error(what+" failed", "id", id, "err", err)
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (r rpcServer) CheckpointSandbox(ctx context.Context, req *connect.Request[agentv1.CheckpointSandboxRequest]) (*connect.Response[agentv1.CheckpointSandboxResponse], error) {
	c, err := r.sandboxes.Checkpoint(ctx, req.Msg.Id, req.Msg.OperationId, req.Msg.CheckpointId)
	return answer(r, "checkpoint", req.Msg.Id, &agentv1.CheckpointSandboxResponse{Checkpoint: c}, err)
}

func (r rpcServer) ListCheckpoints(_ context.Context, req *connect.Request[agentv1.ListCheckpointsRequest]) (*connect.Response[agentv1.ListCheckpointsResponse], error) {
	list, err := r.sandboxes.Checkpoints(req.Msg.Id)
	return answer(r, "list checkpoints", req.Msg.Id, &agentv1.ListCheckpointsResponse{Checkpoints: list}, err)
}

func (r rpcServer) DeleteCheckpoint(ctx context.Context, req *connect.Request[agentv1.DeleteCheckpointRequest]) (*connect.Response[agentv1.DeleteCheckpointResponse], error) {
	err := r.sandboxes.DeleteCheckpoint(ctx, req.Msg.Id, req.Msg.OperationId, req.Msg.CheckpointId)
	return answer(r, "delete checkpoint", req.Msg.Id, &agentv1.DeleteCheckpointResponse{}, err)
}

func (r rpcServer) RollbackSandbox(ctx context.Context, req *connect.Request[agentv1.RollbackSandboxRequest]) (*connect.Response[agentv1.RollbackSandboxResponse], error) {
	sb, err := r.sandboxes.Rollback(ctx, req.Msg)
	return answer(r, "rollback", req.Msg.Id, &agentv1.RollbackSandboxResponse{Sandbox: sb}, err)
}

func (r rpcServer) ForkSandbox(ctx context.Context, req *connect.Request[agentv1.ForkSandboxRequest]) (*connect.Response[agentv1.ForkSandboxResponse], error) {
	results, err := r.sandboxes.Fork(ctx, req.Msg)
	return answer(r, "fork", req.Msg.Id, &agentv1.ForkSandboxResponse{Results: results}, err)
}

func (r rpcServer) SaveSnapshot(ctx context.Context, req *connect.Request[agentv1.SaveSnapshotRequest]) (*connect.Response[agentv1.SaveSnapshotResponse], error) {
	c, err := r.sandboxes.SaveSnapshot(ctx, req.Msg.Id, req.Msg.OperationId, req.Msg.SnapshotId)
	return answer(r, "save snapshot", req.Msg.Id, &agentv1.SaveSnapshotResponse{Snapshot: c}, err)
}

func (r rpcServer) DeleteSnapshot(_ context.Context, req *connect.Request[agentv1.DeleteSnapshotRequest]) (*connect.Response[agentv1.DeleteSnapshotResponse], error) {
	err := r.sandboxes.DeleteSnapshot(req.Msg.SnapshotId)
	return answer(r, "delete snapshot", req.Msg.SnapshotId, &agentv1.DeleteSnapshotResponse{}, err)
}

func (r rpcServer) CreateSandbox(ctx context.Context, req *connect.Request[agentv1.CreateSandboxRequest]) (*connect.Response[agentv1.CreateSandboxResponse], error) {
	sb, err := r.sandboxes.Create(ctx, req.Msg)
	return answer(r, "create", req.Msg.Id, &agentv1.CreateSandboxResponse{Sandbox: sb}, err)
}

func (r rpcServer) DeleteSandbox(ctx context.Context, req *connect.Request[agentv1.DeleteSandboxRequest]) (*connect.Response[agentv1.DeleteSandboxResponse], error) {
	err := r.sandboxes.Delete(ctx, req.Msg.Id, req.Msg.OperationId)
	return answer(r, "delete", req.Msg.Id, &agentv1.DeleteSandboxResponse{}, err)
}

func (r rpcServer) PauseSandbox(ctx context.Context, req *connect.Request[agentv1.PauseSandboxRequest]) (*connect.Response[agentv1.PauseSandboxResponse], error) {
	sb, err := r.sandboxes.Pause(ctx, req.Msg)
	return answer(r, "pause", req.Msg.Id, &agentv1.PauseSandboxResponse{Sandbox: sb}, err)
}

func (r rpcServer) ResumeSandbox(ctx context.Context, req *connect.Request[agentv1.ResumeSandboxRequest]) (*connect.Response[agentv1.ResumeSandboxResponse], error) {
	sb, err := r.sandboxes.Resume(ctx, req.Msg)
	return answer(r, "resume", req.Msg.Id, &agentv1.ResumeSandboxResponse{Sandbox: sb}, err)
}

func (r rpcServer) ListMoments(context.Context, *connect.Request[agentv1.ListMomentsRequest]) (*connect.Response[agentv1.ListMomentsResponse], error) {
	all, err := r.sandboxes.Moments()
	return answer(r, "list moments", "", &agentv1.ListMomentsResponse{Moments: all}, err)
}

func (r rpcServer) GetSandboxStorage(_ context.Context, req *connect.Request[agentv1.GetSandboxStorageRequest]) (*connect.Response[agentv1.GetSandboxStorageResponse], error) {
	use, err := r.sandboxes.Storage(req.Msg.Id)
	return answer(r, "storage", req.Msg.Id, use, err)
}

func (r rpcServer) WatchProgress(ctx context.Context, req *connect.Request[agentv1.WatchProgressRequest], stream *connect.ServerStream[agentv1.WatchProgressResponse]) error {
	return rpc.ToConnect(r.sandboxes.Progress(ctx, req.Msg.Id, req.Msg.OperationId, func(p *agentv1.Progress) error {
		return stream.Send(&agentv1.WatchProgressResponse{Progress: p})
	}))
}

func (r rpcServer) PingSandbox(_ context.Context, req *connect.Request[agentv1.PingSandboxRequest]) (*connect.Response[agentv1.PingSandboxResponse], error) {
	return answer(r, "ping", req.Msg.Id, &agentv1.PingSandboxResponse{}, r.sandboxes.Ping(req.Msg.Id))
}

func (r rpcServer) GetSandbox(_ context.Context, req *connect.Request[agentv1.GetSandboxRequest]) (*connect.Response[agentv1.GetSandboxResponse], error) {
	sb, err := r.sandboxes.Get(req.Msg.Id)
	return answer(r, "get", req.Msg.Id, &agentv1.GetSandboxResponse{Sandbox: sb}, err)
}

func (r rpcServer) ListSandboxes(_ context.Context, _ *connect.Request[agentv1.ListSandboxesRequest]) (*connect.Response[agentv1.ListSandboxesResponse], error) {
	list, revision := r.sandboxes.List()
	return connect.NewResponse(&agentv1.ListSandboxesResponse{Sandboxes: list, StateRevision: revision}), nil
}
