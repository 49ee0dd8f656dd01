package api_test

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type checkpoint struct {
	ID, Name  string
	SandboxID string `json:"sandbox_id"`
	ParentID  string `json:"parent_id"`
	SizeBytes int    `json:"size_bytes"`
	OwnBytes  int    `json:"own_bytes"`
	Memory    bool
	Missing   bool
}

type forked []struct {
	Sandbox *sandbox
	Error   *struct{ Code, Message string }
}

func checkpoints(t *testing.T, u planetest.User, id string) []checkpoint {
	t.Helper()
	var list struct{ Checkpoints []checkpoint }
	u.Do("GET", "/v1/sandboxes/"+id+"/checkpoints", nil).Want(t, 200, &list)
	return list.Checkpoints
}

func save(t *testing.T, u planetest.User, id string, body any) checkpoint {
	t.Helper()
	var c checkpoint
	u.Do("POST", "/v1/sandboxes/"+id+"/checkpoints", body).Want(t, 201, &c)
	return c
}

func TestFork(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	src := create(t, u, map[string]any{"name": "src", "timeout_sec": 600, "auto_resume": true, "metadata": map[string]string{"a": "1", "b": "1"}})
	var asked *agentv1.ForkSandboxRequest
	h.OnFork(func(r *agentv1.ForkSandboxRequest) error { asked = r; return nil })

	var out forked
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 3, "name": "kid", "env": map[string]string{"X": "y"}, "metadata": map[string]string{"b": "2"}}).Want(t, 201, &out)
	if len(out) != 3 {
		t.Fatalf("%d children", len(out))
	}
	for i, c := range out {
		if c.Sandbox == nil {
			t.Fatalf("child %d: %+v", i, c.Error)
		}
		sb := get(t, u, c.Sandbox.ID)
		if sb.Status != "running" || sb.Name != fmt.Sprintf("kid-%d", i+1) || sb.HostID != src.HostID || sb.TimeoutSec != 600 || sb.Metadata["a"] != "1" || sb.Metadata["b"] != "2" || !h.Has(sb.ID) {
			t.Errorf("child %d: %+v", i, sb)
		}
		if c := asked.Children[i]; c.Hostname != sb.Name || c.Env["X"] != "y" || c.OperationId == "" {
			t.Errorf("the host was asked for %v", c)
		}
	}
	if got := get(t, u, src.ID); got.Status != "running" {
		t.Errorf("the source is %s", got.Status)
	}

	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", nil).Want(t, 201, &out)
	if len(out) != 1 || out[0].Sandbox == nil {
		t.Errorf("without a body: %+v", out)
	}
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 101}).WantError(t, 400, "invalid_request")
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 100, "env": map[string]string{"X": strings.Repeat("x", 10_000)}}).WantError(t, 400, "invalid_request")
	p.NewUser().Do("POST", "/v1/sandboxes/"+src.ID+"/fork", nil).WantError(t, 404, "not_found")
}

// What has no room on the source's host is told for each; the others run. One that its host fails is told as well.
func TestForkWithoutRoom(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	h.Heartbeat(map[string]any{"sandboxes_limit": 3})
	u := p.NewUser()
	src := create(t, u, nil)
	var out forked
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 4}).Want(t, 201, &out)
	for i, c := range out {
		if runs := i < 2; runs != (c.Sandbox != nil) || !runs && c.Error.Code != "no_capacity" {
			t.Errorf("child %d: %+v", i, c)
		}
	}
	if h.Len() != 3 {
		t.Errorf("the host has %d sandboxes", h.Len())
	}
	h.Heartbeat(map[string]any{"sandboxes_limit": 0})
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"name": "so-bad"}).Want(t, 201, &out)
	if out[0].Error == nil || out[0].Error.Code != "disk_full" {
		t.Errorf("a child that failed: %+v", out[0])
	}
}

