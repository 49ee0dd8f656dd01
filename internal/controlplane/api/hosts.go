package api

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// CreateHost implements gen.StrictServerInterface.
func (s *Server) CreateHost(ctx context.Context, req gen.CreateHostRequestObject) (gen.CreateHostResponseObject, error) {
	p, b := auth.From(ctx), req.Body
	n := fleet.NewHost{ID: newID(ctx, wrenn.PrefixHost), Type: wrenn.HostType(b.Type), Provider: b.Provider, AvailabilityZone: b.AvailabilityZone}
	switch {
	case n.Type == wrenn.HostRegular && !p.IsAdmin:
		return nil, wrenn.Errorf(wrenn.KindForbidden, "regular hosts are made by admins; make one of type byoc for your team")
	case n.Type == wrenn.HostRegular && b.TeamID != nil:
		return nil, invalid("team_id", "is for byoc hosts; a regular host belongs to no team")
	case n.Type == wrenn.HostBYOC && b.TeamID == nil:
		n.TeamID = &p.TeamID
	case n.Type == wrenn.HostBYOC && !p.IsAdmin && *b.TeamID != p.TeamID:
		return nil, wrenn.Errorf(wrenn.KindForbidden, "a byoc host can be made for your own team only")
	case n.Type == wrenn.HostBYOC:
		n.TeamID = b.TeamID
	}
	reg, err := s.Fleet.CreateHost(ctx, actor(ctx), n)
	return gen.CreateHost201JSONResponse(withToken(reg)), err
}

// RegenerateHostToken implements gen.StrictServerInterface.
func (s *Server) RegenerateHostToken(ctx context.Context, req gen.RegenerateHostTokenRequestObject) (gen.RegenerateHostTokenResponseObject, error) {
	reg, err := s.Fleet.RegenerateToken(ctx, actor(ctx), hostScope(auth.From(ctx)), req.ID)
	return gen.RegenerateHostToken201JSONResponse(withToken(reg)), err
}

func withToken(reg fleet.Registration) gen.HostWithToken {
	expires := reg.ExpiresAt.UTC()
	return gen.HostWithToken{Host: hostJSON(reg.Host), RegistrationToken: reg.Token, ExpiresAt: &expires}
}

// RegisterHost implements gen.StrictServerInterface.
func (s *Server) RegisterHost(ctx context.Context, req gen.RegisterHostRequestObject) (gen.RegisterHostResponseObject, error) {
	b := req.Body
	r := fleet.RegisterRequest{Token: b.Token, Arch: b.Arch, CPUCores: b.CPUCores, MemoryMB: b.MemoryMb, DiskGB: b.DiskGb, Address: b.Address}
	if b.CsrPem != nil {
		r.CSRPEM = *b.CsrPem
	}
	reg, err := s.Fleet.Register(ctx, requestID(ctx), r)
	if err != nil {
		return nil, err
	}
	out := gen.RegisterHost201JSONResponse{Host: hostJSON(reg.Host), Token: reg.Token}
	if reg.CertPEM != "" {
		out.CertPem, out.CaCertPem = &reg.CertPEM, &reg.CACertPEM
	}
	return out, nil
}

// HeartbeatHost implements gen.StrictServerInterface.
func (s *Server) HeartbeatHost(ctx context.Context, req gen.HeartbeatHostRequestObject) (gen.HeartbeatHostResponseObject, error) {
	host := auth.From(ctx)
	if req.ID != host.HostID {
		return nil, wrenn.Errorf(wrenn.KindForbidden, "the token belongs to another host")
	}
	r := report(req.Body)
	r.TokenExpires = host.Expires
	todo, err := s.Fleet.Heartbeat(ctx, requestID(ctx), host.HostID, r)
	if err != nil {
		return nil, err
	}
	if todo == (fleet.Instructions{}) {
		return gen.HeartbeatHost204Response{}, nil
	}
	return gen.HeartbeatHost200JSONResponse{
		Token: given(todo.Token), RenewCertificate: given(todo.RenewCertificate), CertPem: given(todo.CertPEM), CaCertPem: given(todo.CACertPEM),
	}, nil
}

