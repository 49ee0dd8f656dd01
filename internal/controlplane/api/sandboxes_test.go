package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

type sandbox struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Status     string            `json:"status"`
	Reason     string            `json:"reason"`
	Template   string            `json:"template"`
	VCPUs      int               `json:"vcpus"`
	MemoryMB   int               `json:"memory_mb"`
	DiskMB     int               `json:"disk_mb"`
	TimeoutSec int               `json:"timeout_sec"`
	OnTimeout  string            `json:"on_timeout"`
	Metadata   map[string]string `json:"metadata"`
	HostID     string            `json:"host_id"`
	HostOnline bool              `json:"host_online"`
	Revision   int               `json:"revision"`
	StartedAt  *time.Time        `json:"started_at"`
	ExpiresAt  *time.Time        `json:"expires_at"`
}

func create(t *testing.T, u planetest.User, body any) sandbox {
	t.Helper()
	var sb sandbox
	u.Do("POST", "/v1/sandboxes", body).Want(t, http.StatusCreated, &sb)
	return sb
}

func get(t *testing.T, u planetest.User, id string) sandbox {
	t.Helper()
	var sb sandbox
	u.Do("GET", "/v1/sandboxes/"+id, nil).Want(t, http.StatusOK, &sb)
	return sb
}

func TestSandboxLife(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()

	var asked *agentv1.CreateSandboxRequest
	h.OnCreate(func(_ context.Context, r *agentv1.CreateSandboxRequest) error { asked = r; return nil })
	sb := create(t, u, map[string]any{
		"template": "base", "name": "build-7", "vcpus": 2, "memory_mb": 1024, "timeout_sec": 60, "on_timeout": "kill",
		"env": map[string]string{"A": "1"}, "metadata": map[string]string{"job": "x=1"},
	})
	if !wrenn.ValidID(wrenn.PrefixSandbox, sb.ID) || sb.Status != "running" || sb.HostID != h.ID || !sb.HostOnline || sb.DiskMB != 2048 || sb.Revision != 2 ||
		sb.Name != "build-7" || sb.TimeoutSec != 60 || sb.OnTimeout != "kill" || sb.Metadata["job"] != "x=1" || sb.StartedAt == nil || sb.ExpiresAt == nil {
		t.Errorf("created: %+v", sb)
	}
	if asked.Vcpus != 2 || asked.MemoryMb != 1024 || asked.DiskMb != 2048 || asked.Env["A"] != "1" || asked.User != "user" || asked.Hostname != "build-7" || asked.OperationId == "" {
		t.Errorf("the host was asked for %v", asked)
	}
	h.OnCreate(nil)

	var plain sandbox
	u.Do("POST", "/v1/sandboxes", nil).Want(t, http.StatusCreated, &plain)
	if plain.Template != "minimal" || plain.VCPUs != 1 || plain.MemoryMB != 512 || plain.DiskMB != 1024 || plain.TimeoutSec != 0 || plain.OnTimeout != "pause" || plain.ExpiresAt != nil {
		t.Errorf("defaults: %+v", plain)
	}

	u.Do("PUT", "/v1/sandboxes/"+plain.ID+"/timeout", map[string]any{"timeout_sec": 500, "on_timeout": "kill"}).Want(t, 200, &plain)
	if plain.TimeoutSec != 500 || plain.OnTimeout != "kill" || plain.ExpiresAt == nil {
		t.Errorf("after timeout: %+v", plain)
	}
	before := *plain.ExpiresAt
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/ping", nil).Want(t, 200, &plain)
	if !plain.ExpiresAt.After(before) {
		t.Errorf("ping moved the end from %v to %v", before, plain.ExpiresAt)
	}
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/resume", nil).WantError(t, http.StatusConflict, "invalid_state")
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/pause", nil).Want(t, 200, &plain)
	if plain.Status != "paused" {
		t.Errorf("after pause: %+v", plain)
	}
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/pause", nil).WantError(t, http.StatusConflict, "invalid_state")
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/exec", map[string]any{"cmd": "true"}).WantError(t, http.StatusConflict, "invalid_state")
	u.Do("POST", "/v1/sandboxes/"+plain.ID+"/resume", map[string]any{"timeout_sec": 900}).Want(t, 200, &plain)
	if plain.Status != "running" || plain.TimeoutSec != 900 {
		t.Errorf("after resume: %+v", plain)
	}

	if a := u.Do("DELETE", "/v1/sandboxes/"+sb.ID, nil); a.Status != http.StatusNoContent {
		t.Fatalf("delete: %d %s", a.Status, a.Body)
	}
	if h.Has(sb.ID) {
		t.Error("the host still has the sandbox")
	}
	u.Do("GET", "/v1/sandboxes/"+sb.ID, nil).WantError(t, 404, "not_found")
	u.Do("DELETE", "/v1/sandboxes/"+sb.ID, nil).WantError(t, 404, "not_found")
	get(t, u, plain.ID)
}

