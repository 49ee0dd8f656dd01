// Package settings holds what the host told this guest at /init: the access token, the environment,
// the default user and directory. Values are kept in a file that only root reads, so that a restarted
// guest agent goes on as before. It knows nothing of HTTP.
package settings

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// DefaultUser is on whose behalf requests act that name nobody, until /init says otherwise.
const DefaultUser = "user"

// Values are one consistent set of settings; treat them as read-only.
type Values struct {
	AccessToken string            `json:"access_token,omitempty"`
	Env         map[string]string `json:"env,omitempty"`
	User        string            `json:"user,omitempty"`
	Workdir     string            `json:"workdir,omitempty"`
}

// Store is the current settings, safe for use by many goroutines.
type Store struct {
	mu   sync.RWMutex
	path string
	now  Values
}

// Open reads the settings kept at path; a missing file means none were given yet. An empty path keeps
// them in memory only.
func Open(path string) (*Store, error) {
	s := &Store{path: path, now: Values{User: DefaultUser}}
	if path == "" {
		return s, nil
	}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	if err := json.Unmarshal(raw, &s.now); err != nil {
		return nil, fmt.Errorf("read settings %s: %w", path, err)
	}
	return s, nil
}

// Get gives the current settings.
func (s *Store) Get() Values {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.now
}

// Update changes the settings under the lock and keeps the result on disk before it is visible.
func (s *Store) Update(change func(*Values)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.now
	change(&next)
	if s.path != "" {
		if err := save(s.path, next); err != nil {
			return err
		}
	}
	s.now = next
	return nil
}

// Admits tells whether a request with this token may pass: always while none is set. The comparison
// takes the same time whatever the token.
func (v Values) Admits(token string) bool {
	if v.AccessToken == "" {
		return true
	}
	want, got := sha256.Sum256([]byte(v.AccessToken)), sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

func save(path string, v Values) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode settings: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("keep settings: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return fmt.Errorf("keep settings: %w", err)
	}
	return os.Rename(tmp, path)
}
