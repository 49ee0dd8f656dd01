package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// A host whose token and certificate run out stays in reach: its heartbeats renew them before.
func TestHostOutlivesItsCredentials(t *testing.T) {
	t.Parallel()
	ctx, s := start(t)
	sb := sandbox(ctx, t, s, wrenn.SandboxOptions{})
	expired := time.Now().Add(credentials()) // what the host has now
	first := map[string][]byte{}
	for _, name := range []string{"token", "token.crt", "token.key"} {
		raw, err := os.ReadFile(filepath.Join(s.Dir, "agent", name))
		if err != nil {
			t.Fatal(err)
		}
		first[name] = raw
	}
	err := stack.Eventually(ctx, 3*credentials(), func() error {
		for name, former := range first {
			now, err := os.ReadFile(filepath.Join(s.Dir, "agent", name))
			if err != nil || bytes.Equal(now, former) {
				return errors.Join(err, fmt.Errorf("%s is not renewed", name))
			}
		}
		if left := time.Until(expired); left > 0 {
			return fmt.Errorf("what was there first is good for another %s", left)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WaitOnline(ctx); err != nil {
		t.Fatal(err)
	}
	if got := shell(ctx, t, sb, "echo here"); got != "here" {
		t.Errorf("the sandbox says %q", got)
	}
	sandbox(ctx, t, s, wrenn.SandboxOptions{})
}