func TestListSandboxes(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	p.AddHost()
	u, other := p.NewUser(), p.NewUser()
	var ids []string
	for i := range 5 {
		sb := create(t, u, map[string]any{"name": fmt.Sprintf("s%d", i), "metadata": map[string]string{"n": fmt.Sprint(i), "all": "yes"}})
		ids = append([]string{sb.ID}, ids...) // newest first
	}
	create(t, other, nil)

	var seen []string
	cursor := ""
	for range 4 {
		var page struct {
			Sandboxes  []sandbox
			NextCursor string `json:"next_cursor"`
		}
		path := "/v1/sandboxes?limit=2"
		if cursor != "" {
			path += "&cursor=" + cursor
		}
		u.Do("GET", path, nil).Want(t, 200, &page)
		for _, sb := range page.Sandboxes {
			seen = append(seen, sb.ID)
		}
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if !slices.Equal(seen, ids) {
		t.Errorf("pages gave %v, want %v", seen, ids)
	}
	for query, want := range map[string]int{
		"":                                  5,
		"name=s3":                           1,
		"metadata=n%3D2":                    1,
		"metadata=all%3Dyes":                5,
		"metadata=all%3Dyes&metadata=n%3D4": 1,
		"metadata=n%3D9":                    0,
		"status=running":                    5,
		"status=error":                      0,
		"template=minimal":                  5,
		"template=base":                     0,
		"host_id=host-" + strings.Repeat("a", 25): 0,
	} {
		var page struct{ Sandboxes []sandbox }
		u.Do("GET", "/v1/sandboxes?"+query, nil).Want(t, 200, &page)
		if len(page.Sandboxes) != want {
			t.Errorf("?%s gave %d sandboxes, want %d", query, len(page.Sandboxes), want)
		}
	}
}

// A tenant sees nothing of another's: every route answers 404 for a foreign sandbox, as for one that does
// not exist.
func TestForeignSandboxIsNotFound(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	p.AddHost()
	owner, stranger := p.NewUser(), p.NewUser()
	sb := create(t, owner, nil)
	id := sb.ID
	requests := []struct {
		method, path string
		body         any
	}{
		{"GET", "", nil}, {"DELETE", "", nil}, {"POST", "/pause", nil}, {"POST", "/resume", nil}, {"POST", "/ping", nil},
		{"PUT", "/timeout", map[string]any{"timeout_sec": 1}},
		{"POST", "/exec", map[string]any{"cmd": "true"}}, {"GET", "/exec/stream", nil}, {"GET", "/pty", nil}, {"GET", "/processes", nil},
		{"POST", "/processes/1/signal", map[string]any{"signal": "TERM"}}, {"GET", "/processes/1/attach", nil},
		{"GET", "/files?path=/etc/passwd", nil}, {"PUT", "/files?path=/tmp/x", "text"}, {"DELETE", "/files?path=/tmp/x", nil},
		{"GET", "/files/list?path=/", nil}, {"GET", "/files/stat?path=/", nil}, {"GET", "/files/watch?path=/", nil},
		{"POST", "/files/mkdir", map[string]any{"path": "/tmp/x"}}, {"POST", "/files/move", map[string]any{"source": "/a", "destination": "/b"}},
	}
	for _, r := range requests {
		for _, id := range []string{id, wrenn.NewID(wrenn.PrefixSandbox), "sb-nonsense"} {
			a := stranger.Do(r.method, "/v1/sandboxes/"+id+r.path, r.body).WantError(t, 404, "not_found")
			if strings.Contains(string(a.Body), owner.TeamID) {
				t.Errorf("%s %s tells of the owner: %s", r.method, r.path, a.Body)
			}
		}
	}
	if got := get(t, owner, id); got.Status != "running" {
		t.Errorf("after the stranger's tries the sandbox is %s", got.Status)
	}
}

func TestCreateRefusals(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	u := p.NewUser()
	u.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity")
	h := p.AddHost()

	a := u.Do("POST", "/v1/sandboxes", map[string]any{"template": "windows"}).WantError(t, 400, "invalid_request")
	if a.Detail("field") != "template" || !strings.Contains(string(a.Body), "minimal") || !strings.Contains(string(a.Body), "base") {
		t.Errorf("unknown template: %s", a.Body)
	}
	a = u.Do("POST", "/v1/sandboxes", map[string]any{"disk_mb": 100}).WantError(t, 400, "invalid_request")
	if a.Detail("field") != "disk_mb" {
		t.Errorf("too small a disk: %s", a.Body)
	}
	a = u.Do("POST", "/v1/sandboxes", map[string]any{"memory_mb": 65536}).WantError(t, 503, "no_capacity")
	if !strings.Contains(string(a.Body), "memory") || a.Header.Get("Retry-After") == "" {
		t.Errorf("no room: %s", a.Body)
	}
	h.Heartbeat(map[string]any{"draining": true})
	u.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity")
	if h.Len() != 0 {
		t.Errorf("refused creates made %d sandboxes", h.Len())
	}
	var page struct{ Sandboxes []sandbox }
	u.Do("GET", "/v1/sandboxes", nil).Want(t, 200, &page)
	if len(page.Sandboxes) != 0 {
		t.Errorf("refused creates left %+v", page.Sandboxes)
	}
}

// Two replicas never promise more of a host than it has.
func TestNoOversubscription(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	second := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	h := p.AddHost()
	h.Heartbeat(map[string]any{"capacity": map[string]any{"vcpus": 100, "memory_mb": 10 * 512, "disk_mb": 100000}})
	u := p.NewUser()
	var mu sync.Mutex
	got := map[int]int{}
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			plane := p
			if i%2 == 1 {
				plane = second
			}
			a, err := plane.Try(context.Background(), "POST", "/v1/sandboxes", "{}", u.Header())
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			got[a.Status]++
		})
	}
	wg.Wait()
	if got[201] != 10 || got[503] != 30 {
		t.Errorf("statuses %v, want 10 × 201 and 30 × 503", got)
	}
	if h.Len() != 10 {
		t.Errorf("the host has %d sandboxes", h.Len())
	}
}

