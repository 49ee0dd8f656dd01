package api_test

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
)

// blocked makes a hook that says when it was entered and waits until it may go on.
func blocked() (hook func(), entered <-chan struct{}, proceed chan struct{}) {
	in, out := make(chan struct{}, 16), make(chan struct{})
	return func() { in <- struct{}{}; <-out }, in, out
}

// A sandbox that is being created can be deleted: nothing of it is left, whichever of the two its host
// hears of first, and who waits for it hears why it does not come.
func TestDeleteWhileCreating(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	hook, entered, proceed := blocked()
	id := ""
	h.OnCreate(func(_ context.Context, r *agentv1.CreateSandboxRequest) error { id = r.Id; hook(); return nil })
	created := make(chan planetest.Answer, 1)
	go func() {
		a, err := p.Try(context.Background(), "POST", "/v1/sandboxes", "{}", u.Header())
		if err != nil {
			t.Error(err)
		}
		created <- a
	}()
	<-entered
	u.Do("DELETE", "/v1/sandboxes/"+id, nil).Want(t, http.StatusNoContent, nil)
	u.Do("GET", "/v1/sandboxes/"+id, nil).WantError(t, 404, "not_found")
	close(proceed)
	a := <-created
	a.WantError(t, 409, "conflict")
	if !strings.Contains(string(a.Body), "deleted") {
		t.Errorf("the create was answered %s", a.Body)
	}
	planetest.Eventually(t, "the host has nothing of it", func() bool { return h.Len() == 0 })
}

// What a pause or resume that was under way says of itself does not bring a deleted sandbox back.
func TestDeleteWhilePausing(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	hook, entered, proceed := blocked()
	h.OnPause(func(string) error { hook(); return nil })
	deleteHook, deleting, mayDelete := blocked()
	h.OnDelete(func(context.Context, string) error { deleteHook(); return nil })
	var calls sync.WaitGroup
	calls.Go(func() { _, _ = p.Try(context.Background(), "POST", "/v1/sandboxes/"+sb.ID+"/pause", nil, u.Header()) })
	<-entered
	deleted := make(chan planetest.Answer, 1)
	go func() {
		a, err := p.Try(context.Background(), "DELETE", "/v1/sandboxes/"+sb.ID, nil, u.Header())
		if err != nil {
			t.Error(err)
		}
		deleted <- a
	}()
	<-deleting // the host lets it wait for the pause
	close(proceed)
	calls.Wait()
	close(mayDelete)
	if a := <-deleted; a.Status != http.StatusNoContent {
		t.Errorf("delete: %d %s", a.Status, a.Body)
	}
	u.Do("GET", "/v1/sandboxes/"+sb.ID, nil).WantError(t, 404, "not_found")
	if h.Has(sb.ID) {
		t.Error("the host still has it")
	}
}

// The state that a host reports of a sandbox in between is no reason to refuse its deletion.
func TestDeleteInEveryState(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	for status, state := range map[string]agentv1.SandboxState{
		"pausing":  agentv1.SandboxState_SANDBOX_STATE_PAUSING,
		"paused":   agentv1.SandboxState_SANDBOX_STATE_PAUSED,
		"resuming": agentv1.SandboxState_SANDBOX_STATE_RESUMING,
	} {
		sb := create(t, u, nil)
		if status == "resuming" {
			u.Do("POST", "/v1/sandboxes/"+sb.ID+"/pause", nil).Want(t, 200, nil)
		}
		h.Set(sb.ID, &agentv1.Sandbox{Id: sb.ID, State: state, Revision: 9})
		h.Heartbeat(nil)
		planetest.Eventually(t, "the report is applied", func() bool { return get(t, u, sb.ID).Status == status })
		u.Do("DELETE", "/v1/sandboxes/"+sb.ID, nil).Want(t, http.StatusNoContent, nil)
		u.Do("GET", "/v1/sandboxes/"+sb.ID, nil).WantError(t, 404, "not_found")
	}
}

// Who loses the race for a host's last room hears what is missing there, not that there is no host.
func TestLosersHearWhatIsMissing(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	h.Heartbeat(map[string]any{"capacity": map[string]any{"vcpus": 1, "memory_mb": 4096, "disk_mb": 100000}})
	u := p.NewUser()
	answers := make(chan planetest.Answer, 12)
	for range cap(answers) {
		go func() {
			a, err := p.Try(context.Background(), "POST", "/v1/sandboxes", "{}", u.Header())
			if err != nil {
				t.Error(err)
			}
			answers <- a
		}()
	}
	for range cap(answers) {
		a := <-answers
		if a.Status == http.StatusCreated {
			continue
		}
		a.WantError(t, 503, "no_capacity")
		if !strings.Contains(string(a.Body), "1 × not enough vCPUs") {
			t.Errorf("a loser hears %s", a.Body)
		}
	}
}
