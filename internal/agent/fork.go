package agent

import (
	"context"
	"path/filepath"
	"sync"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// forksDir holds, below AGENT_SANDBOXES_PATH, the moments that forks under way clone their children from.
const forksDir = "forks"

// maxForks bounds the children of one fork; their starts are further bounded by parallelForks.
const (
	maxForks      = 100
	parallelForks = 4
)

// Fork makes children of a sandbox's present moment. The source goes on; a child that fails leaves the
// others alone. Repeating a fork makes the children that are not there yet, of the moment of the repeat.
func (s *Sandboxes) Fork(ctx context.Context, req *agentv1.ForkSandboxRequest) (_ []*agentv1.ForkSandboxResponse_Result, err error) {
	defer func() { err = diskFull(err) }()
	sb, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	if len(req.Children) < 1 || len(req.Children) > maxForks {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "count must be from 1 to %d", maxForks).With("field", "count")
	}
	dir := filepath.Join(s.dir, forksDir, wrenn.NewID(wrenn.PrefixSnapshot))
	ctx = context.WithoutCancel(ctx) // a caller that leaves cancels nothing half-way
	defer func() {
		if err := s.discard(dir); err != nil {
			s.log.Error("the moment of a fork is left", "dir", dir, "err", err)
		}
	}()
	ctx, end := sb.beginFork(ctx, req.OperationId)
	defer end()
	// Under an id of its own: a repeat that comes meanwhile must not take this moment for its own, which is in
	// another place. What makes a repeat safe are the children's operation ids.
	err = sb.do(ctx, wrenn.NewID(wrenn.PrefixOperation), func(ctx context.Context) error {
		_, err := s.saveMoment(ctx, sb, dir, false)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.fault(sb, "fork.saved"); err != nil {
		return nil, err
	}
	rec := sb.snapshot()
	from := func(_ context.Context, child record) (origin, error) { return originMoment(child, dir) }
	results := make([]*agentv1.ForkSandboxResponse_Result, len(req.Children))
	places := make(chan struct{}, parallelForks)
	var all sync.WaitGroup
	p := progressOf(ctx)
	p.count(stepChildren, 0, int64(len(req.Children)), unitSandboxes)
	for i, child := range req.Children {
		all.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			results[i] = s.forkOne(withProgress(ctx, nil), rec, child, from)
			p.advance()
		})
	}
	all.Wait()
	return results, nil
}

// beginFork notes a fork that is under way, for its progress; end notes its end.
func (sb *sandbox) beginFork(ctx context.Context, opID string) (_ context.Context, end func()) {
	op := newOperation(opID)
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.forks == nil {
		sb.forks = map[string]*operation{}
	}
	sb.forks[opID] = op
	return withProgress(ctx, op.progress), func() {
		sb.mu.Lock()
		defer sb.mu.Unlock()
		if sb.forks[opID] == op { // not that of a repeat
			delete(sb.forks, opID)
		}
		close(op.done)
	}
}

func (s *Sandboxes) forkOne(ctx context.Context, rec record, child *agentv1.ForkSandboxRequest_Child, from findOrigin) *agentv1.ForkSandboxResponse_Result {
	sb, err := s.createFrom(ctx, &agentv1.CreateSandboxRequest{
		Id: child.Id, OperationId: child.OperationId, Template: rec.Template, Vcpus: uint32(rec.VCPUs), MemoryMb: uint64(rec.MemoryMB),
		DiskMb: uint64(rec.DiskMB), Env: child.Env, User: rec.User, Hostname: child.Hostname,
	}, from)
	if err != nil {
		s.log.Error("a child of a fork failed", "sandbox", child.Id, "err", err)
		pub := wrenn.Public(err)
		return &agentv1.ForkSandboxResponse_Result{ErrorKind: string(pub.Kind), ErrorMessage: pub.Message}
	}
	return &agentv1.ForkSandboxResponse_Result{Sandbox: sb}
}
