package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Limits of guessing and of making accounts.
func limitSignup() ephemeral.Limit {
	return ephemeral.Limit{Name: "signup", Events: 60, Window: time.Hour}
}
func limitLogin() ephemeral.Limit {
	return ephemeral.Limit{Name: "login", Events: 120, Window: time.Minute}
}
func limitFailed() ephemeral.Limit {
	return ephemeral.Limit{Name: "login-failed", Events: 10, Window: 5 * time.Minute}
}

// Signup implements gen.StrictServerInterface.
func (s *Server) Signup(ctx context.Context, req gen.SignupRequestObject) (gen.SignupResponseObject, error) {
	if s.SignupClosed {
		return nil, wrenn.Errorf(wrenn.KindForbidden, "signing up is closed here; ask an admin for an account")
	}
	if ok, wait := s.Redis.Allow(ctx, limitSignup(), exchangeOf(ctx).client); !ok {
		return nil, rateLimited(wait)
	}
	hash, err := s.Passwords.Hash(ctx, req.Body.Password)
	if err != nil {
		return nil, err
	}
	name := ""
	if req.Body.Name != nil {
		name = *req.Body.Name
	}
	u, teamID, err := NewAccount(ctx, s.st, Account{Email: req.Body.Email, Name: name, PasswordHash: hash}, requestID(ctx))
	if err != nil {
		return nil, err
	}
	session, err := s.session(u, teamID, roleOwner)
	return gen.Signup201JSONResponse(session), err
}

// Account is a user to be made.
type Account struct {
	Email, Name, PasswordHash string
	IsAdmin                   bool
}

// NewAccount makes a user and a team that the user owns, in one transaction.
func NewAccount(ctx context.Context, st *store.Store, a Account, reqID string) (db.User, string, error) {
	email := strings.ToLower(a.Email)
	teamID := wrenn.NewID(wrenn.PrefixTeam)
	var u db.User
	err := st.Tx(ctx, func(tx store.Tx) error {
		var err error
		u, err = tx.InsertUser(ctx, db.InsertUserParams{ID: wrenn.NewID(wrenn.PrefixUser), Email: email, Name: a.Name, PasswordHash: a.PasswordHash, IsAdmin: a.IsAdmin})
		if store.IsNotFound(err) {
			return wrenn.Errorf(wrenn.KindAlreadyExists, "there is an account with this email; log in").With("field", "email")
		} else if err != nil {
			return err
		}
		if err := tx.InsertTeam(ctx, db.InsertTeamParams{ID: teamID, Name: email}); err != nil {
			return err
		}
		if err := tx.InsertMembership(ctx, db.InsertMembershipParams{TeamID: teamID, UserID: u.ID, Role: roleOwner}); err != nil {
			return err
		}
		actorType := "user"
		if a.IsAdmin {
			actorType = "system"
		}
		return tx.InsertAudit(ctx, db.InsertAuditParams{ActorType: actorType, ActorID: u.ID, TeamID: &teamID, Action: "user.create", Subject: u.ID, Details: []byte(`{}`), RequestID: reqID})
	})
	return u, teamID, err
}

// Login implements gen.StrictServerInterface.
func (s *Server) Login(ctx context.Context, req gen.LoginRequestObject) (gen.LoginResponseObject, error) {
	email := strings.ToLower(req.Body.Email)
	sum := sha256.Sum256([]byte(email))
	account := hex.EncodeToString(sum[:16])
	if ok, wait := s.Redis.Allow(ctx, limitLogin(), exchangeOf(ctx).client); !ok {
		return nil, rateLimited(wait)
	}
	if ok, wait := s.Redis.Check(ctx, limitFailed(), account); !ok {
		return nil, rateLimited(wait)
	}
	u, err := s.st.UserByEmail(ctx, email)
	if err != nil && !store.IsNotFound(err) {
		return nil, err
	}
	ok, err := s.Passwords.Matches(ctx, req.Body.Password, u.PasswordHash)
	if err != nil {
		return nil, err
	}
	if !ok {
		s.Redis.Allow(ctx, limitFailed(), account)
		return nil, unauthorized(nil, "the email or the password is wrong")
	}
	m, err := s.st.FirstMembership(ctx, u.ID)
	if store.IsNotFound(err) {
		return nil, wrenn.Errorf(wrenn.KindForbidden, "the account is in no team; ask an admin")
	} else if err != nil {
		return nil, err
	}
	session, err := s.session(u, m.TeamID, m.Role)
	return gen.Login200JSONResponse(session), err
}