// A fork repeated with its key makes no more children, also when its replica died in the middle.
func TestForkOnce(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	src := create(t, u, nil)
	key := u.Header()
	key.Set("Idempotency-Key", "once")
	var first, second forked
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 3}, key).Want(t, 201, &first)
	// As if the replica had died before it could keep its answer.
	query(t, p, `UPDATE idempotency_keys SET status = 'running', locked_until = now() - interval '1 second', body = NULL RETURNING key`)
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 3}, key).Want(t, 201, &second)
	for i := range first {
		if first[i].Sandbox == nil || second[i].Sandbox == nil || first[i].Sandbox.ID != second[i].Sandbox.ID {
			t.Errorf("child %d: %+v, then %+v", i, first[i].Sandbox, second[i].Sandbox)
		}
	}
	if h.Len() != 4 {
		t.Errorf("the host has %d sandboxes", h.Len())
	}
}

// A control plane that dies in the middle of a fork leaves rows that another settles: as running what the
// host made, as failed what it did not; nothing is made of the template instead.
func TestForkCutOff(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{NoLoops: true})
	h := p.AddHost()
	u := p.NewUser()
	src := create(t, u, nil)
	var out forked
	u.Do("POST", "/v1/sandboxes/"+src.ID+"/fork", map[string]any{"count": 2}).Want(t, 201, &out)
	made, lost := out[0].Sandbox.ID, out[1].Sandbox.ID
	h.Set(lost, nil)
	query(t, p, `UPDATE sandboxes SET status = 'creating', revision = 0, operation_until = now() - interval '1 second' WHERE from_sandbox IS NOT NULL RETURNING id`)
	creates, _ := h.Counts()
	planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	planetest.Eventually(t, "what was made runs", func() bool { return get(t, u, made).Status == "running" })
	planetest.Eventually(t, "what was not has failed", func() bool { return get(t, u, lost).Status == "error" })
	if again, _ := h.Counts(); again != creates {
		t.Error("the host was asked to create a child anew")
	}
}

