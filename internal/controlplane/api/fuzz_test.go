package api

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// wantRefusal fails unless err is one that a user may see.
func wantRefusal(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	switch wrenn.KindOf(err) {
	case wrenn.KindInvalidRequest, wrenn.KindNotFound, wrenn.KindTooLarge:
	default:
		t.Fatalf("not a refusal: %v", err)
	}
}

// FuzzRequestBody: whatever is sent to a route, it is refused in the documented form or decodes into the
// generated type.
func FuzzRequestBody(f *testing.F) {
	s := newServer(f)
	type target struct {
		op   *operation
		into func() any
	}
	op := func(method, path string) *operation {
		o, err := s.spec.operation(route{method: method, path: path})
		if err != nil {
			f.Fatal(err)
		}
		return o
	}
	targets := []target{
		{op("POST", "/v1/sandboxes"), func() any { return new(gen.CreateSandboxRequest) }},
		{op("POST", "/v1/sandboxes/{id}/exec"), func() any { return new(gen.ExecRequest) }},
		{op("POST", "/v1/hosts/register"), func() any { return new(gen.RegisterHostRequest) }},
		{op("POST", "/v1/hosts/{id}/heartbeat"), func() any { return new(gen.HeartbeatRequest) }},
		{op("POST", "/v1/auth/signup"), func() any { return new(gen.SignupRequest) }},
	}
	for i, seed := range []string{
		`{"template":"minimal","vcpus":1,"env":{"A":"b"},"metadata":{"k":"v"},"on_timeout":"kill"}`,
		`{"cmd":"echo","args":["a"],"shell":true,"stdin":"x","timeout_sec":3}`,
		`{"token":"t","arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1,"address":"10.0.0.1:1"}`,
		`{"specs":{"arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1},"templates":[{"name":"minimal"}],"load1":0.1}`,
		`{"email":"a@b.c","password":"12345678"}`,
		`{"vcpus":1.0}`, `{"a":{"b":[{"c":null}]}}`, `[`, `"\u0000"`, `1e999`,
	} {
		f.Add(uint8(i), seed)
	}
	f.Fuzz(func(t *testing.T, which uint8, body string) {
		target := targets[int(which)%len(targets)]
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		if err := target.op.checkBody(httptest.NewRecorder(), r, jsonBody); err != nil {
			wantRefusal(t, err)
			return
		}
		if r.Body == http.NoBody {
			return
		}
		if err := json.NewDecoder(r.Body).Decode(target.into()); err != nil {
			wantRefusal(t, badRequest(err))
		}
	})
}

// FuzzClientMessage is every WebSocket frame of a client.
func FuzzClientMessage(f *testing.F) {
	s := newServer(f)
	for _, seed := range []string{
		`{"type":"start","cmd":"true","tty":{"cols":80,"rows":24}}`, `{"type":"stdin","data":"aGk="}`, `{"type":"resize","tty":{"cols":1,"rows":1}}`,
		`{"type":"signal","signal":"SIGTERM"}`, `{"type":"close"}`, `{"type":"start","env":{"=":""}}`, `{`, `null`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := s.spec.clientMessage(text)
		if err != nil {
			wantRefusal(t, err)
			return
		}
		if !m.Type.Valid() {
			t.Fatalf("took the type %q", m.Type)
		}
		if m.Signal != nil {
			_, err := parseSignal(*m.Signal)
			wantRefusal(t, err)
		}
	})
}

// FuzzQuery is every query string, with the cursor in it.
func FuzzQuery(f *testing.F) {
	op, err := newServer(f).spec.operation(route{method: "GET", path: "/v1/sandboxes"})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"limit=5&cursor=MTAgc2I", "metadata=a%3Db&metadata=c%3D", "name=%00", "%zz", "limit=1e3", "cursor=" + strings.Repeat("A", 300)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		r := &http.Request{URL: &url.URL{RawQuery: raw}}
		if err := op.checkQuery(r); err != nil {
			wantRefusal(t, err)
			return
		}
		q := r.URL.Query()
		if q.Has("cursor") {
			cursor := q.Get("cursor")
			p, err := readPage(nil, &cursor)
			wantRefusal(t, err)
			if err == nil && (p.afterAt == nil || p.afterAt.Year() > 9999) {
				t.Fatalf("cursor %q became %v", cursor, p.afterAt)
			}
		}
	})
}
