package api_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"

	"github.com/redis/go-redis/v9"
)

type hostJSON struct {
	ID, Type, Status, Arch, Address, Provider string
	TeamID                                    string `json:"team_id"`
	Zone                                      string `json:"availability_zone"`
	CPUCores                                  int    `json:"cpu_cores"`
	MemoryMB                                  int    `json:"memory_mb"`
	DiskGB                                    int    `json:"disk_gb"`
	CreatedBy                                 string `json:"created_by"`
	MTLS                                      bool   `json:"mtls_enabled"`
	Sandboxes                                 int
	LastHeartbeatAt                           *time.Time `json:"last_heartbeat_at"`
}

type newHost struct {
	Host  hostJSON
	Token string `json:"registration_token"`
}

func registration(token string) map[string]any {
	return map[string]any{"token": token, "arch": "amd64", "cpu_cores": 4, "memory_mb": 8192, "disk_gb": 50, "address": "10.0.1.5:50051"}
}

func hostToken(token string) http.Header { return http.Header{"X-Host-Token": {token}} }

// The founding text's flow, literally.
func TestHostFlow(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})

	var made newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular", "provider": "hetzner", "availability_zone": "fsn1"}).Want(t, 201, &made)
	if !wrenn.ValidID(wrenn.PrefixHost, made.Host.ID) || made.Host.Status != "pending" || made.Host.Provider != "hetzner" || made.Host.Zone != "fsn1" ||
		made.Host.CreatedBy != p.Admin.ID || !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(made.Token) {
		t.Fatalf("made: %+v", made)
	}
	id := made.Host.ID
	if ttl := redisClient(t).TTL(t.Context(), "wrenn:host-token:"+hex.EncodeToString(auth.HashRegistrationToken(made.Token))).Val(); ttl <= 59*time.Minute || ttl > time.Hour {
		t.Errorf("the token lives for %s in Redis", ttl)
	}

	// A failed registration: a new token, and the old one is dead.
	var again newHost
	p.Admin.Do("POST", "/v1/hosts/"+id+"/token", nil).Want(t, 201, &again)
	if again.Token == made.Token || again.Host.ID != id {
		t.Errorf("regenerated: %+v", again)
	}
	p.Do("POST", "/v1/hosts/register", registration(made.Token)).WantError(t, 401, "unauthorized")

	// What is refused before the token is looked at does not cost it.
	bad := registration(again.Token)
	bad["address"] = "0.0.0.0:50051"
	p.Do("POST", "/v1/hosts/register", bad).WantError(t, 400, "invalid_request")
	bad["address"], bad["csr_pem"] = "10.0.1.5:50051", "-----BEGIN NONSENSE-----"
	p.Do("POST", "/v1/hosts/register", bad).WantError(t, 400, "invalid_request")

	_, csr, err := rpc.NewHostRequest()
	if err != nil {
		t.Fatal(err)
	}
	body := registration(again.Token)
	body["csr_pem"], body["a_field_of_the_future"] = string(csr), map[string]any{"x": 1}
	var reg struct {
		Host   hostJSON
		Token  string
		Cert   string `json:"cert_pem"`
		CACert string `json:"ca_cert_pem"`
	}
	p.Do("POST", "/v1/hosts/register", body).Want(t, 201, &reg)
	if reg.Host.Status != "online" || reg.Host.Arch != "amd64" || reg.Host.CPUCores != 4 || reg.Host.MemoryMB != 8192 || reg.Host.DiskGB != 50 ||
		reg.Host.Address != "10.0.1.5:50051" || !reg.Host.MTLS {
		t.Errorf("registered: %+v", reg.Host)
	}
	checkCert(t, reg.Cert, reg.CACert, id)
	p.Do("POST", "/v1/hosts/register", body).WantError(t, 401, "unauthorized") // used
	p.Admin.Do("POST", "/v1/hosts/"+id+"/token", nil).WantError(t, 409, "invalid_state")

	beat := "/v1/hosts/" + id + "/heartbeat"
	p.Do("POST", beat, `{"of_the_future":1}`, hostToken(reg.Token)).Want(t, 204, nil)
	p.Do("POST", beat, map[string]any{"specs": map[string]any{"arch": "arm64", "cpu_cores": 64, "memory_mb": 1000, "disk_gb": 7}}, hostToken(reg.Token)).Want(t, 204, nil)
	var got hostJSON
	p.Admin.Do("GET", "/v1/hosts/"+id, nil).Want(t, 200, &got)
	if got.Arch != "arm64" || got.CPUCores != 64 || got.MemoryMB != 1000 || got.DiskGB != 7 || got.LastHeartbeatAt == nil {
		t.Errorf("after new specs: %+v", got)
	}
	p.Do("POST", "/v1/hosts/"+wrenn.NewID(wrenn.PrefixHost)+"/heartbeat", "{}", hostToken(reg.Token)).WantError(t, 403, "forbidden")
	p.Do("POST", beat, "{}").WantError(t, 401, "unauthorized")
	p.Do("POST", beat, "{}", hostToken(p.Admin.Token)).WantError(t, 401, "unauthorized")
	p.Do("GET", "/v1/me", nil, http.Header{"Authorization": {"Bearer " + reg.Token}}).WantError(t, 401, "unauthorized")
	p.Do("GET", "/v1/sandboxes", nil, http.Header{"Authorization": {"Bearer " + reg.Token}}).WantError(t, 401, "unauthorized")

	p.Admin.Do("DELETE", "/v1/hosts/"+id, nil).Want(t, 204, nil)
	p.Do("POST", beat, "{}", hostToken(reg.Token)).WantError(t, 401, "unauthorized")
	p.Admin.Do("GET", "/v1/hosts/"+id, nil).WantError(t, 404, "not_found")
	p.Admin.Do("DELETE", "/v1/hosts/"+id, nil).WantError(t, 404, "not_found")

	trail := query(t, p, `SELECT action || ' ' || actor_type FROM audit_log WHERE subject = $1 ORDER BY id`, id)
	if want := []string{"host.create user", "host.token user", "host.register host", "host.delete user"}; !slices.Equal(trail, want) {
		t.Errorf("audit trail %v, want %v", trail, want)
	}
	tokens := query(t, p, `SELECT status FROM host_tokens WHERE host_id = $1 ORDER BY created_at`, id)
	if want := []string{"superseded", "used"}; !slices.Equal(tokens, want) {
		t.Errorf("tokens %v, want %v", tokens, want)
	}
	for _, secret := range []string{made.Token, again.Token, reg.Token} {
		if strings.Contains(p.Log.String(), secret) {
			t.Error("a token is in the log")
		}
	}
}