func TestCheckpoints(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, map[string]any{"vcpus": 2, "memory_mb": 1024})
	path := "/v1/sandboxes/" + sb.ID + "/checkpoints"

	first := save(t, u, sb.ID, map[string]any{"name": "first"})
	if !wrenn.ValidID(wrenn.PrefixCheckpoint, first.ID) || first.Name != "first" || first.ParentID != "" || !first.Memory || first.SizeBytes != 2000 || first.OwnBytes != 1000 || first.SandboxID != sb.ID {
		t.Errorf("checkpoint: %+v", first)
	}
	if a := u.Do("POST", path, map[string]any{"name": "first"}).WantError(t, 409, "already_exists"); a.Detail("field") != "name" {
		t.Errorf("a taken name: %s", a.Body)
	}
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/pause", nil).Want(t, 200, nil)
	second := save(t, u, sb.ID, nil) // of a paused one
	third := save(t, u, sb.ID, nil)
	if second.ParentID != first.ID || third.ParentID != second.ID {
		t.Errorf("parents %q and %q", second.ParentID, third.ParentID)
	}

	// One in the middle goes: what descends from it stays.
	u.Do("DELETE", path+"/"+second.ID, nil).Want(t, 204, nil)
	u.Do("DELETE", path+"/"+second.ID, nil).WantError(t, 404, "not_found")
	list := checkpoints(t, u, sb.ID)
	if len(list) != 2 || list[0].ID != first.ID || list[1].ID != third.ID || list[1].ParentID != first.ID || h.Saved(second.ID) {
		t.Errorf("after a delete: %+v", list)
	}

	// Back, and the state left behind is kept; then without keeping it.
	var back struct {
		Sandbox sandbox
		LeftAs  string `json:"left_as"`
	}
	u.Do("POST", path+"/"+first.ID+"/rollback", nil).Want(t, 200, &back)
	list = checkpoints(t, u, sb.ID)
	if back.Sandbox.ID != sb.ID || back.Sandbox.Status != "running" || len(list) != 3 || list[2].ID != back.LeftAs || list[2].ParentID != third.ID {
		t.Errorf("rollback: %+v, %+v", back, list)
	}
	u.Do("POST", path+"/"+back.LeftAs+"/rollback", map[string]any{"discard": true}).Want(t, 200, &back)
	if got := checkpoints(t, u, sb.ID); len(got) != 3 {
		t.Errorf("after a rollback that discards: %+v", got)
	}
	u.Do("POST", path+"/"+second.ID+"/rollback", nil).WantError(t, 404, "not_found")

	// Another sandbox from one of them: on its host, in its size.
	var asked *agentv1.CreateSandboxRequest
	h.OnCreate(func(_ context.Context, r *agentv1.CreateSandboxRequest) error { asked = r; return nil })
	other := create(t, u, map[string]any{"from": first.ID, "name": "again"})
	if other.VCPUs != 2 || other.MemoryMB != 1024 || other.HostID != sb.HostID || asked.Source.GetCheckpoint().GetCheckpointId() != first.ID || asked.Source.GetCheckpoint().GetSandboxId() != sb.ID {
		t.Errorf("from a checkpoint: %+v, %v", other, asked)
	}
	if a := u.Do("POST", "/v1/sandboxes", map[string]any{"from": first.ID, "memory_mb": 512}).WantError(t, 400, "invalid_request"); a.Detail("field") != "memory_mb" {
		t.Errorf("another size: %s", a.Body)
	}
	u.Do("POST", "/v1/sandboxes", map[string]any{"from": first.ID, "template": "base"}).WantError(t, 400, "invalid_request")
	u.Do("POST", "/v1/sandboxes", map[string]any{"from": second.ID}).WantError(t, 404, "not_found")

	stranger := p.NewUser()
	mine := create(t, stranger, nil)
	for _, r := range [][2]string{
		{"GET", path}, {"POST", path}, {"DELETE", path + "/" + first.ID}, {"POST", path + "/" + first.ID + "/rollback"}, {"GET", "/v1/sandboxes/" + sb.ID + "/storage"},
		{"DELETE", "/v1/sandboxes/" + mine.ID + "/checkpoints/" + first.ID}, {"POST", "/v1/sandboxes/" + mine.ID + "/checkpoints/" + first.ID + "/rollback"},
	} {
		stranger.Do(r[0], r[1], nil).WantError(t, 404, "not_found")
	}
	stranger.Do("POST", "/v1/sandboxes", map[string]any{"from": first.ID}).WantError(t, 404, "not_found")

	var use struct {
		Disk, Memory, Total struct {
			OwnBytes int `json:"own_bytes"`
		}
		Checkpoints []struct{ ID, Name string }
	}
	u.Do("GET", "/v1/sandboxes/"+sb.ID+"/storage", nil).Want(t, 200, &use)
	if use.Disk.OwnBytes != 50 || use.Memory.OwnBytes != 70 || len(use.Checkpoints) != 3 || use.Total.OwnBytes != 3120 {
		t.Errorf("storage: %+v", use)
	}
	u.Do("DELETE", "/v1/sandboxes/"+sb.ID, nil).Want(t, 204, nil)
	if left := query(t, p, `SELECT id FROM checkpoints WHERE deleted_at IS NULL`); len(left) != 0 {
		t.Errorf("checkpoints of a deleted sandbox: %v", left)
	}
}

