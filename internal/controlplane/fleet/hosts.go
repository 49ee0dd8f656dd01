package fleet

import (
	"context"
	"encoding/json"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// RegistrationTTL is how long a one-time token is good.
const RegistrationTTL = time.Hour

const maxHostTags = 64

// Scope is whose hosts a call may touch: nil is all of them, else one team's.
type Scope = *string

// NewHost is a host to be made.
type NewHost struct {
	ID               string
	Type             wrenn.HostType
	TeamID           *string // of a byoc host
	Provider         *string
	AvailabilityZone *string
}

// Registration is a host with the token that its agent registers with.
type Registration struct {
	Host      db.Host
	Token     string
	ExpiresAt time.Time
}

// Actor is who does something, for the audit log.
type Actor struct {
	Type, ID, RequestID string
}

func systemActor() Actor { return Actor{Type: "system", ID: "system"} }

// ActorOf names a principal.
func ActorOf(p auth.Principal, requestID string) Actor {
	return Actor{p.ActorType(), p.ActorID(), requestID}
}

// CreateHost makes a host and its token. If the id is there already (a repeated request), it gets a new
// token instead.
func (f *Fleet) CreateHost(ctx context.Context, by Actor, n NewHost) (Registration, error) {
	var reg Registration
	err := f.store.Tx(ctx, func(tx store.Tx) error {
		if n.TeamID != nil {
			if ok, err := tx.TeamExists(ctx, *n.TeamID); err != nil {
				return err
			} else if !ok {
				return invalid("team_id", "no such team")
			}
		}
		if _, err := tx.GetHost(ctx, db.GetHostParams{ID: n.ID}); err == nil {
			return f.renewToken(ctx, tx, by, n.ID, nil, &reg)
		} else if !store.IsNotFound(err) {
			return err
		}
		host, err := tx.InsertHost(ctx, db.InsertHostParams{
			ID: n.ID, Type: string(n.Type), TeamID: n.TeamID, Provider: n.Provider, AvailabilityZone: n.AvailabilityZone, CreatedBy: by.ID,
		})
		if err != nil {
			return err
		}
		if err := audit(ctx, tx, by, host.TeamID, "host.create", host.ID, nil); err != nil {
			return err
		}
		if err := event(ctx, tx, "host.created", host.TeamID, host.ID, map[string]any{"type": host.Type}); err != nil {
			return err
		}
		reg, err = f.issueToken(ctx, tx, by, host)
		return err
	})
	return reg, err
}

// issueToken writes the audit row and puts the token into Redis before the transaction commits: if Redis
// fails nothing was made; a token whose transaction then fails is refused by the row it lacks.
func (f *Fleet) issueToken(ctx context.Context, tx store.Tx, by Actor, host db.Host) (Registration, error) {
	token, hash := auth.NewRegistrationToken()
	expires := time.Now().Add(RegistrationTTL)
	err := tx.InsertHostToken(ctx, db.InsertHostTokenParams{
		ID: wrenn.NewID("htk"), HostID: host.ID, TokenHash: hash, CreatedBy: by.ID, ExpiresAt: expires,
	})
	if err != nil {
		return Registration{}, err
	}
	if err := f.redis.PutHostToken(ctx, hash, host.ID, RegistrationTTL); err != nil {
		return Registration{}, err
	}
	return Registration{host, token, expires}, nil
}

// RegenerateToken makes a new token for a host that has not registered; older ones stop working.
func (f *Fleet) RegenerateToken(ctx context.Context, by Actor, scope Scope, id string) (Registration, error) {
	var reg Registration
	err := f.store.Tx(ctx, func(tx store.Tx) error { return f.renewToken(ctx, tx, by, id, scope, &reg) })
	return reg, err
}

func (f *Fleet) renewToken(ctx context.Context, tx store.Tx, by Actor, id string, scope Scope, reg *Registration) error {
	host, err := lockHost(ctx, tx, scope, id)
	if err != nil {
		return err
	}
	if host.Status != string(wrenn.HostPending) {
		return wrenn.Errorf(wrenn.KindInvalidState, "the host is %s, not pending: it has registered already; to register it anew, delete it and create another", host.Status).
			With("status", host.Status)
	}
	old, err := tx.SupersedeHostTokens(ctx, id)
	if err != nil {
		return err
	}
	if err := f.redis.DropHostTokens(ctx, old); err != nil {
		return err
	}
	if err := audit(ctx, tx, by, host.TeamID, "host.token", id, nil); err != nil {
		return err
	}
	*reg, err = f.issueToken(ctx, tx, by, host)
	return err
}

func lockHost(ctx context.Context, tx store.Tx, scope Scope, id string) (db.Host, error) {
	host, err := tx.LockHost(ctx, db.LockHostParams{ID: id, TeamID: scope})
	if store.IsNotFound(err) {
		return host, notFound("host")
	}
	return host, err
}

// GetHost gives a host.
func (f *Fleet) GetHost(ctx context.Context, scope Scope, id string) (db.Host, error) {
	host, err := f.store.GetHost(ctx, db.GetHostParams{ID: id, TeamID: scope})
	if store.IsNotFound(err) {
		return host, notFound("host")
	}
	return host, err
}

// SandboxCount is how many sandboxes are placed on a host.
func (f *Fleet) SandboxCount(ctx context.Context, id string) (int64, error) {
	return f.store.SandboxCount(ctx, id)
}

// ListHosts gives hosts, newest first.
func (f *Fleet) ListHosts(ctx context.Context, p db.ListHostsParams) ([]db.ListHostsRow, error) {
	return f.store.ListHosts(ctx, p)
}

// DeleteHost takes a host out: its token is refused from then on. A host with sandboxes stays, except
// where all that is left on it is already being deleted or never came to be.
func (f *Fleet) DeleteHost(ctx context.Context, by Actor, scope Scope, id string) error {
	err := f.store.Tx(ctx, func(tx store.Tx) error {
		host, err := lockHost(ctx, tx, scope, id)
		if err != nil {
			return err
		}
		if _, err := tx.AbandonSandboxes(ctx, id); err != nil {
			return err
		}
		if n, err := tx.SandboxCount(ctx, id); err != nil {
			return err
		} else if n > 0 {
			return wrenn.Errorf(wrenn.KindInUse, "the host has %d sandboxes; delete them first", n).With("sandboxes", n)
		}
		if n, err := tx.SnapshotCountOfHost(ctx, id); err != nil {
			return err
		} else if n > 0 {
			return wrenn.Errorf(wrenn.KindInUse, "%d snapshots of teams lie on the host only; delete them first", n).With("snapshots", n)
		}
		if _, err := tx.SupersedeHostTokens(ctx, id); err != nil {
			return err
		}
		if err := tx.ClearHost(ctx, id); err != nil {
			return err
		}
		if _, err := tx.DeleteHost(ctx, id); err != nil {
			return err
		}
		if err := audit(ctx, tx, by, host.TeamID, "host.delete", id, nil); err != nil {
			return err
		}
		return event(ctx, tx, "host.deleted", host.TeamID, id, nil)
	})
	if err == nil {
		f.agents.Forget(id)
	}
	return err
}

// HostTags gives a host's tags in order.
func (f *Fleet) HostTags(ctx context.Context, scope Scope, id string) ([]string, error) {
	if _, err := f.GetHost(ctx, scope, id); err != nil {
		return nil, err
	}
	return f.store.HostTags(ctx, id)
}

// AddHostTag adds a tag; one that is there stays.
func (f *Fleet) AddHostTag(ctx context.Context, by Actor, scope Scope, id, tag string) error {
	return f.changeTags(ctx, by, scope, id, tag, "host.tag.add", func(tx store.Tx) error {
		if err := tx.AddHostTag(ctx, db.AddHostTagParams{HostID: id, Tag: tag}); err != nil {
			return err
		}
		tags, err := tx.HostTags(ctx, id)
		if err == nil && len(tags) > maxHostTags {
			return invalid("tag", "a host has at most %d tags; remove one first", maxHostTags)
		}
		return err
	})
}

// RemoveHostTag removes a tag that must be there.
func (f *Fleet) RemoveHostTag(ctx context.Context, by Actor, scope Scope, id, tag string) error {
	return f.changeTags(ctx, by, scope, id, tag, "host.tag.remove", func(tx store.Tx) error {
		n, err := tx.RemoveHostTag(ctx, db.RemoveHostTagParams{HostID: id, Tag: tag})
		if err == nil && n == 0 {
			return notFound("tag")
		}
		return err
	})
}

func (f *Fleet) changeTags(ctx context.Context, by Actor, scope Scope, id, tag, action string, change func(store.Tx) error) error {
	return f.store.Tx(ctx, func(tx store.Tx) error {
		host, err := lockHost(ctx, tx, scope, id)
		if err != nil {
			return err
		}
		if err := change(tx); err != nil {
			return err
		}
		return audit(ctx, tx, by, host.TeamID, action, id, map[string]any{"tag": tag})
	})
}

func audit(ctx context.Context, tx store.Tx, by Actor, teamID *string, action, subject string, details map[string]any) error {
	if details == nil {
		details = map[string]any{}
	}
	raw, err := json.Marshal(details)
	if err != nil {
		return err
	}
	return tx.InsertAudit(ctx, db.InsertAuditParams{
		ActorType: by.Type, ActorID: by.ID, TeamID: teamID, Action: action, Subject: subject, Details: raw, RequestID: by.RequestID,
	})
}