func redisClient(t *testing.T) *redis.Client {
	t.Helper()
	opt, err := redis.ParseURL(storetest.Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(opt)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func checkCert(t *testing.T, certPEM, caPEM, hostID string) {
	t.Helper()
	block, _ := pem.Decode([]byte(certPEM))
	if block == nil {
		t.Fatalf("no certificate: %q", certPEM)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(caPEM))
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: hostID}); err != nil {
		t.Error(err)
	}
}

func TestRegisterRace(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	second := planetest.Start(t, planetest.Options{DatabaseURL: p.Database})
	var made newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &made)
	var mu sync.Mutex
	statuses := map[int]int{}
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			plane := p
			if i%2 == 1 {
				plane = second
			}
			<-start
			a, err := plane.Try(context.Background(), "POST", "/v1/hosts/register", registration(made.Token))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[a.Status]++
		})
	}
	close(start)
	wg.Wait()
	if statuses[201] != 1 || statuses[401] != 199 {
		t.Errorf("200 registrations with one token: %v, want one 201 and 199 × 401", statuses)
	}
}

// The row is the second guard: even if Redis gave a token twice, or kept it too long, nobody registers
// with it.
func TestTokenThatRedisGivesAgain(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	var used, expired newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &used)
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &expired)
	p.Do("POST", "/v1/hosts/register", registration(used.Token)).Want(t, 201, nil)
	query(t, p, `UPDATE host_tokens SET expires_at = now() - interval '1 second' WHERE host_id = $1 RETURNING id`, expired.Host.ID)
	for _, h := range []newHost{used, expired} {
		if err := p.Redis.PutHostToken(t.Context(), auth.HashRegistrationToken(h.Token), h.Host.ID, time.Minute); err != nil {
			t.Fatal(err)
		}
		p.Do("POST", "/v1/hosts/register", registration(h.Token)).WantError(t, 401, "unauthorized")
	}
	var got hostJSON
	p.Admin.Do("GET", "/v1/hosts/"+expired.Host.ID, nil).Want(t, 200, &got)
	if got.Status != "pending" {
		t.Errorf("an expired token made the host %s", got.Status)
	}
	p.Admin.Do("POST", "/v1/hosts/"+expired.Host.ID+"/token", nil).Want(t, 201, &expired)
	p.Do("POST", "/v1/hosts/register", registration(expired.Token)).Want(t, 201, nil)
}