// A save that its host refuses leaves nothing; whatever a control plane that died left is found out by
// asking the host, and what hosts lose or gain is told or taken over.
func TestCheckpointsAreCompared(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	h.OnSave(func(string) error { return wrenn.Errorf(wrenn.KindDiskFull, "the host's disk is full") })
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/checkpoints", map[string]any{"name": "x"}).WantError(t, 507, "disk_full")
	h.OnSave(nil)
	kept := save(t, u, sb.ID, map[string]any{"name": "x"}) // the name is free again
	never, halfway := save(t, u, sb.ID, nil), save(t, u, sb.ID, nil)
	deleting := save(t, u, sb.ID, nil)
	gained := wrenn.NewID(wrenn.PrefixCheckpoint)

	h.SetCheckpoint(sb.ID, never.ID, nil)
	h.SetCheckpoint(sb.ID, gained, &agentv1.Checkpoint{Id: gained, ParentId: kept.ID, HasMemory: true, CreatedAt: timestamppb.Now()})
	foreign := wrenn.NewID(wrenn.PrefixSandbox)
	unknown := wrenn.NewID(wrenn.PrefixCheckpoint)
	h.SetCheckpoint(foreign, unknown, &agentv1.Checkpoint{Id: unknown, CreatedAt: timestamppb.Now()})
	query(t, p, `UPDATE checkpoints SET status = CASE WHEN id = $1 THEN 'deleting' ELSE 'saving' END, operation_until = now() - interval '1 second' WHERE id = $1 OR id = $2 OR id = $3 RETURNING id`,
		deleting.ID, never.ID, halfway.ID)
	planetest.Eventually(t, "all is settled", func() bool {
		return len(query(t, p, `SELECT id FROM checkpoints WHERE status <> 'ready' AND deleted_at IS NULL`)) == 0
	})
	byID := map[string]checkpoint{}
	for _, c := range checkpoints(t, u, sb.ID) {
		byID[c.ID] = c
	}
	if len(byID) != 3 || byID[kept.ID].Missing || byID[halfway.ID].ID == "" || byID[gained].ParentID != kept.ID {
		t.Errorf("after the comparison: %+v", byID)
	}
	if h.Saved(deleting.ID) || !h.Saved(unknown) {
		t.Error("the host should have the unknown one alone, and not the deleted one")
	}

	h.SetCheckpoint(sb.ID, kept.ID, nil)
	query(t, p, `UPDATE hosts SET moments_compared_at = NULL RETURNING id`)
	planetest.Eventually(t, "the loss is told", func() bool { return checkpoints(t, u, sb.ID)[0].Missing })
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	p.AddHost()
	u := p.NewUser()
	sb := create(t, u, map[string]any{"vcpus": 2, "memory_mb": 1024, "template": "base"})
	for sb.HostID != h.ID { // placement spreads
		sb = create(t, u, map[string]any{"vcpus": 2, "memory_mb": 1024, "template": "base"})
	}
	type snapshot struct {
		ID, Name, Type, Scope, Template string
		HostID                          string `json:"host_id"`
		Memory                          bool
	}
	list := func(u planetest.User, query string) (names []string) {
		var page struct{ Snapshots []snapshot }
		u.Do("GET", "/v1/snapshots"+query, nil).Want(t, 200, &page)
		for _, s := range page.Snapshots {
			names = append(names, s.Name)
		}
		return names
	}
	var snap, plain snapshot
	u.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": sb.ID, "name": "mine"}).Want(t, 201, &snap)
	if !wrenn.ValidID(wrenn.PrefixSnapshot, snap.ID) || snap.Name != "mine" || snap.Type != "snapshot" || snap.Scope != "team" || snap.HostID != h.ID || snap.Template != "base" || !snap.Memory {
		t.Errorf("snapshot: %+v", snap)
	}
	u.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": sb.ID}).Want(t, 201, &plain)
	if plain.Name != plain.ID {
		t.Errorf("without a name: %+v", plain)
	}
	for _, taken := range []string{"mine", "base"} {
		u.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": sb.ID, "name": taken}).WantError(t, 409, "already_exists")
	}
	u.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": sb.ID, "name": "base", "overwrite": true}).WantError(t, 409, "already_exists")
	if got := list(u, "?type=snapshot"); len(got) != 2 {
		t.Errorf("snapshots: %v", got)
	}
	if got := list(u, ""); len(got) != 4 {
		t.Errorf("all: %v", got)
	}

	// Another team sees nothing of it, and may use the name.
	other := p.NewUser()
	if got := list(other, "?type=snapshot"); len(got) != 0 {
		t.Errorf("another team sees %v", got)
	}
	other.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": sb.ID}).WantError(t, 404, "not_found")
	other.Do("DELETE", "/v1/snapshots/mine", nil).WantError(t, 404, "not_found")
	other.Do("POST", "/v1/sandboxes", map[string]any{"template": "mine"}).WantError(t, 400, "invalid_request")
	u.Do("DELETE", "/v1/snapshots/base", nil).WantError(t, 403, "forbidden")

	// Sandboxes made from it are on its host, have its size, and keep it.
	var asked *agentv1.CreateSandboxRequest
	h.OnCreate(func(_ context.Context, r *agentv1.CreateSandboxRequest) error { asked = r; return nil })
	child := create(t, u, map[string]any{"template": "mine"})
	if child.HostID != h.ID || child.VCPUs != 2 || child.MemoryMB != 1024 || child.Template != "mine" || asked.Source.GetSnapshotId() != snap.ID {
		t.Errorf("from a snapshot: %+v, %v", child, asked)
	}
	a := u.Do("DELETE", "/v1/snapshots/mine", nil).WantError(t, 409, "in_use")
	if ids, _ := a.Detail("sandbox_ids").([]any); len(ids) != 1 || ids[0] != child.ID {
		t.Errorf("in use by: %s", a.Body)
	}
	var next snapshot
	u.Do("POST", "/v1/snapshots", map[string]any{"sandbox_id": child.ID, "name": "mine", "overwrite": true}).Want(t, 201, &next)
	if got := list(u, "?type=snapshot"); len(got) != 2 || !h.Saved(snap.ID) || next.ID == snap.ID {
		t.Errorf("after an overwrite: %v, old one kept %v", got, h.Saved(snap.ID))
	}
	u.Do("DELETE", "/v1/sandboxes/"+child.ID, nil).Want(t, 204, nil)
	planetest.Eventually(t, "what was overwritten goes with the last that needed it", func() bool { return !h.Saved(snap.ID) })
	u.Do("DELETE", "/v1/snapshots/mine", nil).Want(t, 204, nil)
	if h.Saved(next.ID) {
		t.Error("the host still has a deleted snapshot")
	}

	// Where its host cannot run it, nobody can.
	h.Heartbeat(map[string]any{"draining": true})
	a = u.Do("POST", "/v1/sandboxes", map[string]any{"template": plain.Name}).WantError(t, 503, "no_capacity")
	if !strings.Contains(string(a.Body), "draining") || a.Detail("host_id") != h.ID {
		t.Errorf("on a draining host: %s", a.Body)
	}
	h.Heartbeat(map[string]any{"versions": map[string]string{"vmm": "2"}, "draining": false})
	a = u.Do("POST", "/v1/sandboxes", map[string]any{"template": plain.Name}).WantError(t, 503, "no_capacity")
	if !strings.Contains(string(a.Body), "qemu version 1, not 2") {
		t.Errorf("on another VMM: %s", a.Body)
	}
	booted := create(t, u, map[string]any{"template": plain.Name, "disk_only": true})
	if booted.HostID != h.ID || !asked.Source.GetDiskOnly() || asked.Source.GetSnapshotId() != plain.ID {
		t.Errorf("of its disk: %+v, %v", booted, asked)
	}
	u.Do("POST", "/v1/sandboxes", map[string]any{"disk_only": true}).WantError(t, 400, "invalid_request")
	query(t, p, `UPDATE hosts SET status = 'offline' WHERE id = $1 RETURNING id`, h.ID)
	a = u.Do("POST", "/v1/sandboxes", map[string]any{"template": plain.Name}).WantError(t, 503, "no_capacity")
	if !strings.Contains(string(a.Body), "cannot be reached") {
		t.Errorf("on a host that is away: %s", a.Body)
	}
}

