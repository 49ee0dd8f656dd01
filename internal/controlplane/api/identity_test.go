package api_test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/api"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

type session struct {
	Token     string
	ExpiresAt time.Time `json:"expires_at"`
	TeamID    string    `json:"team_id"`
	User      struct {
		ID, Email, Name string
		IsAdmin         bool `json:"is_admin"`
	}
}

func bearer(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }

func TestSignupLoginMe(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	email := "Ada." + wrenn.NewID("x")[2:] + "@Example.com"
	var made, in session
	p.Do("POST", "/v1/auth/signup", map[string]any{"email": email, "password": planetest.Password, "name": "Ada"}).Want(t, 201, &made)
	if made.User.Email != strings.ToLower(email) || made.User.Name != "Ada" || made.User.IsAdmin || !wrenn.ValidID("team", made.TeamID) || !wrenn.ValidID("user", made.User.ID) {
		t.Errorf("signed up: %+v", made)
	}
	p.Do("POST", "/v1/auth/signup", map[string]any{"email": strings.ToUpper(email), "password": planetest.Password}).WantError(t, 409, "already_exists")
	p.Do("POST", "/v1/auth/login", map[string]any{"email": email, "password": planetest.Password}).Want(t, 200, &in)
	if in.TeamID != made.TeamID || in.User.ID != made.User.ID || time.Until(in.ExpiresAt) < 5*time.Hour || time.Until(in.ExpiresAt) > 6*time.Hour {
		t.Errorf("logged in: %+v", in)
	}
	claims := jwt.MapClaims{}
	if _, err := jwt.ParseWithClaims(in.Token, claims, func(*jwt.Token) (any, error) { return []byte(planetest.Secret), nil }); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"sub", "team_id", "email", "role", "iat", "exp", "jti"} {
		if claims[c] == nil {
			t.Errorf("the token has no %s", c)
		}
	}
	if _, ok := claims["typ"]; ok || len(claims) != 7 {
		t.Errorf("claims %v", claims)
	}
	var me struct {
		ID, Email, Name, Role string
		IsAdmin               bool   `json:"is_admin"`
		TeamID                string `json:"team_id"`
	}
	p.Do("GET", "/v1/me", nil, bearer(in.Token)).Want(t, 200, &me)
	if me.ID != made.User.ID || me.TeamID != made.TeamID || me.Role != "owner" || me.IsAdmin || me.Name != "Ada" {
		t.Errorf("me: %+v", me)
	}
	wrong := p.Do("POST", "/v1/auth/login", map[string]any{"email": email, "password": "wrong password"}).WantError(t, 401, "unauthorized")
	unknown := p.Do("POST", "/v1/auth/login", map[string]any{"email": "no." + email, "password": "wrong password"}).WantError(t, 401, "unauthorized")
	id := regexp.MustCompile(`req-\w+`)
	if a, b := id.ReplaceAllString(string(wrong.Body), ""), id.ReplaceAllString(string(unknown.Body), ""); a != b {
		t.Errorf("a wrong password and an unknown account are told apart: %s, %s", a, b)
	}
	if strings.Contains(p.Log.String(), planetest.Password) {
		t.Error("a password is in the log")
	}
}

func TestLoginIsLimited(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	email := "brute." + wrenn.NewID("x")[2:] + "@example.com"
	p.Do("POST", "/v1/auth/signup", map[string]any{"email": email, "password": planetest.Password}).Want(t, 201, nil)
	for i := range 11 {
		a := p.Do("POST", "/v1/auth/login", map[string]any{"email": email, "password": fmt.Sprint("guess number ", i)})
		if i < 10 {
			a.WantError(t, 401, "unauthorized")
			continue
		}
		a.WantError(t, 429, "rate_limited")
		if !regexp.MustCompile(`^[1-9][0-9]*$`).MatchString(a.Header.Get("Retry-After")) {
			t.Errorf("Retry-After %q", a.Header.Get("Retry-After"))
		}
	}
	// The right password does not help while the account is locked; other accounts are not touched.
	p.Do("POST", "/v1/auth/login", map[string]any{"email": email, "password": planetest.Password}).WantError(t, 429, "rate_limited")
	p.Do("POST", "/v1/auth/login", map[string]any{"email": "x" + email, "password": "guess"}).WantError(t, 401, "unauthorized")
}

func TestSignupCanBeClosed(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Deps: func(d *api.Deps) { d.SignupClosed = true }})
	p.Do("POST", "/v1/auth/signup", map[string]any{"email": "a@example.com", "password": planetest.Password}).WantError(t, 403, "forbidden")
}