// A create that its host refuses leaves an `error` with the reason, which holds no room and can be deleted.
func TestCreateFailsOnHost(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	h.Heartbeat(map[string]any{"sandboxes_limit": 1})
	u := p.NewUser()
	h.OnCreate(func(context.Context, *agentv1.CreateSandboxRequest) error {
		return wrenn.Wrap(fmt.Errorf("open /var/lib/wrenn/secret: no space"), wrenn.KindDiskFull, "the host's disk is full")
	})
	a := u.Do("POST", "/v1/sandboxes", nil).WantError(t, 507, "disk_full")
	if strings.Contains(string(a.Body), "/var/lib") {
		t.Errorf("the answer shows the host's insides: %s", a.Body)
	}
	id, _ := a.Detail("sandbox_id").(string)
	sb := get(t, u, id)
	if sb.Status != "error" || sb.Reason != "the host's disk is full" {
		t.Errorf("left behind: %+v", sb)
	}
	if _, deletes := h.Counts(); deletes == 0 {
		t.Error("the host was not asked to remove what may be left")
	}
	h.OnCreate(nil)
	create(t, u, nil) // the only place is free again
	u.Do("DELETE", "/v1/sandboxes/"+id, nil).Want(t, http.StatusNoContent, nil)
	u.Do("GET", "/v1/sandboxes/"+id, nil).WantError(t, 404, "not_found")
}

