package localstack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// settings are variables of an environment.
type settings map[string]string

// envNames are the variables of the env file, in the order in which they are written.
var envNames = []string{"WRENN_API_URL", "WRENN_API_KEY", "WRENN_ADMIN_EMAIL", "WRENN_ADMIN_PASSWORD", "DATABASE_URL", "REDIS_URL"}

// ReadEnv reads the env file of a stack: lines NAME=VALUE.
func ReadEnv(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := settings{}
	for lines := bufio.NewScanner(f); ; {
		if !lines.Scan() {
			return out, lines.Err()
		}
		name, value, ok := strings.Cut(lines.Text(), "=")
		if ok && !strings.ContainsAny(name, " #") {
			out[name] = value
		}
	}
}

func (s *Stack) loadEnv() (settings, error) {
	env, err := ReadEnv(s.EnvFile())
	if errors.Is(err, os.ErrNotExist) {
		return settings{}, nil
	}
	return env, err
}

// saveEnv writes the env file. No value has characters that a shell would treat specially in an
// assignment: addresses, hex and the URLs made here.
func (s *Stack) saveEnv(env settings) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by `wrenn up`; in a shell: . %s\n", s.EnvFile())
	for _, name := range envNames {
		fmt.Fprintf(&b, "%s=%s\n", name, env[name])
	}
	fmt.Fprintf(&b, "export %s\n", strings.Join(envNames, " "))
	return writeFile(s.EnvFile(), []byte(b.String()), 0o600)
}

// loadSecrets reads what the control plane must keep over restarts, making it the first time.
func (s *Stack) loadSecrets() (settings, error) {
	path := s.path("secrets")
	have, err := ReadEnv(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	out, changed := settings{}, false
	var text strings.Builder
	for _, name := range []string{"JWT_SECRET", "WRENN_ENCRYPTION_KEY"} {
		if out[name] = have[name]; out[name] == "" {
			out[name], changed = randomHex(32), true
		}
		fmt.Fprintf(&text, "%s=%s\n", name, out[name])
	}
	if !changed {
		return out, nil
	}
	return out, writeFile(path, []byte(text.String()), 0o600)
}

// createAdmin makes the admin's account, or gives it the new password, by the program that is there
// for that: whoever may run wrenn-cp with the database's address is the operator.
func (u *bringUp) createAdmin(ctx context.Context) error {
	program := filepath.Join(u.config.Bin, "wrenn-cp")
	cmd := exec.CommandContext(ctx, program, "admin", "create", "--email", u.env["WRENN_ADMIN_EMAIL"], "--password-stdin")
	cmd.Env = u.controlPlaneEnv()
	cmd.Stdin = strings.NewReader(u.env["WRENN_ADMIN_PASSWORD"] + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making the admin: %w\n%s", err, lastOf(string(out)))
	}
	return nil
}