// given is nil for a zero value, which an answer leaves out.
func given[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func report(b *gen.HeartbeatRequest) fleet.Report {
	v := db.HeartbeatParams{
		Draining: b.Draining, Driver: b.Driver, Acceleration: b.Acceleration, CPUModel: b.CPUModel, Hypervisors: hypervisors(b.Hypervisors), FreeMemoryMB: b.FreeMemoryMb, FreeDiskMB: b.FreeDiskMb,
		Load1: b.Load1, Running: b.Running, SandboxesLimit: b.SandboxesLimit, StateRevision: b.StateRevision,
	}
	if b.Versions != nil {
		v.Versions, _ = json.Marshal(b.Versions) // a map of strings always can be
	}
	if b.Specs != nil {
		v.HasSpecs, v.Arch, v.CPUCores, v.MemoryMB, v.DiskGB = true, &b.Specs.Arch, &b.Specs.CPUCores, &b.Specs.MemoryMb, &b.Specs.DiskGb
	}
	if b.Capacity != nil {
		v.CapacityVCPUs, v.CapacityMemoryMB, v.CapacityDiskMB = b.Capacity.Vcpus, b.Capacity.MemoryMb, b.Capacity.DiskMb
	}
	r := fleet.Report{Values: v, Address: or(b.Address, ""), CSRPEM: or(b.CsrPem, "")}
	if c := b.Certificate; c != nil {
		r.CertExpires = c.ExpiresAt
		r.Values.Served, _ = hex.DecodeString(c.Sha256) // the contract allows nothing else
	}
	if b.Templates == nil {
		return r
	}
	r.Templates = []fleet.TemplateReport{}
	for _, t := range *b.Templates {
		one := fleet.TemplateReport{Name: t.Name}
		if t.Sha256 != nil {
			one.SHA256 = *t.Sha256
		}
		if t.DiskMb != nil {
			one.DiskMB = *t.DiskMb
		}
		if t.DefaultUser != nil {
			one.DefaultUser = *t.DefaultUser
		}
		r.Templates = append(r.Templates, one)
	}
	return r
}

// ListHosts implements gen.StrictServerInterface.
func (s *Server) ListHosts(ctx context.Context, req gen.ListHostsRequestObject) (gen.ListHostsResponseObject, error) {
	q := req.Params
	pg, err := readPage(q.Limit, q.Cursor)
	if err != nil {
		return nil, err
	}
	rows, err := s.Fleet.ListHosts(ctx, db.ListHostsParams{
		TeamID: hostScope(auth.From(ctx)), Status: (*string)(q.Status), Type: (*string)(q.Type), Tag: q.Tag,
		AfterAt: pg.afterAt, AfterID: pg.afterID, MaxRows: pg.fetch(),
	})
	if err != nil {
		return nil, err
	}
	rows, next := cut(pg, rows, func(h db.ListHostsRow) (time.Time, string) { return h.Host.CreatedAt, h.Host.ID })
	out := gen.ListHosts200JSONResponse{Hosts: make([]gen.Host, 0, len(rows)), NextCursor: next}
	for _, row := range rows {
		h := hostJSON(row.Host)
		h.Sandboxes = &row.Sandboxes
		out.Hosts = append(out.Hosts, h)
	}
	return out, nil
}

// GetHost implements gen.StrictServerInterface.
func (s *Server) GetHost(ctx context.Context, req gen.GetHostRequestObject) (gen.GetHostResponseObject, error) {
	row, err := s.Fleet.GetHost(ctx, hostScope(auth.From(ctx)), req.ID)
	if err != nil {
		return nil, err
	}
	n, err := s.Fleet.SandboxCount(ctx, row.ID)
	if err != nil {
		return nil, err
	}
	h := hostJSON(row)
	h.Sandboxes = &n
	return gen.GetHost200JSONResponse(h), nil
}

// DeleteHost implements gen.StrictServerInterface.
func (s *Server) DeleteHost(ctx context.Context, req gen.DeleteHostRequestObject) (gen.DeleteHostResponseObject, error) {
	if err := s.Fleet.DeleteHost(ctx, actor(ctx), hostScope(auth.From(ctx)), req.ID); err != nil {
		return nil, err
	}
	return gen.DeleteHost204Response{}, nil
}

// ListHostTags implements gen.StrictServerInterface.
func (s *Server) ListHostTags(ctx context.Context, req gen.ListHostTagsRequestObject) (gen.ListHostTagsResponseObject, error) {
	tags, err := s.Fleet.HostTags(ctx, hostScope(auth.From(ctx)), req.ID)
	if err != nil {
		return nil, err
	}
	return gen.ListHostTags200JSONResponse{Tags: tags}, nil
}

// AddHostTag implements gen.StrictServerInterface.
func (s *Server) AddHostTag(ctx context.Context, req gen.AddHostTagRequestObject) (gen.AddHostTagResponseObject, error) {
	if err := s.Fleet.AddHostTag(ctx, actor(ctx), hostScope(auth.From(ctx)), req.ID, req.Body.Tag); err != nil {
		return nil, err
	}
	return gen.AddHostTag204Response{}, nil
}

// RemoveHostTag implements gen.StrictServerInterface.
func (s *Server) RemoveHostTag(ctx context.Context, req gen.RemoveHostTagRequestObject) (gen.RemoveHostTagResponseObject, error) {
	if err := s.Fleet.RemoveHostTag(ctx, actor(ctx), hostScope(auth.From(ctx)), req.ID, req.Tag); err != nil {
		return nil, err
	}
	return gen.RemoveHostTag204Response{}, nil
}

func hostJSON(h db.Host) gen.Host {
	versions := map[string]string{}
	_ = json.Unmarshal(h.Versions, &versions) // written by report
	return gen.Host{
		ID: h.ID, Type: gen.HostType(h.Type), TeamID: h.TeamID, Provider: h.Provider, AvailabilityZone: h.AvailabilityZone,
		Arch: h.Arch, CPUCores: h.CPUCores, MemoryMb: h.MemoryMB, DiskGb: h.DiskGB, Address: h.Address, Status: gen.HostStatus(h.Status),
		MtlsEnabled: &h.MTLSEnabled, Draining: &h.Draining, Versions: &versions, Driver: h.Driver, Acceleration: h.Acceleration, CPUModel: h.CPUModel,
		FreeMemoryMb: h.FreeMemoryMB, FreeDiskMb: h.FreeDiskMB, Load1: h.Load1, LastHeartbeatAt: utc(h.LastHeartbeatAt),
		CreatedBy: h.CreatedBy, CreatedAt: h.CreatedAt.UTC(), UpdatedAt: h.UpdatedAt.UTC(),
	}
}

// hypervisors is what a heartbeat says of them, as the fleet reads it; nil if it says nothing.
func hypervisors(list *[]gen.Hypervisor) json.RawMessage {
	if list == nil {
		return nil
	}
	raw, err := json.Marshal(*list)
	if err != nil {
		return nil
	}
	return raw
}
