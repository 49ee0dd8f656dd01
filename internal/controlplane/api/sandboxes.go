package api

import (
	"cmp"
	"context"
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// ListTemplates implements gen.StrictServerInterface.
func (s *Server) ListTemplates(ctx context.Context, _ gen.ListTemplatesRequestObject) (gen.ListTemplatesResponseObject, error) {
	rows, err := s.st.Team(auth.From(ctx).TeamID).ListTemplates(ctx)
	if err != nil {
		return nil, err
	}
	out := gen.ListTemplates200JSONResponse{Templates: make([]gen.Template, 0, len(rows))}
	for _, t := range rows {
		scope := gen.TemplateScopePlatform
		if t.TeamID != nil {
			scope = gen.TemplateScopeTeam
		}
		out.Templates = append(out.Templates, gen.Template{
			ID: t.ID, Name: t.Name, Scope: scope, Sha256: &t.SHA256, DiskMb: t.DiskMB, DefaultUser: t.DefaultUser, CreatedAt: t.CreatedAt.UTC(), UpdatedAt: t.UpdatedAt.UTC(),
		})
	}
	return out, nil
}

// CreateSandbox implements gen.StrictServerInterface.
func (s *Server) CreateSandbox(ctx context.Context, req gen.CreateSandboxRequestObject) (gen.CreateSandboxResponseObject, error) {
	b := req.Body
	if b == nil {
		b = &gen.CreateSandboxRequest{}
	}
	if err := checkEnv(b.Env); err != nil {
		return nil, err
	}
	if err := checkMetadata(b.Metadata); err != nil {
		return nil, err
	}
	if b.From != nil && b.Template != nil {
		return nil, invalid("from", "and template exclude each other; a sandbox begins with one of both")
	}
	row, err := s.Fleet.Create(ctx, actor(ctx), auth.From(ctx).TeamID, fleet.Spec{
		ID: newID(ctx, wrenn.PrefixSandbox), Template: or(b.Template, wrenn.DefaultTemplate), From: or(b.From, ""), DiskOnly: or(b.DiskOnly, false), Name: b.Name,
		VCPUs: or(b.Vcpus, 0), MemoryMB: or(b.MemoryMb, 0), DiskMB: or(b.DiskMb, 0), AutoResume: or(b.AutoResume, false),
		TimeoutSec: or(b.TimeoutSec, 0), OnTimeout: wrenn.OnTimeout(or(b.OnTimeout, gen.OnTimeoutPause)),
		Env: or(b.Env, nil), Metadata: or(b.Metadata, nil), User: or(b.User, ""),
	})
	if err != nil {
		return nil, err
	}
	return gen.CreateSandbox201JSONResponse(sandboxJSON(row)), nil
}

// checkEnv checks names, which the contract's language cannot: they become environment variables (POSIX.1-2024 §8.1).
func checkEnv(env *gen.Env) error {
	if env == nil {
		return nil
	}
	for name := range *env {
		if !envName(name) {
			return invalid("env", "%q is not a name for an environment variable: letters, digits and _, not beginning with a digit", clip(name, 64))
		}
	}
	return nil
}

func envName(name string) bool {
	for i, c := range name {
		letter := c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return name != "" && len(name) <= 256
}

func checkMetadata(m *gen.Metadata) error {
	if m == nil {
		return nil
	}
	for key := range *m {
		if key == "" || utf8.RuneCountInString(key) > 128 || strings.ContainsRune(key, '=') {
			return invalid("metadata", "the key %q must have 1 to 128 characters and no =", clip(key, 64))
		}
	}
	return nil
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// ListSandboxes implements gen.StrictServerInterface.
func (s *Server) ListSandboxes(ctx context.Context, req gen.ListSandboxesRequestObject) (gen.ListSandboxesResponseObject, error) {
	q := req.Params
	pg, err := readPage(q.Limit, q.Cursor)
	if err != nil {
		return nil, err
	}
	rows, err := s.findSandboxes(ctx, q, pg)
	if err != nil {
		return nil, err
	}
	rows, next := cut(pg, rows, func(r db.FindSandboxesRow) (time.Time, string) { return r.Sandbox.CreatedAt, r.Sandbox.ID })
	out := gen.ListSandboxes200JSONResponse{Sandboxes: make([]gen.Sandbox, 0, len(rows)), NextCursor: next}
	for _, r := range rows {
		out.Sandboxes = append(out.Sandboxes, sandboxJSON(db.GetSandboxRow(r)))
	}
	return out, nil
}

// findSandboxes gives a page of the team's sandboxes, of all or of those that match.
func (s *Server) findSandboxes(ctx context.Context, q gen.ListSandboxesParams, pg page) ([]db.FindSandboxesRow, error) {
	team := s.st.Team(auth.From(ctx).TeamID)
	at, id := pg.before()
	p := db.FindSandboxesParams{
		Status: (*string)(q.Status), Template: q.Template, HostID: q.HostID, Name: q.Name, BeforeAt: at, BeforeID: id, MaxRows: pg.fetch(),
	}
	if q.Metadata != nil {
		want := map[string]string{}
		for _, kv := range *q.Metadata {
			key, value, _ := strings.Cut(kv, "=")
			want[key] = value
		}
		var err error
		if p.Metadata, err = json.Marshal(want); err != nil {
			return nil, err
		}
	}
	if p.Status != nil || p.Template != nil || p.HostID != nil || p.Name != nil || p.Metadata != nil {
		return team.FindSandboxes(ctx, p)
	}
	all, err := team.ListSandboxes(ctx, db.ListSandboxesParams{BeforeAt: at, BeforeID: id, MaxRows: p.MaxRows})
	rows := make([]db.FindSandboxesRow, len(all))
	for i, r := range all {
		rows[i] = db.FindSandboxesRow(r)
	}
	return rows, err
}

// GetSandbox implements gen.StrictServerInterface.
func (s *Server) GetSandbox(ctx context.Context, req gen.GetSandboxRequestObject) (gen.GetSandboxResponseObject, error) {
	sb, err := s.sandbox(ctx, req.ID)
	if err != nil {
		return nil, err
	}
	return gen.GetSandbox200JSONResponse(sb), nil
}

func (s *Server) sandbox(ctx context.Context, id string) (gen.Sandbox, error) {
	row, err := s.Fleet.Get(ctx, auth.From(ctx).TeamID, id)
	if err != nil {
		return gen.Sandbox{}, err
	}
	return sandboxJSON(row), nil
}

// DeleteSandbox implements gen.StrictServerInterface.
func (s *Server) DeleteSandbox(ctx context.Context, req gen.DeleteSandboxRequestObject) (gen.DeleteSandboxResponseObject, error) {
	gone, err := s.Fleet.Delete(ctx, actor(ctx), auth.From(ctx).TeamID, req.ID)
	if err != nil {
		return nil, err
	}
	if !gone {
		sb, err := s.sandbox(ctx, req.ID)
		if err == nil {
			return gen.DeleteSandbox202JSONResponse(sb), nil
		}
		if wrenn.KindOf(err) != wrenn.KindNotFound { // gone by now
			return nil, err
		}
	}
	return gen.DeleteSandbox204Response{}, nil
}

// PauseSandbox implements gen.StrictServerInterface.
func (s *Server) PauseSandbox(ctx context.Context, req gen.PauseSandboxRequestObject) (gen.PauseSandboxResponseObject, error) {
	o := fleet.PauseOptions{Memory: true, OperationID: newID(ctx, wrenn.PrefixOperation)}
	if req.Body != nil {
		o.Memory, o.Durable = or(req.Body.Memory, true), or(req.Body.Durable, false)
	}
	sb, err := s.Fleet.Pause(ctx, actor(ctx), auth.From(ctx).TeamID, req.ID, o)
	if err != nil {
		return nil, err
	}
	return gen.PauseSandbox200JSONResponse(sandboxJSON(sb)), nil
}

// ResumeSandbox implements gen.StrictServerInterface.
func (s *Server) ResumeSandbox(ctx context.Context, req gen.ResumeSandboxRequestObject) (gen.ResumeSandboxResponseObject, error) {
	team := auth.From(ctx).TeamID
	o := fleet.ResumeOptions{OperationID: newID(ctx, wrenn.PrefixOperation)}
	if req.Body != nil {
		o.DiskOnly = or(req.Body.DiskOnly, false)
	}
	row, err := s.Fleet.Resume(ctx, actor(ctx), team, req.ID, o)
	if err != nil {
		return nil, err
	}
	if req.Body == nil || req.Body.TimeoutSec == nil {
		return gen.ResumeSandbox200JSONResponse(sandboxJSON(row)), nil
	}
	if err := s.Fleet.SetTimeout(ctx, team, req.ID, *req.Body.TimeoutSec, nil); err != nil {
		return nil, err
	}
	sb, err := s.sandbox(ctx, req.ID)
	return gen.ResumeSandbox200JSONResponse(sb), err
}

// PingSandbox implements gen.StrictServerInterface.
func (s *Server) PingSandbox(ctx context.Context, req gen.PingSandboxRequestObject) (gen.PingSandboxResponseObject, error) {
	if err := s.Fleet.Touch(ctx, auth.From(ctx).TeamID, req.ID); err != nil {
		return nil, err
	}
	sb, err := s.sandbox(ctx, req.ID)
	return gen.PingSandbox200JSONResponse(sb), err
}

// SetSandboxTimeout implements gen.StrictServerInterface.
func (s *Server) SetSandboxTimeout(ctx context.Context, req gen.SetSandboxTimeoutRequestObject) (gen.SetSandboxTimeoutResponseObject, error) {
	if err := s.Fleet.SetTimeout(ctx, auth.From(ctx).TeamID, req.ID, req.Body.TimeoutSec, (*string)(req.Body.OnTimeout)); err != nil {
		return nil, err
	}
	sb, err := s.sandbox(ctx, req.ID)
	return gen.SetSandboxTimeout200JSONResponse(sb), err
}

func sandboxJSON(r db.GetSandboxRow) gen.Sandbox {
	sb := r.Sandbox
	metadata := map[string]string{}
	_ = json.Unmarshal(sb.Metadata, &metadata) // written by fleet from a map of strings
	out := gen.Sandbox{
		ID: sb.ID, Name: sb.Name, Status: gen.SandboxStatus(sb.Status), Reason: sb.Reason, Template: sb.Template, User: &sb.DefaultUser,
		Vcpus: sb.VCPUs, MemoryMb: sb.MemoryMB, DiskMb: sb.DiskMB, TimeoutSec: sb.TimeoutSec, OnTimeout: gen.OnTimeout(sb.OnTimeout), Metadata: metadata,
		AutoResume: sb.AutoResume, Cold: sb.Cold, DurableAt: utc(sb.DurableAt), From: cmp.Or(sb.FromCheckpoint, sb.FromSandbox, sb.FromSnapshot),
		HostID: sb.HostID, HostOnline: r.HostOnline, Revision: sb.Revision, CreatedAt: sb.CreatedAt.UTC(), StartedAt: utc(sb.StartedAt), LastActiveAt: utc(sb.LastActiveAt),
	}
	if sb.TimeoutSec > 0 && sb.LastActiveAt != nil && sb.Status == string(wrenn.SandboxRunning) {
		at := sb.LastActiveAt.Add(time.Duration(sb.TimeoutSec) * time.Second).UTC()
		out.ExpiresAt = &at
	}
	return out
}

func or[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