// Requests into a paused sandbox wake it once, however many there are and whichever replica they reach;
// without auto_resume it stays paused.
func TestAutoResume(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	second := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	h := p.AddHost()
	u := p.NewUser()
	sb, still := create(t, u, map[string]any{"auto_resume": true}), create(t, u, nil)
	for _, id := range []string{sb.ID, still.ID} {
		u.Do("POST", "/v1/sandboxes/"+id+"/pause", map[string]any{"memory": id == sb.ID}).Want(t, 200, nil)
	}
	u.Do("POST", "/v1/sandboxes/"+still.ID+"/exec", map[string]any{"cmd": "true"}).WantError(t, 409, "invalid_state")

	arrived, release := make(chan struct{}), make(chan struct{})
	h.OnResume(func(string) error { close(arrived); <-release; return nil })
	const requests = 50
	var wg sync.WaitGroup
	for i := range requests {
		plane := p
		if i%2 == 1 {
			plane = second
		}
		wg.Go(func() {
			method, path, body := "POST", "/exec", `{"cmd":"echo","args":["hi"]}`
			switch i % 5 {
			case 1:
				method, path, body = "GET", "/files/stat?path=/", ""
			case 2:
				method, path, body = "GET", "/processes", ""
			}
			a, err := plane.Try(context.Background(), method, "/v1/sandboxes/"+sb.ID+path, body, u.Header())
			if err != nil || a.Status != http.StatusOK {
				t.Errorf("%s %s: %d %s, %v", method, path, a.Status, a.Body, err)
			}
		})
	}
	<-arrived
	if got := get(t, u, sb.ID); got.Status != "resuming" {
		t.Errorf("while it is being resumed it is %s", got.Status)
	}
	close(release)
	wg.Wait()
	if h.Resumes() != 1 {
		t.Errorf("it was resumed %d times", h.Resumes())
	}
	if got := get(t, u, sb.ID); got.Status != "running" {
		t.Errorf("then it is %s", got.Status)
	}
}

