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

func (r rpcServer) CreateSandbox(ctx context.Context, req *connect.Request[agentv1.CreateSandboxRequest]) (*connect.Response[agentv1.CreateSandboxResponse], error) {
	sb, err := r.sandboxes.Create(ctx, req.Msg)
	if err != nil {
		r.sandboxes.log.Error("create failed", "sandbox", req.Msg.Id, "err", err)
		return nil, err
	}
	return connect.NewResponse(&agentv1.CreateSandboxResponse{Sandbox: sb}), nil
}

func (r rpcServer) DeleteSandbox(ctx context.Context, req *connect.Request[agentv1.DeleteSandboxRequest]) (*connect.Response[agentv1.DeleteSandboxResponse], error) {
	if err := r.sandboxes.Delete(ctx, req.Msg.Id, req.Msg.OperationId); err != nil {
		r.sandboxes.log.Error("delete failed", "sandbox", req.Msg.Id, "err", err)
		return nil, err
	}
	return connect.NewResponse(&agentv1.DeleteSandboxResponse{}), nil
}

func (r rpcServer) PauseSandbox(ctx context.Context, req *connect.Request[agentv1.PauseSandboxRequest]) (*connect.Response[agentv1.PauseSandboxResponse], error) {
	sb, err := r.sandboxes.Pause(ctx, req.Msg)
	if err != nil {
		r.sandboxes.log.Error("pause failed", "sandbox", req.Msg.Id, "err", err)
		return nil, err
	}
	return connect.NewResponse(&agentv1.PauseSandboxResponse{Sandbox: sb}), nil
}

func (r rpcServer) ResumeSandbox(ctx context.Context, req *connect.Request[agentv1.ResumeSandboxRequest]) (*connect.Response[agentv1.ResumeSandboxResponse], error) {
	sb, err := r.sandboxes.Resume(ctx, req.Msg.Id, req.Msg.OperationId)
	if err != nil {
		r.sandboxes.log.Error("resume failed", "sandbox", req.Msg.Id, "err", err)
		return nil, err
	}
	return connect.NewResponse(&agentv1.ResumeSandboxResponse{Sandbox: sb}), nil
}

func (r rpcServer) GetSandbox(_ context.Context, req *connect.Request[agentv1.GetSandboxRequest]) (*connect.Response[agentv1.GetSandboxResponse], error) {
	sb, err := r.sandboxes.Get(req.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentv1.GetSandboxResponse{Sandbox: sb}), nil
}

func (r rpcServer) ListSandboxes(context.Context, *connect.Request[agentv1.ListSandboxesRequest]) (*connect.Response[agentv1.ListSandboxesResponse], error) {
	list, revision := r.sandboxes.List()
	return connect.NewResponse(&agentv1.ListSandboxesResponse{Sandboxes: list, StateRevision: revision}), nil
}