func TestAPIKeys(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	u, other := p.NewUser(), p.NewUser()
	var made struct{ ID, Name, Key, Prefix string }
	u.Do("POST", "/v1/api-keys", map[string]any{"name": "ci"}).Want(t, 201, &made)
	if !regexp.MustCompile(`^wrn_[0-9a-f]{40}$`).MatchString(made.Key) {
		t.Fatalf("key %q", made.Key)
	}
	hexPart := strings.TrimPrefix(made.Key, "wrn_")
	for key, want := range map[string]int{
		made.Key: 200, "e2b_" + hexPart: 200, hexPart: 401, "wrn_" + strings.ToUpper(hexPart): 401, "abc_" + hexPart: 401,
		"wrn_" + strings.Repeat("0", 40): 401, made.Key + "0": 401, "": 401,
	} {
		if a := p.Do("GET", "/v1/sandboxes", nil, http.Header{"X-Api-Key": {key}}); a.Status != want {
			t.Errorf("key %q: %d, want %d", key, a.Status, want)
		}
	}
	p.Do("GET", "/v1/me", nil, http.Header{"X-Api-Key": {made.Key}}).WantError(t, 403, "forbidden")
	var list struct {
		Keys []struct {
			ID        string
			KeyPrefix string     `json:"key_prefix"`
			LastUsed  *time.Time `json:"last_used_at"`
		} `json:"api_keys"`
	}
	a := u.Do("GET", "/v1/api-keys", nil).Want(t, 200, &list)
	if len(list.Keys) != 1 || list.Keys[0].KeyPrefix != made.Key[:10] || list.Keys[0].LastUsed == nil || strings.Contains(string(a.Body), made.Key) {
		t.Errorf("list: %s", a.Body)
	}
	other.Do("DELETE", "/v1/api-keys/"+made.ID, nil).WantError(t, 404, "not_found")
	u.Do("DELETE", "/v1/api-keys/"+made.ID, nil).Want(t, 204, nil)
	p.Do("GET", "/v1/sandboxes", nil, http.Header{"X-Api-Key": {made.Key}}).WantError(t, 401, "unauthorized")
	if rows := strings.Join(query(t, p, `SELECT row_to_json(a)::text FROM audit_log a`), ""); strings.Contains(rows, hexPart) {
		t.Error("the key is in the audit log")
	}
}

func TestForgedTokens(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	u := p.NewUser()
	claims := func(change func(jwt.MapClaims)) jwt.MapClaims {
		c := jwt.MapClaims{"sub": u.ID, "team_id": u.TeamID, "email": u.Email, "role": "owner", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(), "jti": "x"}
		if change != nil {
			change(c)
		}
		return c
	}
	sign := func(m jwt.SigningMethod, key any, c jwt.MapClaims) string {
		token, err := jwt.NewWithClaims(m, c).SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	secret := []byte(planetest.Secret)
	good := sign(jwt.SigningMethodHS256, secret, claims(nil))
	p.Do("GET", "/v1/me", nil, bearer(good)).Want(t, 200, nil)
	parts := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`))
	for name, token := range map[string]string{
		"none alg":         sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, claims(nil)),
		"none, signed":     none + "." + parts[1] + "." + parts[2],
		"HS512":            sign(jwt.SigningMethodHS512, secret, claims(nil)),
		"another secret":   sign(jwt.SigningMethodHS256, []byte("another secret of at least 32 bytes"), claims(nil)),
		"no signature":     parts[0] + "." + parts[1] + ".",
		"changed payload":  parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"x"}`)) + "." + parts[2],
		"expired":          sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["exp"] = time.Now().Add(-time.Second).Unix() })),
		"never expires":    sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { delete(c, "exp") })),
		"typ host":         sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["typ"] = "host" })),
		"typ user":         sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["typ"] = "user" })),
		"typ empty":        sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["typ"] = "" })),
		"typ of no string": sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["typ"] = 7 })),
		"another's team":   sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["team_id"] = p.Admin.TeamID })),
		"no such user":     sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { c["sub"] = wrenn.NewID("user") })),
		"no team":          sign(jwt.SigningMethodHS256, secret, claims(func(c jwt.MapClaims) { delete(c, "team_id") })),
		"not a token":      "nonsense",
		"empty":            "",
		"very long":        strings.Repeat("a", 20000),
	} {
		for _, path := range []string{"/v1/me", "/v1/sandboxes", "/v1/hosts"} {
			a := p.Do("GET", path, nil, bearer(token))
			if a.Status != 401 {
				t.Errorf("%s: %s answers %d", name, path, a.Status)
				continue
			}
			a.WantError(t, 401, "unauthorized")
		}
	}
	p.Do("GET", "/v1/me", nil, http.Header{"Authorization": {"Basic " + good}}).WantError(t, 401, "unauthorized")

	h := p.AddHost()
	for name, token := range map[string]string{
		"no typ":   sign(jwt.SigningMethodHS256, secret, jwt.MapClaims{"sub": h.ID, "exp": time.Now().Add(time.Hour).Unix()}),
		"typ user": sign(jwt.SigningMethodHS256, secret, jwt.MapClaims{"sub": h.ID, "typ": "user", "exp": time.Now().Add(time.Hour).Unix()}),
		"none alg": sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, jwt.MapClaims{"sub": h.ID, "typ": "host", "exp": time.Now().Add(time.Hour).Unix()}),
		"expired":  sign(jwt.SigningMethodHS256, secret, jwt.MapClaims{"sub": h.ID, "typ": "host", "exp": time.Now().Add(-time.Second).Unix()}),
		"user's":   u.Token,
		"nobody's": "nonsense",
	} {
		if a := p.Do("POST", "/v1/hosts/"+h.ID+"/heartbeat", "{}", hostToken(token)); a.Status != 401 {
			t.Errorf("host token, %s: %d %s", name, a.Status, a.Body)
		}
	}
}

// What a token allows ends when it ends in the database, not when the token does.
func TestTokenOfWhoIsNoMoreAdmin(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, nil)
	query(t, p, `UPDATE users SET is_admin = false WHERE id = $1 RETURNING id`, p.Admin.ID)
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).WantError(t, 403, "forbidden")
	query(t, p, `DELETE FROM memberships WHERE user_id = $1 RETURNING user_id`, p.Admin.ID)
	p.Admin.Do("GET", "/v1/me", nil).WantError(t, 401, "unauthorized")
}