// A pause, resume or rollback repeated with its key after its replica died is not done again.
func TestChangesOnce(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	c := save(t, u, sb.ID, nil)
	for _, tc := range []struct{ path, status string }{{"/pause", "paused"}, {"/resume", "running"}, {"/checkpoints/" + c.ID + "/rollback", "running"}} {
		key := u.Header()
		key.Set("Idempotency-Key", tc.path)
		u.Do("POST", "/v1/sandboxes/"+sb.ID+tc.path, nil, key).Want(t, 200, nil)
		before, kept := get(t, u, sb.ID), len(checkpoints(t, u, sb.ID))
		query(t, p, `UPDATE idempotency_keys SET status = 'running', locked_until = now() - interval '1 second', body = NULL RETURNING key`)
		u.Do("POST", "/v1/sandboxes/"+sb.ID+tc.path, nil, key).Want(t, 200, nil)
		if now := get(t, u, sb.ID); now.Status != tc.status || now.Revision != before.Revision {
			t.Errorf("%s: %s at revision %d, then %s at %d", tc.path, before.Status, before.Revision, now.Status, now.Revision)
		}
		if again := len(checkpoints(t, u, sb.ID)); again != kept {
			t.Errorf("%s: %d checkpoints, then %d", tc.path, kept, again)
		}
	}
	if h.Resumes() != 1 {
		t.Errorf("resumed %d times", h.Resumes())
	}
}

