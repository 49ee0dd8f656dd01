package wrenn

import (
	"context"
	"iter"
	"net/http"
	"net/url"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Forked is what became of one child of a fork: either is set.
type Forked struct {
	Sandbox *Sandbox
	Err     *APIError
}

// Fork makes children of the sandbox as it is now, with all processes, each under a new identity. The
// sandbox goes on. There is one result for each child; the error is for a fork that did not begin.
func (s *Sandbox) Fork(ctx context.Context, o api.ForkRequest) ([]Forked, error) {
	var list []api.ForkedSandbox
	if _, err := s.client.do(ctx, call{method: http.MethodPost, path: s.path("/fork"), body: o, out: &list}); err != nil {
		return nil, err
	}
	out := make([]Forked, len(list))
	for i, f := range list {
		if f.Sandbox.ID != "" {
			out[i].Sandbox = &Sandbox{Sandbox: f.Sandbox, client: s.client}
			continue
		}
		out[i].Err = &APIError{}
		out[i].Err.fill(f.Error)
	}
	return out, nil
}

// Checkpoint saves the moment of the sandbox, which goes on as it was. The name may be empty.
func (s *Sandbox) Checkpoint(ctx context.Context, name string) (*api.Checkpoint, error) {
	var c api.Checkpoint
	_, err := s.client.do(ctx, call{method: http.MethodPost, path: s.path("/checkpoints"), body: api.CreateCheckpointRequest{Name: name}, out: &c})
	return &c, err
}

// Checkpoints lists the sandbox's checkpoints, oldest first; their parents make a tree.
func (s *Sandbox) Checkpoints(ctx context.Context) ([]api.Checkpoint, error) {
	var l api.CheckpointList
	_, err := s.client.do(ctx, call{method: http.MethodGet, path: s.path("/checkpoints"), out: &l})
	return l.Checkpoints, err
}

// FindCheckpoint gets one of the sandbox's checkpoints by id or name.
func (s *Sandbox) FindCheckpoint(ctx context.Context, ref string) (*api.Checkpoint, error) {
	list, err := s.Checkpoints(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range list {
		if c.ID == ref || c.Name != "" && c.Name == ref {
			return &c, nil
		}
	}
	return nil, &APIError{Status: http.StatusNotFound, Code: CodeNotFound, Message: "the sandbox has no checkpoint " + ref}
}

// DeleteCheckpoint deletes a checkpoint. What descends from it stays whole.
func (s *Sandbox) DeleteCheckpoint(ctx context.Context, id string) error {
	_, err := s.client.do(ctx, call{method: http.MethodDelete, path: s.path("/checkpoints/" + url.PathEscape(id))})
	return err
}

// Rollback takes the sandbox back to a checkpoint, in place; it then runs. The state left behind becomes
// the checkpoint whose id is given back, unless discard says otherwise.
func (s *Sandbox) Rollback(ctx context.Context, checkpointID string, discard bool) (leftAs string, err error) {
	var r api.RollbackResult
	path := s.path("/checkpoints/" + url.PathEscape(checkpointID) + "/rollback")
	if _, err := s.client.do(ctx, call{method: http.MethodPost, path: path, body: api.RollbackRequest{Discard: discard}, out: &r}); err != nil {
		return "", err
	}
	s.Sandbox = r.Sandbox
	return r.LeftAs, nil
}

// Storage tells what the sandbox costs on its host's disk.
func (s *Sandbox) Storage(ctx context.Context) (*api.SandboxStorage, error) {
	var u api.SandboxStorage
	_, err := s.client.do(ctx, call{method: http.MethodGet, path: s.path("/storage"), out: &u})
	return &u, err
}

// CreateSnapshot makes a template of a sandbox as it is now, to create others from by its name. The
// sandbox goes on as it was.
func (c *Client) CreateSnapshot(ctx context.Context, r api.CreateSnapshotRequest) (*api.Snapshot, error) {
	var s api.Snapshot
	_, err := c.do(ctx, call{method: http.MethodPost, path: "/v1/snapshots", body: r, out: &s})
	return &s, err
}

// Snapshots goes over what sandboxes can be created from, newest first: images and the team's snapshots;
// kind, if not empty, selects.
func (c *Client) Snapshots(ctx context.Context, kind api.SnapshotType) iter.Seq2[api.Snapshot, error] {
	q := url.Values{}
	set(q, "type", string(kind))
	return pages(func(cursor string) ([]api.Snapshot, string, error) {
		var l api.SnapshotList
		_, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/snapshots", query: page(q, cursor), out: &l})
		return l.Snapshots, l.NextCursor, err
	})
}

// DeleteSnapshot deletes a snapshot that no sandbox was made from.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) error {
	_, err := c.do(ctx, call{method: http.MethodDelete, path: "/v1/snapshots/" + url.PathEscape(name)})
	return err
}
