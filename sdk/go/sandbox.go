package wrenn

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// SandboxOptions say what to create; what is empty takes the server's default.
type SandboxOptions = api.CreateSandboxRequest

// Sandbox is a sandbox and the way to work in it. Its embedded data is what the server last told;
// Refresh asks again. The methods are safe for use by many goroutines, except Refresh, Pause,
// Resume, SetTimeout and Ping, which change the data.
type Sandbox struct {
	api.Sandbox

	client *Client
}

// CreateSandbox creates a sandbox and answers when it takes commands.
func (c *Client) CreateSandbox(ctx context.Context, o SandboxOptions) (*Sandbox, error) {
	return c.sandboxCall(ctx, call{method: http.MethodPost, path: "/v1/sandboxes", body: o})
}

// GetSandbox gets a sandbox by id.
func (c *Client) GetSandbox(ctx context.Context, id string) (*Sandbox, error) {
	return c.sandboxCall(ctx, call{method: http.MethodGet, path: sandboxPath(id)})
}

// Sandbox is the sandbox with this id without asking the server: only its ID is filled in.
func (c *Client) Sandbox(id string) *Sandbox {
	return &Sandbox{Sandbox: api.Sandbox{ID: id}, client: c}
}

// SandboxFilter selects sandboxes; what is empty does not count. All Metadata must match.
type SandboxFilter struct {
	Status   api.SandboxStatus
	Template string
	HostID   string
	Name     string
	Metadata map[string]string
}

// Sandboxes goes over the team's sandboxes, newest first.
func (c *Client) Sandboxes(ctx context.Context, f SandboxFilter) iter.Seq2[*Sandbox, error] {
	q := url.Values{}
	set(q, "status", string(f.Status))
	set(q, "template", f.Template)
	set(q, "host_id", f.HostID)
	set(q, "name", f.Name)
	for k, v := range f.Metadata {
		q.Add("metadata", k+"="+v)
	}
	return pages(func(cursor string) ([]*Sandbox, string, error) {
		var l api.SandboxList
		if _, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/sandboxes", query: page(q, cursor), out: &l}); err != nil {
			return nil, "", err
		}
		out := make([]*Sandbox, len(l.Sandboxes))
		for i, s := range l.Sandboxes {
			out[i] = &Sandbox{Sandbox: s, client: c}
		}
		return out, l.NextCursor, nil
	})
}

// FindSandbox gets a sandbox by id or, if ref is not an id, by its name. A name that several
// sandboxes have is an error.
func (c *Client) FindSandbox(ctx context.Context, ref string) (*Sandbox, error) {
	sb, err := c.getByID(ctx, ref)
	if err == nil || !IsNotFound(err) {
		return sb, err
	}
	found, err := collect(c.Sandboxes(ctx, SandboxFilter{Name: ref}))
	switch {
	case CodeOf(err) == CodeInvalidRequest: // not even fit for a name
		return nil, notFound(ref)
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, notFound(ref)
	case len(found) > 1:
		return nil, errors.New("several sandboxes are named " + ref + ": use an id")
	}
	return found[0], nil
}

// idLength is that of "sb-" and 25 characters.
const idLength = 28

func (c *Client) getByID(ctx context.Context, ref string) (*Sandbox, error) {
	if !strings.HasPrefix(ref, "sb-") || len(ref) != idLength {
		return nil, notFound(ref)
	}
	return c.GetSandbox(ctx, ref)
}

func notFound(ref string) error {
	return &APIError{Status: http.StatusNotFound, Code: CodeNotFound, Message: "there is no sandbox " + ref}
}

// Refresh asks the server for the sandbox's present state.
func (s *Sandbox) Refresh(ctx context.Context) error {
	return s.update(ctx, call{method: http.MethodGet, path: s.path("")})
}

// Ping counts as activity: it puts off the idle timeout, as a command would.
func (s *Sandbox) Ping(ctx context.Context) error {
	return s.update(ctx, call{method: http.MethodPost, path: s.path("/ping")})
}

// Pause keeps the sandbox's disk and, if memory, its memory with all processes as they are, and frees
// the rest until Resume.
func (s *Sandbox) Pause(ctx context.Context, memory bool) error {
	return s.PauseWith(ctx, PauseOptions{DiskOnly: !memory})
}

// PauseOptions say what a pause keeps and when it returns.
type PauseOptions struct {
	DiskOnly bool // give the memory up; a resume then boots
	Durable  bool // return only when the state survives a power cut
}

// PauseWith is Pause with options.
func (s *Sandbox) PauseWith(ctx context.Context, o PauseOptions) error {
	return s.update(ctx, call{method: http.MethodPost, path: s.path("/pause"), body: map[string]bool{"memory": !o.DiskOnly, "durable": o.Durable}})
}

// Resume lets a paused sandbox run again and returns when it takes commands.
func (s *Sandbox) Resume(ctx context.Context) error { return s.ResumeWith(ctx, ResumeOptions{}) }

// ResumeOptions say what a resume goes on with.
type ResumeOptions struct {
	// DiskOnly gives saved memory up, also if the resume then fails, and boots from the disk, on which is what a
	// power cut at the pause would have left.
	DiskOnly bool
}

// ResumeWith is Resume with options.
func (s *Sandbox) ResumeWith(ctx context.Context, o ResumeOptions) error {
	return s.update(ctx, call{method: http.MethodPost, path: s.path("/resume"), body: api.ResumeRequest{DiskOnly: o.DiskOnly}})
}

// SetTimeout sets after how long without activity the sandbox is paused or killed; 0 means never.
func (s *Sandbox) SetTimeout(ctx context.Context, idle time.Duration, then api.OnTimeout) error {
	return s.update(ctx, call{method: http.MethodPut, path: s.path("/timeout"),
		body: api.SetTimeoutRequest{TimeoutSec: int32(idle / time.Second), OnTimeout: then}})
}

// Delete deletes the sandbox with its disk and memory. It tells whether that is done already; if its
// host cannot be reached now, it will be once the host is back.
func (s *Sandbox) Delete(ctx context.Context) (done bool, err error) {
	status, err := s.client.do(ctx, call{method: http.MethodDelete, path: s.path("")})
	return status == http.StatusNoContent, err
}

func (s *Sandbox) update(ctx context.Context, r call) error {
	now, err := s.client.sandboxCall(ctx, r)
	if err != nil {
		return err
	}
	s.Sandbox = now.Sandbox
	return nil
}

func (c *Client) sandboxCall(ctx context.Context, r call) (*Sandbox, error) {
	s := &Sandbox{client: c}
	r.out = &s.Sandbox
	if _, err := c.do(ctx, r); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Sandbox) path(rest string) string { return sandboxPath(s.ID) + rest }

func sandboxPath(id string) string { return "/v1/sandboxes/" + url.PathEscape(id) }