func TestWhoMayDoWhatWithHosts(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	owner, stranger := p.NewUser(), p.NewUser()
	member := p.NewUser()
	query(t, p, `UPDATE memberships SET role = 'member' WHERE user_id = $1 RETURNING team_id`, member.ID)

	owner.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).WantError(t, 403, "forbidden")
	owner.Do("POST", "/v1/hosts", map[string]any{"type": "byoc", "team_id": stranger.TeamID}).WantError(t, 403, "forbidden")
	member.Do("POST", "/v1/hosts", map[string]any{"type": "byoc"}).WantError(t, 403, "forbidden")
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular", "team_id": owner.TeamID}).WantError(t, 400, "invalid_request")
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "byoc", "team_id": wrenn.NewID(wrenn.PrefixTeam)}).WantError(t, 400, "invalid_request")

	var regular, own, given newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &regular)
	owner.Do("POST", "/v1/hosts", map[string]any{"type": "byoc"}).Want(t, 201, &own)
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "byoc", "team_id": owner.TeamID}).Want(t, 201, &given)
	if own.Host.TeamID != owner.TeamID || given.Host.TeamID != owner.TeamID || regular.Host.TeamID != "" {
		t.Errorf("teams %q %q %q", own.Host.TeamID, given.Host.TeamID, regular.Host.TeamID)
	}
	for _, u := range []planetest.User{owner, stranger} {
		for _, r := range []struct {
			method, path string
			body         any
		}{
			{"GET", "", nil}, {"DELETE", "", nil}, {"POST", "/token", nil}, {"GET", "/tags", nil}, {"POST", "/tags", map[string]any{"tag": "x"}}, {"DELETE", "/tags/x", nil},
		} {
			u.Do(r.method, "/v1/hosts/"+regular.Host.ID+r.path, r.body).WantError(t, 404, "not_found")
			stranger.Do(r.method, "/v1/hosts/"+own.Host.ID+r.path, r.body).WantError(t, 404, "not_found")
		}
	}
	for u, want := range map[planetest.User]int{owner: 2, stranger: 0, p.Admin: 3} {
		var list struct{ Hosts []hostJSON }
		u.Do("GET", "/v1/hosts", nil).Want(t, 200, &list)
		if len(list.Hosts) != want {
			t.Errorf("sees %d hosts, want %d", len(list.Hosts), want)
		}
	}
	member.Do("GET", "/v1/hosts", nil).WantError(t, 403, "forbidden")
	owner.Do("POST", "/v1/hosts/"+given.Host.ID+"/token", nil).Want(t, 201, nil)
	owner.Do("DELETE", "/v1/hosts/"+given.Host.ID, nil).Want(t, 204, nil)

	var key struct{ Key string }
	owner.Do("POST", "/v1/api-keys", map[string]any{"name": "k"}).Want(t, 201, &key)
	p.Do("GET", "/v1/hosts", nil, http.Header{"X-Api-Key": {key.Key}}).WantError(t, 403, "forbidden")
}

