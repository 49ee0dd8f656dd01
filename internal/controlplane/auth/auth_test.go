package auth

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestPasswords(t *testing.T) {
	t.Parallel()
	p := NewPasswords()
	hash, err := p.Hash(t.Context(), "open sesame")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(hash, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("hash %s", hash)
	}
	other, _ := p.Hash(t.Context(), "open sesame")
	if other == hash {
		t.Error("two hashes of one password are the same: no salt")
	}
	for password, want := range map[string]bool{"open sesame": true, "open sesame ": false, "": false} {
		if ok, err := p.Matches(t.Context(), password, hash); ok != want || err != nil {
			t.Errorf("%q: %v %v", password, ok, err)
		}
	}
	if ok, err := p.Matches(t.Context(), "", ""); ok || err != nil {
		t.Errorf("nobody's password matched: %v %v", ok, err)
	}
	for _, bad := range []string{"plain", "$argon2id$v=19$m=1,t=0,p=1$AAAA$AAAA", "$argon2i$v=19$m=19456,t=2,p=1$AAAA$AAAA", strings.TrimSuffix(hash, hash[len(hash)-4:])} {
		if ok, err := p.Matches(t.Context(), "x", bad); ok || err == nil {
			t.Errorf("took the stored hash %q", bad)
		}
	}
}

// However many log in at once, few hashes are made at once; who waits can give up.
func TestPasswordsAreBounded(t *testing.T) {
	t.Parallel()
	p := NewPasswords()
	for range maxHashes {
		if err := p.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := p.Hash(ctx, "x")
		failed <- err
	}()
	cancel()
	if err := <-failed; err == nil {
		t.Error("a hash was made though all places were taken")
	}
	for range maxHashes {
		p.leave()
	}
	var wg sync.WaitGroup
	for range 3 * maxHashes {
		wg.Go(func() {
			if _, err := p.Hash(t.Context(), "x"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestTokens(t *testing.T) {
	t.Parallel()
	if _, err := NewTokens(bytes.Repeat([]byte("x"), MinSecret-1), time.Now); err == nil {
		t.Error("took a short secret")
	}
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	tokens, err := NewTokens(bytes.Repeat([]byte("x"), MinSecret), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	user, expires, err := tokens.SignUser("user-1", "team-1", "a@b.c", "owner")
	if err != nil || !expires.Equal(now.Add(6*time.Hour)) {
		t.Fatal(expires, err)
	}
	host, err := tokens.SignHost("host-1", 365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := tokens.VerifyUser(user); err != nil || c.Subject != "user-1" || c.TeamID != "team-1" || c.Role != "owner" || c.ID == "" {
		t.Errorf("%+v %v", c, err)
	}
	if id, _, err := tokens.VerifyHost(host); err != nil || id != "host-1" {
		t.Errorf("%s %v", id, err)
	}
	if _, err := tokens.VerifyUser(host); err == nil {
		t.Error("a host token passed as a user's")
	}
	if _, _, err := tokens.VerifyHost(user); err == nil {
		t.Error("a user token passed as a host's")
	}
	now = now.Add(UserTokenLifetime + time.Second)
	if _, err := tokens.VerifyUser(user); err == nil {
		t.Error("an expired user token passed")
	}
	now = now.Add(365*24*time.Hour - UserTokenLifetime - 2*time.Second)
	if _, _, err := tokens.VerifyHost(host); err != nil {
		t.Errorf("a host token of nearly a year: %v", err)
	}
	now = now.Add(2 * time.Second)
	if _, _, err := tokens.VerifyHost(host); err == nil {
		t.Error("an expired host token passed")
	}
}

func TestAPIKeySpellings(t *testing.T) {
	t.Parallel()
	key, hash, prefix := NewAPIKey()
	if !bytes.Equal(HashAPIKey(key), hash) || !bytes.Equal(HashAPIKey("e2b_"+key[4:]), hash) || prefix != key[:10] {
		t.Errorf("%s %x %s", key, hash, prefix)
	}
	for _, bad := range []string{"", key[4:], "xyz_" + key[4:], key + "0", strings.ToUpper(key), "wrn_e2b_" + key[4:]} {
		if HashAPIKey(bad) != nil {
			t.Errorf("%q is a key", bad)
		}
	}
}

func TestSeal(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte{1}, 32)
	sealed, err := Seal(key, "name", []byte("text"))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := Open(key, "name", sealed); err != nil || string(text) != "text" {
		t.Errorf("%q %v", text, err)
	}
	if _, err := Open(key, "other", sealed); err == nil {
		t.Error("opened under another name")
	}
	if _, err := Open(bytes.Repeat([]byte{2}, 32), "name", sealed); err == nil {
		t.Error("opened with another key")
	}
	sealed[len(sealed)-1] ^= 1
	if _, err := Open(key, "name", sealed); err == nil {
		t.Error("opened though changed")
	}
	if _, err := Open(key, "name", nil); err == nil {
		t.Error("opened nothing")
	}
	if _, err := Seal(key[:16], "name", nil); err == nil {
		t.Error("took a short key")
	}
}
