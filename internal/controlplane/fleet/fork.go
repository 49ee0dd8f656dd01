package fleet

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// MaxForks bounds the children of one fork.
const MaxForks = 100

// ForkSpec is what children of a sandbox shall be; the rest they have of it.
type ForkSpec struct {
	IDs      []string // one for each child
	Name     *string  // several get it with -1, -2, …
	Env      map[string]string
	Metadata map[string]string
}

// Child is what became of one child of a fork.
type Child struct {
	Row db.GetSandboxRow
	Err error
}

// Fork makes children of a sandbox's present moment, on its host. The rows of those that have room there are
// committed before the host is asked; a child that fails leaves the others alone. If rows of the ids are there
// already (a repeated request), Fork waits for what becomes of them.
func (f *Fleet) Fork(ctx context.Context, by Actor, teamID, id string, spec ForkSpec) ([]Child, error) {
	f.work.Add(1)
	defer f.work.Done()
	ctx = context.WithoutCancel(ctx)
	out := make([]Child, len(spec.IDs))
	begun := 0
	for i, id := range spec.IDs {
		row, err := f.store.Team(teamID).GetSandbox(ctx, id)
		if store.IsNotFound(err) {
			out[i].Err = wrenn.Errorf(wrenn.KindNoCapacity, "the host of the sandbox had no room for this one")
			continue
		}
		if err != nil {
			return nil, err
		}
		begun++
		out[i].Row, out[i].Err = f.awaitCreate(ctx, row)
	}
	if begun > 0 {
		return out, nil
	}
	rows, errs, err := f.reserveForks(ctx, by, teamID, id, spec)
	if err != nil {
		return nil, err
	}
	failed := f.finishForks(ctx, id, rows)
	for i, id := range spec.IDs {
		if out[i].Err = errs[i]; errs[i] != nil {
			continue
		}
		if out[i].Err = failed[id]; failed[id] == nil {
			out[i].Row, out[i].Err = f.Get(ctx, teamID, id)
		}
	}
	return out, nil
}

// reserveForks writes the rows of as many children as the host has room for; errs says why not the others.
func (f *Fleet) reserveForks(ctx context.Context, by Actor, teamID, id string, spec ForkSpec) (rows []db.Sandbox, errs []error, err error) {
	errs = make([]error, len(spec.IDs))
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		rows = nil
		src, err := tx.Team(teamID).GetSandbox(ctx, id)
		if store.IsNotFound(err) {
			return notFound("sandbox")
		}
		if err != nil {
			return err
		}
		s := src.Sandbox
		if !momentous(s.Status) {
			return wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s; it must be running or paused", s.Status).With("status", s.Status)
		}
		if _, err := lockHost(ctx, tx, nil, s.HostID); err != nil {
			return err
		}
		req := Request{Resources: Resources{int64(s.VCPUs), int64(s.MemoryMB), int64(s.DiskMB)}, Template: s.Template, Saved: true}
		if req.Needs, err = readNeeds(s.Needs); err != nil {
			return err
		}
		hosts, err := f.placementHosts(ctx, tx.Team(teamID), &s.HostID, req)
		if err != nil {
			return err
		}
		if len(hosts) == 0 {
			return hostAway(s.HostID)
		}
		for i := range spec.IDs {
			if _, refusal := Place(req, hosts); refusal != nil {
				f.stats.PlacementFailures.Add(1)
				errs[i] = refusal
				continue
			}
			p, err := f.childParams(by, s, spec, i)
			if err != nil {
				return err
			}
			row, err := tx.Team(teamID).InsertSandbox(ctx, p)
			if store.IsNotFound(err) {
				return wrenn.Errorf(wrenn.KindConflict, "this fork was repeated while it was under way, or a child of it was deleted since")
			} else if err != nil {
				return err
			}
			hosts[0].take(req)
			rows = append(rows, row)
			if err := event(ctx, tx, "sandbox.creating", &teamID, row.ID, map[string]any{"host_id": s.HostID, "template": s.Template, "from_sandbox": id}); err != nil {
				return err
			}
		}
		return audit(ctx, tx, by, &teamID, "sandbox.fork", id, map[string]any{"count": len(rows)})
	})
	return rows, errs, err
}

// momentous states are those whose moment can be saved or forked.
func momentous(status string) bool {
	return status == string(wrenn.SandboxRunning) || status == string(wrenn.SandboxPaused)
}

