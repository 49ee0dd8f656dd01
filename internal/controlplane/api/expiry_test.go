package api_test

import (
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// seldomCompared keeps hosts' reports of activity from undoing what a test writes into rows.
func seldomCompared(t *fleet.Times) { t.ReconcileEvery = time.Hour }

// What is idle for its timeout meets what its owner chose; what its host says is in use, or has no
// timeout, or was pinged, goes on; what cannot be paused keeps running and is not tried without end.
func TestTimeouts(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Times: seldomCompared})
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
	h.Idle()
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

// A control plane that dies after the host paused what is to be killed leaves that to the next one.
func TestKillOutlivesItsControlPlane(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{NoLoops: true})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, map[string]any{"timeout_sec": 3600, "on_timeout": "kill"})
	hook, entered, proceed := blocked()
	h.OnPause(func(string) error { hook(); return nil })
	h.Idle()
	query(t, p, `UPDATE sandboxes SET last_active_at = now() - interval '3601 seconds' WHERE id = $1 RETURNING id`, sb.ID)
	doomed := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	<-entered
	go doomed.Store.Close() // waits for its leader's connections; from now on it gives no others
	planetest.Eventually(t, "the control plane is as good as dead", func() bool { return doomed.Store.Ping(t.Context()) != nil })
	h.OnPause(nil)
	close(proceed)
	planetest.Eventually(t, "the host has paused it", func() bool { return h.State(sb.ID) == agentv1.SandboxState_SANDBOX_STATE_PAUSED })
	doomed.Stop()
	if get(t, u, sb.ID).Status == "deleting" || !h.Has(sb.ID) {
		t.Fatal("it was deleted before its control plane died: the test shows nothing")
	}
	planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	planetest.Eventually(t, "it is deleted", func() bool { return u.Do("GET", "/v1/sandboxes/"+sb.ID, nil).Status == 404 })
	if h.Has(sb.ID) {
		t.Error("the host still has it")
	}
}

// An intent to kill ends with what its host says: it is in use, or somebody else paused it; and with the
// owner's change of mind.
func TestKillIsCalledOff(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	kill := map[string]any{"timeout_sec": 3600, "on_timeout": "kill"}
	used, paused, changed := create(t, u, kill), create(t, u, kill), create(t, u, kill)
	h.Set(used.ID, &agentv1.Sandbox{Id: used.ID, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 2, Active: true})
	u.Do("POST", "/v1/sandboxes/"+paused.ID+"/pause", nil).Want(t, 200, nil)
	if _, err := p.Store.MarkSilentHostsOffline(t.Context(), -time.Hour); err != nil { // nothing expires meanwhile
		t.Fatal(err)
	}
	query(t, p, `UPDATE sandboxes SET kill_operation_id = 'op-of-one-that-died' WHERE id <> $1 RETURNING id`, "")
	u.Do("PUT", "/v1/sandboxes/"+changed.ID+"/timeout", map[string]any{"timeout_sec": 3600}).Want(t, 200, nil)
	h.Heartbeat(nil)
	planetest.Eventually(t, "no intent is left", func() bool {
		return len(query(t, p, `SELECT id FROM sandboxes WHERE kill_operation_id IS NOT NULL OR id = $1`, "")) == 0
	})
	for sb, want := range map[string]string{used.ID: "running", paused.ID: "paused", changed.ID: "running"} {
		if got := get(t, u, sb); got.Status != want {
			t.Errorf("it is %s, want %s", got.Status, want)
		}
	}
}

// A ping counts on the host too, which decides whether a sandbox is idle.
func TestPingReachesTheHost(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Times: seldomCompared})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, map[string]any{"timeout_sec": 3600})
	asked := make(chan struct{}, 16)
	h.OnPause(func(string) error { asked <- struct{}{}; return nil })
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/ping", nil).Want(t, 200, nil)
	h.Idle()
	query(t, p, `UPDATE sandboxes SET last_active_at = now() - interval '3601 seconds' WHERE id = $1 RETURNING id`, sb.ID)
	<-asked
	planetest.Eventually(t, "the row learns of the ping", func() bool {
		at := get(t, u, sb.ID).ExpiresAt // none while its host is asked to pause it
		return at != nil && at.After(time.Now())
	})
	if got := get(t, u, sb.ID); got.Status != "running" {
		t.Errorf("after a ping it is %s", got.Status)
	}
	h.Stop() // a ping of a sandbox whose host does not answer is noted all the same
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/ping", nil).Want(t, 200, nil)
}
