package api_test

import (
	"sync"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// What is idle for its timeout meets what its owner chose; what its host says is in use, or has no
// timeout, or was pinged, goes on; what cannot be paused keeps running and is not tried without end.
func TestTimeouts(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	var mu sync.Mutex
	tries := map[string]int{}
	stuck := ""
	h.OnPause(func(id string) error {
		mu.Lock()
		defer mu.Unlock()
		tries[id]++
		if id == stuck {
			return wrenn.Errorf(wrenn.KindDiskFull, "no room for its memory")
		}
		return nil
	})
	paused := create(t, u, map[string]any{"timeout_sec": 3600})
	killed := create(t, u, map[string]any{"timeout_sec": 3600, "on_timeout": "kill"})
	used := create(t, u, map[string]any{"timeout_sec": 3600, "on_timeout": "kill"})
	never := create(t, u, nil)
	pinged := create(t, u, map[string]any{"timeout_sec": 3600})
	full := create(t, u, map[string]any{"timeout_sec": 3600})
	mu.Lock()
	stuck = full.ID
	mu.Unlock()
	h.Set(used.ID, &agentv1.Sandbox{Id: used.ID, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 2, Active: true})
	query(t, p, `UPDATE sandboxes SET last_active_at = now() - interval '3601 seconds' WHERE id <> $1 RETURNING id`, pinged.ID)

	planetest.Eventually(t, "one is paused", func() bool { return get(t, u, paused.ID).Status == "paused" })
	planetest.Eventually(t, "one is deleted", func() bool { return u.Do("GET", "/v1/sandboxes/"+killed.ID, nil).Status == 404 })
	planetest.Eventually(t, "the one in use was asked about", func() bool { mu.Lock(); defer mu.Unlock(); return tries[used.ID] == 1 })
	planetest.Eventually(t, "the stuck one was tried", func() bool { mu.Lock(); defer mu.Unlock(); return tries[full.ID] == 1 })
	// Another round passes: a later one acts, and none of the former is tried again.
	late := create(t, u, map[string]any{"timeout_sec": 3600})
	query(t, p, `UPDATE sandboxes SET last_active_at = now() - interval '3601 seconds' WHERE id = $1 RETURNING id`, late.ID)
	planetest.Eventually(t, "the late one is paused", func() bool { return get(t, u, late.ID).Status == "paused" })
	for _, sb := range []sandbox{used, never, pinged, full} {
		if got := get(t, u, sb.ID); got.Status != "running" {
			t.Errorf("%s: %+v", sb.ID, got)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if tries[used.ID] != 1 || tries[full.ID] != 1 || tries[never.ID] != 0 || tries[pinged.ID] != 0 {
		t.Errorf("tries %v", tries)
	}
	if h.Has(killed.ID) || !h.Has(used.ID) {
		t.Error("the wrong one is gone from the host")
	}
}