func TestHostTags(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	var made newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &made)
	path := "/v1/hosts/" + made.Host.ID + "/tags"
	for _, tag := range []string{"gpu", "zone:a", "gpu"} {
		p.Admin.Do("POST", path, map[string]any{"tag": tag}).Want(t, 204, nil)
	}
	var tags struct{ Tags []string }
	p.Admin.Do("GET", path, nil).Want(t, 200, &tags)
	if !slices.Equal(tags.Tags, []string{"gpu", "zone:a"}) {
		t.Errorf("tags %v", tags.Tags)
	}
	var list struct{ Hosts []hostJSON }
	p.Admin.Do("GET", "/v1/hosts?tag=gpu", nil).Want(t, 200, &list)
	if len(list.Hosts) != 1 {
		t.Errorf("%d hosts with the tag", len(list.Hosts))
	}
	p.Admin.Do("DELETE", path+"/gpu", nil).Want(t, 204, nil)
	p.Admin.Do("DELETE", path+"/gpu", nil).WantError(t, 404, "not_found")
	for _, bad := range []string{"", "a/b", strings.Repeat("x", 64), "-x", "é"} {
		p.Admin.Do("POST", path, map[string]any{"tag": bad}).WantError(t, 400, "invalid_request")
	}
	for i := range 70 {
		a := p.Admin.Do("POST", path, map[string]any{"tag": "t" + strings.Repeat("x", i%50) + string(rune('a'+i%26))})
		if a.Status != 204 {
			a.WantError(t, 400, "invalid_request")
		}
	}
	p.Admin.Do("GET", path, nil).Want(t, 200, &tags)
	if len(tags.Tags) > 64 {
		t.Errorf("%d tags", len(tags.Tags))
	}
}

func TestHostGoesOfflineAndComesBack(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	status := func() string {
		var got hostJSON
		p.Admin.Do("GET", "/v1/hosts/"+h.ID, nil).Want(t, 200, &got)
		return got.Status
	}
	// The silence is written into the row: the monitor judges it by the product's own 90 seconds.
	query(t, p, `UPDATE hosts SET last_heartbeat_at = now() - interval '85 seconds' WHERE id = $1 RETURNING id`, h.ID)
	if n, err := p.Store.MarkSilentHostsOffline(t.Context(), 90*time.Second); err != nil || len(n) != 0 {
		t.Fatalf("after 85 s of silence: %v %v", n, err)
	}
	query(t, p, `UPDATE hosts SET last_heartbeat_at = now() - interval '91 seconds' WHERE id = $1 RETURNING id`, h.ID)
	planetest.Eventually(t, "the host is offline", func() bool { return status() == "offline" })
	p.NewUser().Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity")
	h.Heartbeat(nil).Want(t, 204, nil)
	if status() != "online" {
		t.Error("a heartbeat did not bring it back")
	}
	p.NewUser().Do("POST", "/v1/sandboxes", nil).Want(t, 201, nil)
}

func TestDeleteHostWithSandboxes(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	p.Admin.Do("DELETE", "/v1/hosts/"+h.ID, nil).WantError(t, 409, "in_use")
	h.Heartbeat(nil).Want(t, 204, nil)
	// A host that is lost for good can be deleted once the owners have deleted what was on it.
	query(t, p, `UPDATE hosts SET status = 'offline' WHERE id = $1 RETURNING id`, h.ID)
	h.Stop()
	u.Do("DELETE", "/v1/sandboxes/"+sb.ID, nil).Want(t, 202, nil)
	p.Admin.Do("DELETE", "/v1/hosts/"+h.ID, nil).Want(t, 204, nil)
	u.Do("GET", "/v1/sandboxes/"+sb.ID, nil).WantError(t, 404, "not_found")
}

