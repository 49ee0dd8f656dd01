package fleet

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Report is what a heartbeat says; what is nil keeps its former value.
type Report struct {
	Values    db.HeartbeatParams
	Templates []TemplateReport // nil: not reported

	Address      string    // at which the host is reached, "" if not reported
	TokenExpires time.Time // of the token that it came with
	CertExpires  time.Time // of the certificate that the host serves; zero: not reported
	CSRPEM       string    // asks for a certificate
}

// Instructions are the answer to a heartbeat: what the host is to keep or do. The zero value is nothing.
type Instructions struct {
	Token            string // in place of its own
	RenewCertificate bool   // it is to send a certificate request
	CertPEM          string // in place of its own
	CACertPEM        string
}

// TemplateReport is a template that a host has.
type TemplateReport struct {
	Name        string
	SHA256      string
	DiskMB      int64
	DefaultUser string
}

// Heartbeat notes that a host is alive. It fails with KindUnauthorized if the host was deleted.
func (f *Fleet) Heartbeat(ctx context.Context, requestID, hostID string, r Report) (Instructions, error) {
	r.Values.ID = hostID
	if r.Address != "" {
		if err := f.moveHost(ctx, Actor{"host", hostID, requestID}, r.Address); err != nil {
			return Instructions{}, err
		}
	}
	host, err := f.store.Heartbeat(ctx, r.Values)
	if store.IsNotFound(err) {
		return Instructions{}, wrenn.Errorf(wrenn.KindUnauthorized, "the host was deleted; register the machine as a new host")
	} else if err != nil {
		return Instructions{}, err
	}
	f.stats.Heartbeats.Add(1)
	if r.Templates != nil {
		if err := f.setTemplates(ctx, host, r.Templates); err != nil {
			return Instructions{}, err
		}
	}
	return f.instruct(ctx, host, r)
}

// moveHost notes at which address a host is reached from now on.
func (f *Fleet) moveHost(ctx context.Context, by Actor, address string) error {
	if err := checkAddress(address); err != nil {
		return err
	}
	return f.store.Tx(ctx, func(tx store.Tx) error {
		n, err := tx.MoveHost(ctx, db.MoveHostParams{ID: by.ID, Address: address})
		if err != nil || n == 0 {
			return err
		}
		return audit(ctx, tx, by, nil, "host.move", by.ID, map[string]any{"address": address})
	})
}

// instruct renews what the host identifies itself with before it runs out. A token is given as soon as a
// third of its life is left. For a certificate the host first makes a key and sends a request; the former
// one is accepted until the host is seen to serve the new one.
func (f *Fleet) instruct(ctx context.Context, host db.HeartbeatRow, r Report) (out Instructions, err error) {
	soon := time.Now().Add(f.times.HostCredentials / 3)
	if r.TokenExpires.Before(soon) {
		if out.Token, err = f.tokens.SignHost(host.ID, f.times.HostCredentials); err != nil {
			return out, err
		}
	}
	switch {
	case !host.MTLSEnabled:
	case r.CSRPEM != "":
		if err := checkCSR(r.CSRPEM); err != nil {
			return out, err
		}
		cert, fingerprint, err := f.ca.SignHost([]byte(r.CSRPEM), host.ID, time.Now(), f.times.HostCredentials)
		if err != nil {
			return out, err
		}
		if err := f.store.OfferCertificate(ctx, db.OfferCertificateParams{ID: host.ID, Fingerprint: fingerprint}); err != nil {
			return out, err
		}
		out.CertPEM, out.CACertPEM = string(cert), string(f.ca.CertPEM())
	default:
		out.RenewCertificate = !r.CertExpires.IsZero() && r.CertExpires.Before(soon)
	}
	return out, nil
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
