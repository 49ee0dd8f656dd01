package fleet

import (
	"context"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// origin is what a new sandbox begins with: a template's image, a team's snapshot, or a checkpoint. A saved
// moment has a size of its own and lies on one host.
type origin struct {
	template string // the image, or the one that it descends from
	user     string
	least    Resources // of an image only the disk is given
	needs    Needs

	what                          string  // of a saved moment: what to call it
	hostID                        *string // where it lies
	sandbox, checkpoint, snapshot *string
}

// defaultDiskMB is for a template whose host did not say how large it is.
const defaultDiskMB = 2048

// origin finds what a request names. A team's snapshot keeps its name, should an image come to have the
// same one later.
func (f *Fleet) origin(ctx context.Context, teamID string, spec Spec) (origin, error) {
	if spec.From != "" {
		return f.checkpointOrigin(ctx, teamID, spec.From)
	}
	snap, err := f.store.Team(teamID).SnapshotByName(ctx, spec.Template)
	if err == nil {
		return snapshotOrigin(snap)
	}
	if !store.IsNotFound(err) {
		return origin{}, err
	}
	tpl, err := f.template(ctx, teamID, spec.Template)
	if err != nil {
		return origin{}, err
	}
	return origin{template: tpl.Name, user: tpl.DefaultUser, least: Resources{DiskMB: tpl.DiskMB}}, nil
}

func snapshotOrigin(s db.Snapshot) (origin, error) {
	needs, err := readNeeds(s.Needs)
	return origin{
		template: s.Name, user: s.DefaultUser, least: Resources{int64(s.VCPUs), int64(s.MemoryMB), int64(s.DiskMB)}, needs: needs,
		what: "snapshot " + s.Name, hostID: &s.HostID, snapshot: &s.ID,
	}, err
}

func (f *Fleet) checkpointOrigin(ctx context.Context, teamID, id string) (origin, error) {
	row, err := f.store.Team(teamID).GetCheckpoint(ctx, id)
	if store.IsNotFound(err) || err == nil && (row.Checkpoint.DeletedAt != nil || row.Checkpoint.Status != momentReady) {
		return origin{}, notFound("checkpoint")
	}
	if err != nil {
		return origin{}, err
	}
	sb, err := f.Get(ctx, teamID, row.Checkpoint.SandboxID)
	if err != nil {
		return origin{}, err
	}
	needs, err := readNeeds(row.Checkpoint.Needs)
	s := sb.Sandbox
	return origin{
		template: s.Template, user: s.DefaultUser, least: Resources{int64(s.VCPUs), int64(s.MemoryMB), int64(s.DiskMB)}, needs: needs,
		what: "checkpoint " + id, hostID: &row.HostID, sandbox: &s.ID, checkpoint: &id,
	}, err
}

// size is what a sandbox gets: what was asked for, else the origin's, else the default. A saved moment runs
// in the size it was saved in; only its disk may be larger.
func (o origin) size(spec Spec) (Resources, error) {
	size := Resources{VCPUs: wrenn.DefaultVCPUs, MemoryMB: wrenn.DefaultMemoryMB, DiskMB: defaultDiskMB}
	for _, p := range []struct {
		field       string
		out         *int64
		asked, have int64
		fixed       bool
	}{
		{"vcpus", &size.VCPUs, int64(spec.VCPUs), o.least.VCPUs, true},
		{"memory_mb", &size.MemoryMB, int64(spec.MemoryMB), o.least.MemoryMB, true},
		{"disk_mb", &size.DiskMB, int64(spec.DiskMB), o.least.DiskMB, false},
	} {
		switch {
		case p.asked != 0 && p.have != 0 && p.fixed && p.asked != p.have:
			return size, invalid(p.field, "%s has %d, and a sandbox made from it has the same; leave it out", o.what, p.have)
		case p.asked != 0 && p.asked < p.have:
			return size, invalid(p.field, "template %q needs at least %d MB", o.template, p.have)
		case p.asked != 0:
			*p.out = p.asked
		case p.have != 0:
			*p.out = p.have
		}
	}
	return size, nil
}

// explain tells of a saved moment that it can run only where it lies.
func (o origin) explain(refusal *wrenn.Error) error {
	if o.hostID == nil {
		return refusal
	}
	e := *refusal
	e.Message = o.what + " lies on one host only: " + e.Message
	return e.With("host_id", *o.hostID)
}

func (o origin) away() error {
	return wrenn.Errorf(wrenn.KindNoCapacity, "%s lies on one host only, which cannot be reached now; try again when it is back", o.what).With("host_id", *o.hostID)
}

// template finds an image by name.
func (f *Fleet) template(ctx context.Context, teamID, name string) (db.Template, error) {
	tpl, err := f.store.Team(teamID).GetTemplate(ctx, name)
	if !store.IsNotFound(err) {
		return tpl, err
	}
	all, err := f.store.Team(teamID).ListSnapshots(ctx, db.ListSnapshotsParams{MaxRows: maxNamesShown})
	if err != nil {
		return tpl, err
	}
	if len(all) == 0 {
		return tpl, wrenn.Errorf(wrenn.KindNoCapacity, "no host has reported a template yet; register a host, or wait until its first heartbeat")
	}
	names := make([]string, len(all))
	for i, t := range all {
		names[i] = t.Name
	}
	return tpl, wrenn.Errorf(wrenn.KindInvalidRequest, "template: there is no %q; there are: %s", name, strings.Join(names, ", ")).
		With("field", "template").With("templates", names)
}

// maxNamesShown bounds the names in an error.
const maxNamesShown = 50
