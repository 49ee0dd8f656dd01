package fleet

import (
	"context"
	"slices"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Report is what a heartbeat says; what is nil keeps its former value.
type Report struct {
	Values    db.HeartbeatParams
	Templates []TemplateReport // nil: not reported
}

// TemplateReport is a template that a host has.
type TemplateReport struct {
	Name        string
	SHA256      string
	DiskMB      int64
	DefaultUser string
}

// Heartbeat notes that a host is alive. It fails with KindUnauthorized if the host was deleted.
func (f *Fleet) Heartbeat(ctx context.Context, hostID string, r Report) error {
	r.Values.ID = hostID
	host, err := f.store.Heartbeat(ctx, r.Values)
	if store.IsNotFound(err) {
		return wrenn.Errorf(wrenn.KindUnauthorized, "the host was deleted; register the machine as a new host")
	} else if err != nil {
		return err
	}
	f.stats.Heartbeats.Add(1)
	if r.Templates == nil {
		return nil
	}
	return f.setTemplates(ctx, host, r.Templates)
}

// setTemplates writes what the host has, if it differs from what is known. Templates of a regular host
// are the platform's, those of a byoc host its team's alone.
func (f *Fleet) setTemplates(ctx context.Context, host db.HeartbeatRow, reports []TemplateReport) error {
	slices.SortFunc(reports, func(a, b TemplateReport) int { return strings.Compare(a.Name, b.Name) })
	reports = slices.CompactFunc(reports, func(a, b TemplateReport) bool { return a.Name == b.Name })
	known, err := f.store.HostTemplates(ctx, host.ID)
	if err != nil {
		return err
	}
	if slices.EqualFunc(known, reports, func(k db.HostTemplatesRow, r TemplateReport) bool { return k.Name == r.Name && k.SHA256 == r.SHA256 }) {
		return nil
	}
	p := db.UpsertTemplatesParams{TeamID: host.TeamID}
	for _, r := range reports {
		if r.DefaultUser == "" {
			r.DefaultUser = "user"
		}
		p.Ids = append(p.Ids, wrenn.NewID(wrenn.PrefixTemplate))
		p.Names = append(p.Names, r.Name)
		p.SHA256s = append(p.SHA256s, r.SHA256)
		p.DiskMBs = append(p.DiskMBs, r.DiskMB)
		p.DefaultUsers = append(p.DefaultUsers, r.DefaultUser)
	}
	return f.store.Tx(ctx, func(tx store.Tx) error {
		if err := tx.DropHostTemplates(ctx, db.DropHostTemplatesParams{HostID: host.ID, Names: p.Names}); err != nil {
			return err
		}
		if len(reports) == 0 {
			return nil
		}
		if err := tx.UpsertTemplates(ctx, p); err != nil {
			return err
		}
		return tx.SetHostTemplates(ctx, db.SetHostTemplatesParams{HostID: host.ID, Names: p.Names, SHA256s: p.SHA256s})
	})
}
