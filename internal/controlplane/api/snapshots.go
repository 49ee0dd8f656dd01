package api

import (
	"context"
	"crypto/sha256"
	"strconv"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// newIDs makes several ids as newID makes one.
func newIDs(ctx context.Context, prefix string, n int) []string {
	ids := make([]string, n)
	ids[0] = newID(ctx, prefix)
	for i := 1; i < n; i++ {
		ids[i] = wrenn.NewID(prefix)
		if seed := attemptOf(ctx).seed; seed != "" {
			sum := sha256.Sum256([]byte(seed + " " + strconv.Itoa(i)))
			ids[i] = wrenn.IDFrom(prefix, sum)
		}
	}
	return ids
}

// maxForkEnv bounds the environment of all children together, in bytes: it goes to their host in one message.
const maxForkEnv = 512 << 10

// ForkSandbox implements gen.StrictServerInterface.
func (s *Server) ForkSandbox(ctx context.Context, req gen.ForkSandboxRequestObject) (gen.ForkSandboxResponseObject, error) {
	b := req.Body
	if b == nil {
		b = &gen.ForkRequest{}
	}
	if err := checkEnv(b.Env); err != nil {
		return nil, err
	}
	if err := checkMetadata(b.Metadata); err != nil {
		return nil, err
	}
	count, env := int(or(b.Count, 1)), or(b.Env, nil)
	size := 0
	for k, v := range env {
		size += len(k) + len(v)
	}
	if size*count > maxForkEnv {
		return nil, invalid("env", "has %d bytes, for %d children; together they may have %d: set it in the source, or fork fewer at once", size, count, maxForkEnv)
	}
	children, err := s.Fleet.Fork(ctx, actor(ctx), auth.From(ctx).TeamID, req.ID, fleet.ForkSpec{
		IDs: newIDs(ctx, wrenn.PrefixSandbox, count), Name: b.Name, Env: env, Metadata: or(b.Metadata, nil),
	})
	if err != nil {
		return nil, err
	}
	out := make(gen.ForkSandbox201JSONResponse, len(children))
	for i, c := range children {
		if c.Err != nil {
			pub := public(c.Err)
			s.log.Warn("a child of a fork failed", "request_id", requestID(ctx), "source_id", req.ID, "error", c.Err)
			body := errorBody(ctx, pub)
			out[i].Error = &body
			continue
		}
		sb := sandboxJSON(c.Row)
		out[i].Sandbox = &sb
	}
	return out, nil
}

// CreateCheckpoint implements gen.StrictServerInterface.
func (s *Server) CreateCheckpoint(ctx context.Context, req gen.CreateCheckpointRequestObject) (gen.CreateCheckpointResponseObject, error) {
	spec := fleet.CheckpointSpec{ID: newID(ctx, wrenn.PrefixCheckpoint), SandboxID: req.ID}
	if req.Body != nil {
		spec.Name = req.Body.Name
	}
	row, err := s.Fleet.Checkpoint(ctx, actor(ctx), auth.From(ctx).TeamID, spec)
	if err != nil {
		return nil, err
	}
	return gen.CreateCheckpoint201JSONResponse(checkpointJSON(row)), nil
}

// ListCheckpoints implements gen.StrictServerInterface.
func (s *Server) ListCheckpoints(ctx context.Context, req gen.ListCheckpointsRequestObject) (gen.ListCheckpointsResponseObject, error) {
	rows, err := s.Fleet.Checkpoints(ctx, auth.From(ctx).TeamID, req.ID)
	if err != nil {
		return nil, err
	}
	out := gen.ListCheckpoints200JSONResponse{Checkpoints: make([]gen.Checkpoint, 0, len(rows))}
	for _, row := range rows {
		out.Checkpoints = append(out.Checkpoints, checkpointJSON(row))
	}
	return out, nil
}

// DeleteCheckpoint implements gen.StrictServerInterface.
func (s *Server) DeleteCheckpoint(ctx context.Context, req gen.DeleteCheckpointRequestObject) (gen.DeleteCheckpointResponseObject, error) {
	if err := s.Fleet.DeleteCheckpoint(ctx, actor(ctx), auth.From(ctx).TeamID, req.ID, req.Cid); err != nil {
		return nil, err
	}
	return gen.DeleteCheckpoint204Response{}, nil
}

// RollbackSandbox implements gen.StrictServerInterface.
func (s *Server) RollbackSandbox(ctx context.Context, req gen.RollbackSandboxRequestObject) (gen.RollbackSandboxResponseObject, error) {
	spec := fleet.RollbackSpec{SandboxID: req.ID, CheckpointID: req.Cid, OperationID: newID(ctx, wrenn.PrefixOperation)}
	if req.Body == nil || !or(req.Body.Discard, false) {
		spec.KeepAs = newID(ctx, wrenn.PrefixCheckpoint)
	}
	if err := s.Fleet.Rollback(ctx, actor(ctx), auth.From(ctx).TeamID, spec); err != nil {
		return nil, err
	}
	sb, err := s.sandbox(ctx, req.ID)
	out := gen.RollbackSandbox200JSONResponse{Sandbox: sb}
	if spec.KeepAs != "" {
		out.LeftAs = &spec.KeepAs
	}
	return out, err
}

func checkpointJSON(c db.Checkpoint) gen.Checkpoint {
	out := gen.Checkpoint{
		ID: c.ID, SandboxID: c.SandboxID, Name: c.Name, ParentID: c.ParentID, CreatedAt: c.CreatedAt.UTC(), Memory: c.HasMemory, SizeBytes: c.SizeBytes, OwnBytes: c.OwnBytes,
	}
	if missing := c.MissingSince != nil; missing {
		out.Missing = &missing
	}
	return out
}

// GetSandboxStorage implements gen.StrictServerInterface.
func (s *Server) GetSandboxStorage(ctx context.Context, req gen.GetSandboxStorageRequestObject) (gen.GetSandboxStorageResponseObject, error) {
	use, err := s.Fleet.Storage(ctx, auth.From(ctx).TeamID, req.ID)
	if err != nil {
		return nil, err
	}
	out := gen.GetSandboxStorage200JSONResponse{Disk: usageJSON(use.Disk), Memory: usageJSON(use.Memory), Checkpoints: make([]gen.CheckpointStorage, 0, len(use.Checkpoints))}
	out.Total = gen.StorageUsage{SizeBytes: use.Disk.SizeBytes + use.Memory.SizeBytes, OwnBytes: use.Disk.OwnBytes + use.Memory.OwnBytes}
	for _, c := range use.Checkpoints {
		out.Checkpoints = append(out.Checkpoints, gen.CheckpointStorage{ID: c.ID, Name: c.Name, SizeBytes: c.SizeBytes, OwnBytes: c.OwnBytes})
		out.Total.SizeBytes += c.SizeBytes
		out.Total.OwnBytes += c.OwnBytes
	}
	return out, nil
}

func usageJSON(u fleet.Usage) gen.StorageUsage {
	return gen.StorageUsage{SizeBytes: u.SizeBytes, OwnBytes: u.OwnBytes}
}

// CreateSnapshot implements gen.StrictServerInterface.
func (s *Server) CreateSnapshot(ctx context.Context, req gen.CreateSnapshotRequestObject) (gen.CreateSnapshotResponseObject, error) {
	row, err := s.Fleet.SaveSnapshot(ctx, actor(ctx), auth.From(ctx).TeamID, fleet.SnapshotSpec{
		ID: newID(ctx, wrenn.PrefixSnapshot), SandboxID: req.Body.SandboxID, Name: or(req.Body.Name, ""), Overwrite: or(req.Body.Overwrite, false),
	})
	if err != nil {
		return nil, err
	}
	return gen.CreateSnapshot201JSONResponse(snapshotJSON(db.ListSnapshotsRow{
		ID: row.ID, Name: row.Name, Type: string(gen.SnapshotTypeSnapshot), Scope: string(gen.SnapshotScopeTeam), SandboxID: row.SandboxID, Template: row.Template, HostID: row.HostID,
		VCPUs: row.VCPUs, MemoryMB: row.MemoryMB, DiskMB: int64(row.DiskMB), DefaultUser: row.DefaultUser, HasMemory: row.HasMemory, SizeBytes: row.SizeBytes, OwnBytes: row.OwnBytes, CreatedAt: row.CreatedAt,
	})), nil
}

// ListSnapshots implements gen.StrictServerInterface.
func (s *Server) ListSnapshots(ctx context.Context, req gen.ListSnapshotsRequestObject) (gen.ListSnapshotsResponseObject, error) {
	pg, err := readPage(req.Params.Limit, req.Params.Cursor)
	if err != nil {
		return nil, err
	}
	rows, err := s.st.Team(auth.From(ctx).TeamID).ListSnapshots(ctx, db.ListSnapshotsParams{
		Type: (*string)(req.Params.Type), AfterAt: pg.afterAt, AfterID: pg.afterID, MaxRows: pg.fetch(),
	})
	if err != nil {
		return nil, err
	}
	rows, next := cut(pg, rows, func(r db.ListSnapshotsRow) (time.Time, string) { return r.CreatedAt, r.ID })
	out := gen.ListSnapshots200JSONResponse{Snapshots: make([]gen.Snapshot, 0, len(rows)), NextCursor: next}
	for _, r := range rows {
		out.Snapshots = append(out.Snapshots, snapshotJSON(r))
	}
	return out, nil
}

// DeleteSnapshot implements gen.StrictServerInterface.
func (s *Server) DeleteSnapshot(ctx context.Context, req gen.DeleteSnapshotRequestObject) (gen.DeleteSnapshotResponseObject, error) {
	if err := s.Fleet.DeleteSnapshot(ctx, actor(ctx), auth.From(ctx).TeamID, req.Name); err != nil {
		return nil, err
	}
	return gen.DeleteSnapshot204Response{}, nil
}

func snapshotJSON(r db.ListSnapshotsRow) gen.Snapshot {
	out := gen.Snapshot{
		ID: r.ID, Name: r.Name, Type: gen.SnapshotType(r.Type), Scope: gen.SnapshotScope(r.Scope), DiskMb: r.DiskMB, DefaultUser: r.DefaultUser, CreatedAt: r.CreatedAt.UTC(),
	}
	if out.Type == gen.SnapshotTypeSnapshot {
		out.SandboxID, out.Template, out.HostID = &r.SandboxID, &r.Template, &r.HostID
		out.Vcpus, out.MemoryMb, out.Memory, out.SizeBytes, out.OwnBytes = &r.VCPUs, &r.MemoryMB, &r.HasMemory, &r.SizeBytes, &r.OwnBytes
	}
	return out
}