// A request whose sandbox is paused while it is on its way there is held, and done when the sandbox runs again:
// once, whatever it is. Without auto_resume it is told that the sandbox is paused.
func TestPausedOnTheWay(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb, still := create(t, u, map[string]any{"auto_resume": true}), create(t, u, nil)
	var armed atomic.Bool
	h.OnGuest(func(id string) {
		if armed.CompareAndSwap(true, false) {
			if a, err := p.Try(context.Background(), "POST", "/v1/sandboxes/"+id+"/pause", nil, u.Header()); err != nil || a.Status != 200 {
				t.Errorf("pause: %v %s", err, a.Body)
			}
		}
	})
	path := "/v1/sandboxes/" + sb.ID
	var bg struct{ PID int }
	u.Do("POST", path+"/exec", map[string]any{"cmd": "sleep", "args": []string{"100"}, "background": true}).Want(t, 202, &bg)
	process := path + "/processes/" + strconv.Itoa(bg.PID)
	large := strings.Repeat("0123456789abcdef", 512<<10) // more than may be on its way unread
	first := func(stream string, start message, want string) func() {
		return func() {
			s := dial(t, p, u, path+stream)
			if start.Type != "" {
				s.send(start)
			}
			if m := s.next(); m.Type != want {
				t.Errorf("%s: first comes %+v", stream, m)
			}
			_ = s.conn.CloseNow()
		}
	}
	for _, tc := range []struct {
		name string
		do   func()
	}{
		{"exec", func() {
			var res struct{ Stdout string }
			u.Do("POST", path+"/exec", map[string]any{"cmd": "echo", "args": []string{"hi"}}).Want(t, 200, &res)
			if res.Stdout != "hi\n" {
				t.Errorf("it printed %q", res.Stdout)
			}
		}},
		{"upload", func() { u.Do("PUT", path+"/files?path=large", large).Want(t, 200, nil) }},
		{"empty upload", func() { u.Do("PUT", path+"/files?path=empty", "").Want(t, 200, nil) }},
		{"download", func() {
			if a := u.Do("GET", path+"/files?path=large", nil).Want(t, 200, nil); string(a.Body) != large {
				t.Errorf("%d bytes, want %d", len(a.Body), len(large))
			}
		}},
		{"mkdir", func() { u.Do("POST", path+"/files/mkdir", map[string]any{"path": "dir"}).Want(t, 201, nil) }},
		{"list", func() { u.Do("GET", path+"/files/list?path=dir", nil).Want(t, 200, nil) }},
		{"stat", func() { u.Do("GET", path+"/files/stat?path=dir", nil).Want(t, 200, nil) }},
		{"move", func() {
			u.Do("POST", path+"/files/move", map[string]any{"source": "dir", "destination": "moved"}).Want(t, 200, nil)
		}},
		{"delete", func() { u.Do("DELETE", path+"/files?path=moved", nil).Want(t, 204, nil) }},
		{"processes", func() { u.Do("GET", path+"/processes", nil).Want(t, 200, nil) }},
		{"attach", first("/processes/"+strconv.Itoa(bg.PID)+"/attach", message{}, "start")},
		{"stream", first("/exec/stream", message{Type: "start", Cmd: "true"}, "start")},
		{"terminal", first("/pty", message{Type: "start"}, "start")},
		{"watch", first("/files/watch?path=.", message{}, "start")},
		{"signal", func() { u.Do("POST", process+"/signal", map[string]any{"signal": "KILL"}).Want(t, 204, nil) }},
	} {
		before := h.Resumes()
		armed.Store(true)
		tc.do()
		if n := h.Resumes() - before; n != 1 {
			t.Errorf("%s: resumed %d times", tc.name, n)
		}
	}
	for _, tc := range []struct{ method, path string }{{"GET", "/files?path=large"}, {"GET", "/processes"}, {"PUT", "/files?path=x"}} {
		armed.Store(true)
		u.Do(tc.method, "/v1/sandboxes/"+still.ID+tc.path, nil).WantError(t, 409, "invalid_state")
		u.Do("POST", "/v1/sandboxes/"+still.ID+"/resume", nil).Want(t, 200, nil)
	}
}