func (f *Fleet) childParams(by Actor, src db.Sandbox, spec ForkSpec, i int) (db.InsertSandboxParams, error) {
	metadata := map[string]string{}
	if err := json.Unmarshal(src.Metadata, &metadata); err != nil {
		return db.InsertSandboxParams{}, err
	}
	maps.Copy(metadata, spec.Metadata)
	labels, err := json.Marshal(metadata)
	if err != nil {
		return db.InsertSandboxParams{}, err
	}
	env, err := json.Marshal(nonNil(spec.Env))
	if err != nil {
		return db.InsertSandboxParams{}, err
	}
	return db.InsertSandboxParams{
		ID: spec.IDs[i], HostID: src.HostID, Name: childName(spec, i), Template: src.Template, DefaultUser: src.DefaultUser,
		VCPUs: src.VCPUs, MemoryMB: src.MemoryMB, DiskMB: src.DiskMB, TimeoutSec: src.TimeoutSec, OnTimeout: src.OnTimeout, AutoResume: src.AutoResume,
		Metadata: labels, CreateEnv: env, FromSandbox: &src.ID, FromSnapshot: src.FromSnapshot,
		OperationID: wrenn.NewID(wrenn.PrefixOperation), Lease: f.times.Lease, CreatedBy: by.ID,
	}, nil
}

const maxName = 63

func childName(spec ForkSpec, i int) *string {
	if spec.Name == nil || len(spec.IDs) == 1 {
		return spec.Name
	}
	suffix := fmt.Sprintf("-%d", i+1)
	name := *spec.Name
	name = name[:min(len(name), maxName-len(suffix))] + suffix
	return &name
}

// finishForks has the host make the children and writes what became of each; it gives the errors by id.
func (f *Fleet) finishForks(ctx context.Context, sourceID string, rows []db.Sandbox) map[string]error {
	failed := map[string]error{}
	if len(rows) == 0 {
		return failed
	}
	stop := f.keepLease(ctx, rows...)
	defer stop()
	limited, cancel := context.WithTimeout(ctx, f.times.CreateLimit)
	defer cancel()
	results, err := f.askFork(limited, sourceID, rows)
	for i, row := range rows {
		switch {
		case err != nil:
			failed[row.ID] = f.failCreate(ctx, row, err)
		case results[i].GetSandbox() == nil:
			r := results[i]
			failed[row.ID] = f.failCreate(ctx, row, wrenn.Errorf(wrenn.Kind(r.GetErrorKind()), "%s", r.GetErrorMessage()))
		default:
			if err := f.writeCreated(ctx, row, results[i].GetSandbox()); err != nil {
				failed[row.ID] = err
			}
			f.fault("fork", pointWritten)
		}
	}
	return failed
}

func (f *Fleet) askFork(ctx context.Context, sourceID string, rows []db.Sandbox) ([]*agentv1.ForkSandboxResponse_Result, error) {
	req := &agentv1.ForkSandboxRequest{Id: sourceID, OperationId: wrenn.NewID(wrenn.PrefixOperation)}
	for _, row := range rows {
		child, err := createRequest(row)
		if err != nil {
			return nil, err
		}
		req.Children = append(req.Children, &agentv1.ForkSandboxRequest_Child{Id: child.Id, OperationId: child.OperationId, Hostname: child.Hostname, Env: child.Env})
	}
	var results []*agentv1.ForkSandboxResponse_Result
	err := f.askShowing(ctx, slow{rows[0].TeamID, rows[0].HostID, sourceID, "fork", req.OperationId}, func(ctx context.Context, t agents.Target) error {
		res, err := f.agents.Service(t).ForkSandbox(ctx, connect.NewRequest(req))
		if err == nil {
			results = res.Msg.GetResults()
		}
		return err
	})
	if err == nil && len(results) != len(rows) {
		err = wrenn.Errorf(wrenn.KindAgentError, "the sandbox's host answered for %d of %d children", len(results), len(rows))
	}
	return results, err
}

// isFork tells of a row in `creating` that its sandbox comes from a moment which nothing keeps.
func isFork(row db.Sandbox) bool { return row.FromSandbox != nil && row.FromCheckpoint == nil }

// settleFork finds out what became of a child whose fork was cut off: the moment it was to come from is gone, so
// it cannot be asked for again.
func (f *Fleet) settleFork(ctx context.Context, row db.Sandbox) error {
	now, err := f.askSandbox(ctx, row, 0)
	switch {
	case wrenn.KindOf(err) == wrenn.KindNotFound:
		return f.failCreate(ctx, row, wrenn.Errorf(wrenn.KindAgentError, "the fork was cut off; fork again"))
	case err != nil:
		return err
	}
	switch protoStates[now.GetState()] {
	case wrenn.SandboxCreating, wrenn.SandboxDeleting, "":
		return wrenn.Errorf(wrenn.KindConflict, "the host is still at it")
	case wrenn.SandboxRunning:
	default:
		now.Revision = 0 // the next report of its host tells its state
	}
	return f.writeCreated(ctx, row, now)
}
