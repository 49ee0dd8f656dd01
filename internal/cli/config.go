package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
	"github.com/wrenn-sandbox/wrenn/internal/version"
	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// account is a control plane and what we have to be somebody there. Sandboxes want the API key or a
// token, hosts and keys a token; with email and password a token can be had when it is needed.
type account struct {
	URL      string    `json:"url"`
	APIKey   string    `json:"api_key,omitempty"`
	KeyID    string    `json:"key_id,omitempty"`
	Email    string    `json:"email,omitempty"`
	Password string    `json:"-"`
	Token    string    `json:"token,omitempty"`
	Expires  time.Time `json:"token_expires_at,omitzero"`

	source string // where it comes from, for messages
}

// account finds whom to be, in the order that the help of `wrenn` tells.
func (a *app) account() (*account, error) {
	if a.getenv("WRENN_API_KEY") != "" || a.getenv("WRENN_API_URL") != "" {
		acc := &account{source: "the environment"}
		acc.fill(a.getenv)
		return acc, nil
	}
	path, err := a.configFile()
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(path)
	if err == nil {
		acc := &account{source: path}
		if err := json.Unmarshal(raw, acc); err != nil {
			return nil, fmt.Errorf("%s is damaged: %w; `wrenn login` writes it anew", path, err)
		}
		return acc, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return a.localAccount()
}

func (acc *account) fill(getenv func(string) string) {
	acc.URL, acc.APIKey = getenv("WRENN_API_URL"), getenv("WRENN_API_KEY")
	acc.Email, acc.Password = getenv("WRENN_ADMIN_EMAIL"), getenv("WRENN_ADMIN_PASSWORD")
	acc.Token = getenv("WRENN_TOKEN")
}

// localAccount reads the file of the stack that runs on this machine.
func (a *app) localAccount() (*account, error) {
	home, err := a.stackHome()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(home, "env")
	env, err := localstack.ReadEnv(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, errNotLoggedIn
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("%s belongs to another user: run this as the user who ran `wrenn up`", path)
	case err != nil:
		return nil, err
	}
	acc := &account{source: path}
	acc.fill(func(name string) string { return env[name] })
	return acc, nil
}

// configFile is where `wrenn login` keeps its account.
func (a *app) configFile() (string, error) {
	dir := a.getenv("XDG_CONFIG_HOME")
	if dir == "" {
		if a.getenv("HOME") == "" {
			return "", errors.New("HOME is not set, so there is no place for the configuration")
		}
		dir = filepath.Join(a.getenv("HOME"), ".config")
	}
	return filepath.Join(dir, "wrenn", "config.json"), nil
}

// connect gives a client for sandboxes.
func (a *app) connect() (*wrenn.Client, error) {
	acc, err := a.account()
	if err != nil {
		return nil, err
	}
	if acc.APIKey == "" && acc.Token == "" {
		return nil, fmt.Errorf("%w: %s has no API key", errNotLoggedIn, acc.source)
	}
	return acc.client()
}

func (acc *account) client() (*wrenn.Client, error) {
	return wrenn.New(wrenn.WithURL(acc.URL), wrenn.WithAPIKey(acc.APIKey), wrenn.WithToken(acc.Token),
		wrenn.WithUserAgent("wrenn-cli/"+version.Version))
}

// asUser runs do with a client that has a user's token: the one at hand, else one by email and
// password. A token from the cache that is refused is replaced once.
func (a *app) asUser(ctx context.Context, do func(*wrenn.Client) error) error {
	acc, err := a.account()
	if err != nil {
		return err
	}
	cached := false
	if acc.Token == "" && acc.Password != "" {
		cached = a.cachedToken(acc)
	}
	if acc.Token == "" {
		if err := a.newToken(ctx, acc); err != nil {
			return err
		}
	}
	if !acc.Expires.IsZero() && time.Now().After(acc.Expires) {
		return fmt.Errorf("%w: the login for %s has expired", errNotLoggedIn, acc.URL)
	}
	c, err := acc.client()
	if err != nil {
		return err
	}
	err = do(c)
	if !cached || wrenn.CodeOf(err) != wrenn.CodeUnauthorized {
		return err
	}
	if err := a.newToken(ctx, acc); err != nil {
		return err
	}
	if c, err = acc.client(); err != nil {
		return err
	}
	return do(c)
}

// newToken logs in with email and password and keeps the token for the next commands: logins cost
// time and are limited.
func (a *app) newToken(ctx context.Context, acc *account) error {
	if acc.Password == "" {
		return fmt.Errorf("%w: this needs a user, not only an API key (%s)", errNotLoggedIn, acc.source)
	}
	c, err := acc.client()
	if err != nil {
		return err
	}
	session, err := c.Login(ctx, acc.Email, acc.Password)
	if err != nil {
		return err
	}
	acc.Token, acc.Expires = session.Token, session.ExpiresAt
	if path := a.tokenFile(acc); path != "" {
		_ = writePrivate(path, account{Token: acc.Token, Expires: acc.Expires}) // only a cache
	}
	return nil
}

func (a *app) cachedToken(acc *account) bool {
	path := a.tokenFile(acc)
	if path == "" {
		return false
	}
	raw, err := os.ReadFile(path)
	var kept account
	if err != nil || json.Unmarshal(raw, &kept) != nil || time.Now().Add(time.Minute).After(kept.Expires) {
		return false
	}
	acc.Token, acc.Expires = kept.Token, kept.Expires
	return true
}

// tokenFile is where the token of an account with a password is kept: named by all that makes it
// valid, so that no other account finds it.
func (a *app) tokenFile(acc *account) string {
	dir := a.getenv("XDG_CACHE_HOME")
	if dir == "" {
		if a.getenv("HOME") == "" {
			return ""
		}
		dir = filepath.Join(a.getenv("HOME"), ".cache")
	}
	sum := sha256.Sum256([]byte(acc.URL + "\n" + acc.Email + "\n" + acc.Password))
	return filepath.Join(dir, "wrenn", "token-"+hex.EncodeToString(sum[:8])+".json")
}

// writePrivate writes JSON that only the user may read.
func writePrivate(path string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(raw, '\n'))
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