// A paused sandbox leaves its vCPUs and memory to others; a resume that finds no room tells what is missing
// and changes nothing. Two that compete for the last room: one gets it.
func TestPausedTakesNoRoom(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	h.Heartbeat(map[string]any{"capacity": map[string]any{"vcpus": 100, "memory_mb": 2 * 512, "disk_mb": 3 * 512}})
	u := p.NewUser()
	a, b := create(t, u, nil), create(t, u, nil)
	for _, sb := range []sandbox{a, b} {
		u.Do("POST", "/v1/sandboxes/"+sb.ID+"/pause", nil).Want(t, 200, nil)
	}
	c := create(t, u, nil)
	var wg sync.WaitGroup
	statuses := make([]int, 2)
	for i, sb := range []sandbox{a, b} {
		wg.Go(func() {
			got, err := p.Try(context.Background(), "POST", "/v1/sandboxes/"+sb.ID+"/resume", nil, u.Header())
			if err != nil {
				t.Error(err)
				return
			}
			statuses[i] = got.Status
			if got.Status != 200 && (got.Code() != "no_capacity" || got.Detail("missing_memory_mb") != 512.0) {
				t.Errorf("no room: %d %s", got.Status, got.Body)
			}
		})
	}
	wg.Wait()
	if statuses[0]+statuses[1] != 200+503 || h.Resumes() != 1 {
		t.Errorf("statuses %v, resumed %d times", statuses, h.Resumes())
	}
	for i, sb := range []sandbox{a, b} {
		want := "paused"
		if statuses[i] == 200 {
			want = "running"
		}
		if got := get(t, u, sb.ID); got.Status != want {
			t.Errorf("one is %s, want %s", got.Status, want)
		}
	}
	u.Do("DELETE", "/v1/sandboxes/"+c.ID, nil).Want(t, 204, nil)
	d := create(t, u, nil) // the third disk
	u.Do("POST", "/v1/sandboxes/"+d.ID+"/pause", nil).Want(t, 200, nil)
	u.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity") // a paused one's disk is taken

	h.Heartbeat(map[string]any{"free_disk_mb": 100})
	full := u.Do("POST", "/v1/sandboxes/"+d.ID+"/resume", nil).WantError(t, 507, "disk_full")
	if full.Detail("free_disk_mb") != 100.0 {
		t.Errorf("a full disk: %s", full.Body)
	}
}

// A change whose answer nobody heard ends as the host says it did.
func TestChangesAreSettled(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	done, undone, failed := create(t, u, nil), create(t, u, nil), create(t, u, nil)
	for _, sb := range []sandbox{done, undone} {
		u.Do("POST", "/v1/sandboxes/"+sb.ID+"/pause", map[string]any{"durable": true}).Want(t, 200, nil)
	}
	if at := query(t, p, `SELECT durable_at::text FROM sandboxes WHERE id = $1`, done.ID); len(at) != 1 || at[0] == "" {
		t.Errorf("durable_at is %v", at)
	}
	query(t, p, `UPDATE sandboxes SET status = CASE WHEN id = $1 THEN 'pausing' ELSE 'resuming' END, revision = revision - 1, operation_until = now() - interval '1 second' WHERE id = $1 OR id = $2 RETURNING id`, done.ID, undone.ID)
	for _, sb := range []sandbox{done, undone} {
		planetest.Eventually(t, "it is paused, as the host says", func() bool { return get(t, u, sb.ID).Status == "paused" })
	}
	// Its host has another hypervisor now; and then the former one too.
	h.Heartbeat(map[string]any{"hypervisors": []map[string]string{{"driver": "firecracker", "vmm_version": "1.9"}}})
	if a := u.Do("POST", "/v1/sandboxes/"+done.ID+"/resume", nil).WantError(t, 503, "no_capacity"); !strings.Contains(string(a.Body), "hypervisor qemu, not firecracker") {
		t.Errorf("on another hypervisor: %s", a.Body)
	}
	u.Do("POST", "/v1/sandboxes/"+undone.ID+"/resume", map[string]any{"disk_only": true}).Want(t, 200, nil)
	h.Heartbeat(map[string]any{"hypervisors": []map[string]string{{"driver": "firecracker", "vmm_version": "1.9"}, {"driver": "qemu", "vmm_version": "1", "cpu_model": "test"}}})
	u.Do("POST", "/v1/sandboxes/"+done.ID+"/resume", nil).Want(t, 200, nil)
	h.OnPause(func(string) error { return wrenn.Errorf(wrenn.KindDiskFull, "the host's disk is full") })
	u.Do("POST", "/v1/sandboxes/"+failed.ID+"/pause", nil).WantError(t, 507, "disk_full")
	if got := get(t, u, failed.ID); got.Status != "running" {
		t.Errorf("after a pause that failed it is %s", got.Status)
	}
	u.Do("POST", "/v1/sandboxes/"+failed.ID+"/exec", map[string]any{"cmd": "true"}).Want(t, 200, nil)
}