// Hosts without a certificate get nothing, a team's own hosts get only its own, and their templates are
// seen by nobody else.
func TestPlacementScope(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	owner, other := p.NewUser(), p.NewUser()
	var plain newHost
	p.Admin.Do("POST", "/v1/hosts", map[string]any{"type": "regular"}).Want(t, 201, &plain)
	var reg struct{ Token string }
	p.Do("POST", "/v1/hosts/register", registration(plain.Token)).Want(t, 201, &reg)
	p.Do("POST", "/v1/hosts/"+plain.Host.ID+"/heartbeat", map[string]any{"templates": planetest.Templates()}, hostToken(reg.Token)).Want(t, 204, nil)
	other.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity")

	own := p.AddHostAs(owner, map[string]any{"type": "byoc"})
	own.Heartbeat(map[string]any{"templates": []map[string]any{{"name": "mine", "disk_mb": 64}, {"name": "minimal", "disk_mb": 64}}})
	other.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "no_capacity")
	other.Do("POST", "/v1/sandboxes", map[string]any{"template": "mine"}).WantError(t, 400, "invalid_request")
	if sb := create(t, owner, map[string]any{"template": "mine"}); sb.HostID != own.ID {
		t.Errorf("placed on %s", sb.HostID)
	}
	shared := p.AddHost()
	if sb := create(t, owner, nil); sb.HostID != own.ID {
		t.Errorf("with room on its own host, placed on %s", sb.HostID)
	}
	if sb := create(t, other, nil); sb.HostID != shared.ID {
		t.Errorf("placed on %s", sb.HostID)
	}
	var list struct {
		Templates []struct{ Name, Scope string }
	}
	other.Do("GET", "/v1/templates", nil).Want(t, 200, &list)
	if len(list.Templates) != 2 || list.Templates[0].Scope != "platform" {
		t.Errorf("templates %+v", list.Templates)
	}
	owner.Do("GET", "/v1/templates", nil).Want(t, 200, &list)
	if len(list.Templates) != 3 {
		t.Errorf("the owner's templates %+v", list.Templates)
	}
}

func TestFirstHostOfConfiguration(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	found := regexp.MustCompile(`registration_token=([0-9a-f]{64})`)
	for range 2 { // each start logs a token that works, while the host has not registered
		if err := p.Fleet.EnsureFirstHost(t.Context(), "http://localhost:50051"); err != nil {
			t.Fatal(err)
		}
	}
	tokens := found.FindAllStringSubmatch(p.Log.String(), -1)
	if len(tokens) != 2 || tokens[0][1] == tokens[1][1] {
		t.Fatalf("logged %v", tokens)
	}
	p.Do("POST", "/v1/hosts/register", registration(tokens[0][1])).WantError(t, 401, "unauthorized")
	p.Do("POST", "/v1/hosts/register", registration(tokens[1][1])).Want(t, 201, nil)
	if err := p.Fleet.EnsureFirstHost(t.Context(), "http://localhost:50051"); err != nil {
		t.Fatal(err)
	}
	if n := len(found.FindAllString(p.Log.String(), -1)); n != 2 {
		t.Errorf("a registered first host logged another token (%d)", n)
	}
	var list struct{ Hosts []hostJSON }
	p.Admin.Do("GET", "/v1/hosts", nil).Want(t, 200, &list)
	if len(list.Hosts) != 1 || list.Hosts[0].CreatedBy != "system" || list.Hosts[0].Type != "regular" {
		t.Errorf("hosts %+v", list.Hosts)
	}
	if err := p.Fleet.EnsureFirstHost(t.Context(), "nonsense"); err == nil {
		t.Error("an address that is none was taken")
	}
}
