package api_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
)

// BenchmarkPlane is for profiles (-cpuprofile) of the handlers without the network; `make bench` measures
// the whole.
func BenchmarkPlane(b *testing.B) {
	p := planetest.New(b, planetest.Options{NoLoops: true})
	h := p.AddHost()
	u := p.NewUser()
	id := fill(b, p, h.ID, u, 1000)
	requests := []struct {
		name, method, path, body string
		header                   http.Header
	}{
		{"heartbeat", "POST", "/v1/hosts/" + h.ID + "/heartbeat", `{"free_memory_mb":1024,"free_disk_mb":10000,"load1":0.5,"state_revision":1}`, http.Header{"X-Host-Token": {h.Token}}},
		{"empty", "GET", "/v1/me", "", u.Header()},
		{"get", "GET", "/v1/sandboxes/" + id, "", u.Header()},
		{"list", "GET", "/v1/sandboxes?limit=10", "", u.Header()},
	}
	for _, r := range requests {
		b.Run(r.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					req := httptest.NewRequestWithContext(b.Context(), r.method, r.path, bytes.NewReader([]byte(r.body)))
					req.Header = r.header.Clone()
					w := httptest.NewRecorder()
					p.Handler.ServeHTTP(w, req)
					if w.Code >= 300 {
						raw, _ := io.ReadAll(w.Body)
						b.Errorf("%d %s", w.Code, raw)
						return
					}
				}
			})
		})
	}
}

// fill gives a team so many paused sandboxes and returns the id of one.
func fill(b *testing.B, p *planetest.Plane, host string, u planetest.User, n int) string {
	b.Helper()
	query(b, p, `INSERT INTO sandboxes (id, team_id, host_id, status, template, default_user, vcpus, memory_mb, disk_mb, operation_id, created_by, created_at)
		SELECT 'sb-' || lpad(n::text, 25, '0'), $1, $2, 'paused', 'minimal', 'user', 1, 256, 2048, '', $3, now() - n * interval '1 second'
		FROM generate_series(1, $4::int) n RETURNING id`, u.TeamID, host, u.ID, n)
	return fmt.Sprintf("sb-%025d", n/2)
}