func (s *Server) session(u db.User, teamID, role string) (gen.Session, error) {
	token, expires, err := s.Tokens.SignUser(u.ID, teamID, u.Email, role)
	return gen.Session{
		Token: token, ExpiresAt: expires, TeamID: teamID,
		User: gen.User{ID: u.ID, Email: u.Email, Name: u.Name, IsAdmin: u.IsAdmin},
	}, err
}

// GetMe implements gen.StrictServerInterface.
func (s *Server) GetMe(ctx context.Context, _ gen.GetMeRequestObject) (gen.GetMeResponseObject, error) {
	p := auth.From(ctx)
	return gen.GetMe200JSONResponse{ID: p.UserID, Email: p.Email, Name: p.Name, IsAdmin: p.IsAdmin, TeamID: p.TeamID, Role: gen.MeRole(p.Role)}, nil
}

// CreateAPIKey implements gen.StrictServerInterface.
func (s *Server) CreateAPIKey(ctx context.Context, req gen.CreateAPIKeyRequestObject) (gen.CreateAPIKeyResponseObject, error) {
	p := auth.From(ctx)
	key, hash, prefix := auth.NewAPIKey()
	id := newID(ctx, wrenn.PrefixKey)
	var row db.ApiKey
	err := s.st.Tx(ctx, func(tx store.Tx) error {
		// A repeated request whose answer was lost: that key was never shown to anybody.
		if _, err := tx.Team(p.TeamID).DeleteAPIKey(ctx, id); err != nil {
			return err
		}
		var err error
		row, err = tx.Team(p.TeamID).InsertAPIKey(ctx, db.InsertAPIKeyParams{ID: id, Name: req.Body.Name, KeyHash: hash, KeyPrefix: prefix, CreatedBy: p.UserID})
		if err != nil {
			return err
		}
		return s.auditTx(ctx, tx, "api_key.create", id)
	})
	if err != nil {
		return nil, err
	}
	return gen.CreateAPIKey201JSONResponse{ID: row.ID, Name: row.Name, Key: key, KeyPrefix: prefix, CreatedAt: row.CreatedAt.UTC()}, nil
}

func (s *Server) auditTx(ctx context.Context, tx store.Tx, action, subject string) error {
	p := auth.From(ctx)
	return tx.InsertAudit(ctx, db.InsertAuditParams{
		ActorType: p.ActorType(), ActorID: p.ActorID(), TeamID: &p.TeamID, Action: action, Subject: subject, Details: []byte(`{}`), RequestID: requestID(ctx),
	})
}

// ListAPIKeys implements gen.StrictServerInterface.
func (s *Server) ListAPIKeys(ctx context.Context, req gen.ListAPIKeysRequestObject) (gen.ListAPIKeysResponseObject, error) {
	pg, err := readPage(req.Params.Limit, req.Params.Cursor)
	if err != nil {
		return nil, err
	}
	rows, err := s.st.Team(auth.From(ctx).TeamID).ListAPIKeys(ctx, db.ListAPIKeysParams{AfterAt: pg.afterAt, AfterID: pg.afterID, MaxRows: pg.fetch()})
	if err != nil {
		return nil, err
	}
	rows, next := cut(pg, rows, func(k db.ApiKey) (time.Time, string) { return k.CreatedAt, k.ID })
	out := gen.ListAPIKeys200JSONResponse{APIKeys: make([]gen.APIKey, 0, len(rows)), NextCursor: next}
	for _, k := range rows {
		out.APIKeys = append(out.APIKeys, gen.APIKey{
			ID: k.ID, Name: k.Name, KeyPrefix: k.KeyPrefix, CreatedBy: &k.CreatedBy, CreatedAt: k.CreatedAt.UTC(), LastUsedAt: utc(k.LastUsedAt),
		})
	}
	return out, nil
}

// DeleteAPIKey implements gen.StrictServerInterface.
func (s *Server) DeleteAPIKey(ctx context.Context, req gen.DeleteAPIKeyRequestObject) (gen.DeleteAPIKeyResponseObject, error) {
	err := s.st.Tx(ctx, func(tx store.Tx) error {
		ok, err := tx.Team(auth.From(ctx).TeamID).DeleteAPIKey(ctx, req.ID)
		if err != nil {
			return err
		}
		if !ok {
			return notFound("API key")
		}
		return s.auditTx(ctx, tx, "api_key.delete", req.ID)
	})
	if err != nil {
		return nil, err
	}
	return gen.DeleteAPIKey204Response{}, nil
}

func staleUse(t *time.Time) bool { return t == nil || time.Since(*t) > time.Minute }