// A client that goes away in the middle of a create cancels nothing.
func TestClientLeavesDuringCreate(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	entered, proceed := make(chan string, 1), make(chan struct{})
	h.OnCreate(func(ctx context.Context, r *agentv1.CreateSandboxRequest) error {
		entered <- r.Id
		select {
		case <-proceed:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	ctx, leave := context.WithCancel(context.Background())
	gone := make(chan error, 1)
	go func() {
		_, err := p.Try(ctx, "POST", "/v1/sandboxes", "{}", u.Header())
		gone <- err
	}()
	id := <-entered
	leave()
	if err := <-gone; err == nil {
		t.Fatal("the client did not leave")
	}
	close(proceed)
	planetest.Eventually(t, "the sandbox runs", func() bool { return get(t, u, id).Status == "running" })
}

// An agent that restarts in the middle is asked again, and makes one sandbox.
func TestAgentRestartsDuringCreate(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Times: nil})
	h := p.AddHost()
	u := p.NewUser()
	var once sync.Once
	stopped := make(chan struct{})
	h.OnCreate(func(ctx context.Context, _ *agentv1.CreateSandboxRequest) error {
		first := false
		once.Do(func() { first = true })
		if first {
			close(stopped)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	go func() {
		<-stopped
		h.Stop()
		h.Restart()
	}()
	sb := create(t, u, nil)
	if sb.Status != "running" || h.Len() != 1 {
		t.Errorf("%+v on a host with %d", sb, h.Len())
	}
}

// What a replica that died left in `creating` or `deleting`, another finishes.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	doomed := planetest.Start(t, planetest.Options{DatabaseURL: p.Database, NoLoops: true})
	gone := create(t, u, nil)

	entered := make(chan string, 2)
	hold := make(chan struct{})
	h.OnCreate(func(_ context.Context, r *agentv1.CreateSandboxRequest) error {
		entered <- r.Id
		<-hold
		return nil
	})
	h.OnDelete(func(_ context.Context, id string) error {
		entered <- id
		<-hold
		return nil
	})
	go func() { _, _ = doomed.Try(context.Background(), "POST", "/v1/sandboxes", "{}", u.Header()) }()
	id := <-entered
	go func() { _, _ = doomed.Try(context.Background(), "DELETE", "/v1/sandboxes/"+gone.ID, nil, u.Header()) }()
	<-entered
	doomed.Store.Close() // from here on it can write nothing: as good as dead
	h.OnCreate(nil)
	h.OnDelete(nil)
	planetest.Eventually(t, "the create was finished", func() bool { return get(t, u, id).Status == "running" })
	planetest.Eventually(t, "the delete was finished", func() bool { return u.Do("GET", "/v1/sandboxes/"+gone.ID, nil).Status == 404 })
	close(hold)
	if h.Has(gone.ID) || !h.Has(id) {
		t.Errorf("the host has %v %v", h.Has(gone.ID), h.Has(id))
	}
}

// A host that cannot be reached keeps its sandboxes' state; a delete then waits for it.
func TestUnreachableHost(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Times: nil})
	h := p.AddHost()
	u := p.NewUser()
	stays, goes := create(t, u, nil), create(t, u, nil)
	if _, err := p.Store.MarkSilentHostsOffline(t.Context(), -time.Hour); err != nil {
		t.Fatal(err)
	}
	h.Stop()
	if sb := get(t, u, stays.ID); sb.Status != "running" || sb.HostOnline {
		t.Errorf("on an offline host: %+v", sb)
	}
	u.Do("POST", "/v1/sandboxes/"+stays.ID+"/exec", map[string]any{"cmd": "true"}).WantError(t, 503, "host_unavailable")
	var sb sandbox
	u.Do("DELETE", "/v1/sandboxes/"+goes.ID, nil).Want(t, http.StatusAccepted, &sb)
	if sb.Status != "deleting" {
		t.Errorf("to be deleted: %+v", sb)
	}
	h.Restart()
	h.Heartbeat(nil)
	planetest.Eventually(t, "the delete is done", func() bool { return u.Do("GET", "/v1/sandboxes/"+goes.ID, nil).Status == 404 })
	if h.Has(goes.ID) || !h.Has(stays.ID) {
		t.Error("the wrong sandbox went")
	}
	if sb := get(t, u, stays.ID); sb.Status != "running" || !sb.HostOnline {
		t.Errorf("on a host that is back: %+v", sb)
	}
}

func TestReportsOfHosts(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	lost, moved, deleted := create(t, u, nil), create(t, u, nil), create(t, u, nil)
	u.Do("DELETE", "/v1/sandboxes/"+deleted.ID, nil).Want(t, 204, nil)

	h.Set(lost.ID, nil)
	paused := &agentv1.Sandbox{Id: moved.ID, State: agentv1.SandboxState_SANDBOX_STATE_PAUSED, Revision: 7, Reason: "the VM's process ended"}
	h.Set(moved.ID, paused)
	h.Set(deleted.ID, &agentv1.Sandbox{Id: deleted.ID, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 9})
	stranger := wrenn.NewID(wrenn.PrefixSandbox)
	h.Set(stranger, &agentv1.Sandbox{Id: stranger, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 3})
	h.Heartbeat(nil)

	planetest.Eventually(t, "a newer report is applied", func() bool { return get(t, u, moved.ID).Status == "paused" })
	if sb := get(t, u, moved.ID); sb.Revision != 7 || sb.Reason != "the VM's process ended" {
		t.Errorf("reported: %+v", sb)
	}
	planetest.Eventually(t, "a sandbox that is not reported says so", func() bool { return get(t, u, lost.ID).Reason != "" })
	if sb := get(t, u, lost.ID); sb.Status != "running" {
		t.Errorf("a sandbox that is not reported became %s", sb.Status)
	}
	planetest.Eventually(t, "a deleted one is removed", func() bool { return !h.Has(deleted.ID) })
	planetest.Eventually(t, "the unknown one is told", func() bool { return strings.Contains(p.Log.String(), stranger) })
	if !h.Has(stranger) {
		t.Error("an unknown sandbox was removed")
	}

	// An older report changes nothing, and the lost one comes back.
	h.Set(moved.ID, &agentv1.Sandbox{Id: moved.ID, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 5})
	h.Set(lost.ID, &agentv1.Sandbox{Id: lost.ID, State: agentv1.SandboxState_SANDBOX_STATE_RUNNING, Revision: 2})
	h.Heartbeat(nil)
	planetest.Eventually(t, "the lost one is back", func() bool { return get(t, u, lost.ID).Reason == "" })
	if sb := get(t, u, moved.ID); sb.Status != "paused" {
		t.Errorf("an older report made it %s", sb.Status)
	}
	h.Set(stranger, nil)
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	second := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	h := p.AddHost()
	u := p.NewUser()
	key := http.Header{"Idempotency-Key": {"one of a kind"}}
	var mu sync.Mutex
	bodies := map[string]int{}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			plane := p
			if i%2 == 1 {
				plane = second
			}
			a, err := plane.Try(context.Background(), "POST", "/v1/sandboxes", `{"name":"once"}`, u.Header(), key)
			if err != nil || a.Status != 201 {
				t.Errorf("%v %d %s", err, a.Status, a.Body)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			bodies[string(a.Body)]++
		})
	}
	wg.Wait()
	if creates, _ := h.Counts(); creates != 1 || len(bodies) != 1 {
		t.Errorf("50 requests with one key made %d sandboxes and %d different answers", creates, len(bodies))
	}
	u.Do("POST", "/v1/sandboxes", `{"name":"other"}`, key).WantError(t, 409, "conflict")
	p.NewUser().Do("POST", "/v1/sandboxes", `{"name":"other"}`, key).Want(t, 201, nil) // keys are each actor's own

	// A failure is not kept: the same request may succeed later.
	h.OnCreate(func(context.Context, *agentv1.CreateSandboxRequest) error {
		return wrenn.Errorf(wrenn.KindDiskFull, "full")
	})
	again := http.Header{"Idempotency-Key": {"again"}}
	u.Do("POST", "/v1/sandboxes", "{}", again).WantError(t, 507, "disk_full")
	h.OnCreate(nil)
	u.Do("POST", "/v1/sandboxes", "{}", again).Want(t, 201, nil)

	// A secret that is shown once is kept sealed, and shown again only to who has the key.
	first := u.Do("POST", "/v1/api-keys", `{"name":"k"}`, key2()).Want(t, 201, nil)
	repeat := u.Do("POST", "/v1/api-keys", `{"name":"k"}`, key2()).Want(t, 201, nil)
	if string(first.Body) != string(repeat.Body) || repeat.Header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("repeated: %s, first %s", repeat.Body, first.Body)
	}
	var made struct{ Key string }
	if err := json.Unmarshal(first.Body, &made); err != nil {
		t.Fatal(err)
	}
	if dump := dumpKeys(t, p); strings.Contains(dump, made.Key) {
		t.Error("the answer is kept in the open")
	}
}

func key2() http.Header { return http.Header{"Idempotency-Key": {"key for a key"}} }
