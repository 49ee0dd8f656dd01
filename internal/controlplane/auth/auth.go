// Package auth knows who is asking: passwords, user and host tokens, API keys, and the Principal that
// they turn into. It stores nothing and decides nothing about resources.
package auth

import (
	"context"
	"time"
)

// Principal is who makes a request. Exactly one of UserID, KeyID and HostID is set.
type Principal struct {
	UserID string
	KeyID  string
	HostID string

	TeamID  string    // of a user or key
	Email   string    // of a user
	Name    string    // of a user
	Role    string    // of a user in the team: owner or member
	IsAdmin bool      // of the platform
	Expires time.Time // when a host's token ends
}

// ActorType is the principal's kind as the audit log names it.
func (p Principal) ActorType() string {
	switch {
	case p.UserID != "":
		return "user"
	case p.KeyID != "":
		return "api_key"
	case p.HostID != "":
		return "host"
	default:
		return "anonymous"
	}
}

// ActorID is the principal's id, empty if nobody.
func (p Principal) ActorID() string { return p.UserID + p.KeyID + p.HostID }

type contextKey struct{}

// With puts the principal into the context.
func With(ctx context.Context, p Principal) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// From takes the principal out of the context; the zero Principal is nobody.
func From(ctx context.Context) Principal {
	p, _ := ctx.Value(contextKey{}).(Principal)
	return p
}
