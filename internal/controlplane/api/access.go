package api

import (
	"context"
	"net/http"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const roleOwner = "owner"

// authenticate puts who asks into the context and refuses who may not.
func (s *Server) authenticate(r *http.Request, w who) (context.Context, error) {
	ctx := r.Context()
	var p auth.Principal
	var err error
	switch w {
	case anyone:
		return ctx, nil
	case host:
		p, err = s.requireHostToken(r)
	default:
		p, err = s.requireUser(r, w)
	}
	if err != nil {
		return ctx, err
	}
	exchangeOf(ctx).actor = p.ActorID()
	return auth.With(ctx, p), nil
}

// requireHostToken admits the agent of a host. Whether the host still exists, its heartbeat tells.
func (s *Server) requireHostToken(r *http.Request) (auth.Principal, error) {
	token := r.Header.Get("X-Host-Token")
	if token == "" {
		return auth.Principal{}, unauthorized(nil, "send the host's token in X-Host-Token")
	}
	id, expires, err := s.Tokens.VerifyHost(token)
	if err != nil {
		return auth.Principal{}, unauthorized(err, "X-Host-Token is not a valid host token")
	}
	return auth.Principal{HostID: id, Expires: expires}, nil
}

func (s *Server) requireUser(r *http.Request, w who) (auth.Principal, error) {
	key, bearer := r.Header.Get("X-API-Key"), r.Header.Get("Authorization")
	switch {
	case bearer != "" && (key == "" || w != team):
		return s.bearer(r.Context(), bearer, w)
	case key != "" && w == team:
		return s.apiKey(r.Context(), key)
	case key != "":
		if _, err := s.apiKey(r.Context(), key); err != nil {
			return auth.Principal{}, err
		}
		return auth.Principal{}, wrenn.Errorf(wrenn.KindForbidden, "this needs a user's token; log in and send it in Authorization: Bearer")
	case w == team:
		return auth.Principal{}, unauthorized(nil, "send an API key in X-API-Key or a user's token in Authorization: Bearer")
	default:
		return auth.Principal{}, unauthorized(nil, "log in and send the token in Authorization: Bearer")
	}
}

func (s *Server) bearer(ctx context.Context, header string, w who) (auth.Principal, error) {
	scheme, token, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return auth.Principal{}, unauthorized(nil, "Authorization must be: Bearer <token>")
	}
	claims, err := s.Tokens.VerifyUser(strings.TrimSpace(token))
	if err != nil {
		return auth.Principal{}, unauthorized(err, "the token is not valid or has expired; log in again")
	}
	// The token says who it is; what they may do is asked of the database, so that it ends at once when it ends.
	m, err := s.st.MemberByID(ctx, db.MemberByIDParams{UserID: claims.Subject, TeamID: claims.TeamID})
	if store.IsNotFound(err) {
		return auth.Principal{}, unauthorized(nil, "the token's user is not in its team any more; log in again")
	} else if err != nil {
		return auth.Principal{}, err
	}
	if w == hostAdmin && !m.IsAdmin && m.Role != roleOwner {
		return auth.Principal{}, wrenn.Errorf(wrenn.KindForbidden, "hosts are for admins and the owner of a team")
	}
	return auth.Principal{UserID: m.ID, TeamID: m.TeamID, Email: m.Email, Name: m.Name, Role: m.Role, IsAdmin: m.IsAdmin}, nil
}

func (s *Server) apiKey(ctx context.Context, key string) (auth.Principal, error) {
	hash := auth.HashAPIKey(strings.TrimSpace(key))
	bad := unauthorized(nil, "the API key is not valid: keys are wrn_ and 40 hex digits, and may have been revoked")
	if hash == nil {
		return auth.Principal{}, bad
	}
	row, err := s.st.APIKeyByHash(ctx, hash)
	if store.IsNotFound(err) {
		return auth.Principal{}, bad
	} else if err != nil {
		return auth.Principal{}, err
	}
	if staleUse(row.LastUsedAt) {
		if err := s.st.TouchAPIKey(ctx, row.ID); err != nil {
			return auth.Principal{}, err
		}
	}
	return auth.Principal{KeyID: row.ID, TeamID: row.TeamID}, nil
}

func unauthorized(cause error, message string) error {
	return wrenn.Wrap(cause, wrenn.KindUnauthorized, "%s", message)
}

// hostScope is whose hosts the principal may see: all for an admin, else those of its team.
func hostScope(p auth.Principal) fleet.Scope {
	if p.IsAdmin {
		return nil
	}
	return &p.TeamID
}

// actor is who asks, for the audit log.
func actor(ctx context.Context) fleet.Actor { return fleet.ActorOf(auth.From(ctx), requestID(ctx)) }
