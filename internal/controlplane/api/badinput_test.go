package api_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/api"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
)

// Every bad request is refused with an error of the documented form that names the field; nothing is made and nothing
// of the control plane's insides is shown.
func TestBadInput(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := "/v1/sandboxes/" + create(t, u, nil).ID
	const sandboxes = "/v1/sandboxes"
	long := strings.Repeat("x", 5000)
	many := func(n int, value string) string {
		var b strings.Builder
		for i := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, `"k%d":%s`, i, value)
		}
		return "{" + b.String() + "}"
	}
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		field                    string
	}{
		{"not JSON", "POST", sandboxes, `{"vcpus":`, 400, "body"},
		{"not an object", "POST", sandboxes, `[1]`, 400, "body"},
		{"null", "POST", sandboxes, `null`, 400, "body"},
		{"two values", "POST", sandboxes, `{}{}`, 400, "body"},
		{"trailing text", "POST", sandboxes, `{} x`, 400, "body"},
		{"not UTF-8", "POST", sandboxes, "{\"name\":\"\xff\"}", 400, "body"},
		{"deeply nested", "POST", sandboxes, strings.Repeat("[", 20000), 400, "body"},
		{"huge number", "POST", sandboxes, `{"vcpus":1e400}`, 400, "body"},
		{"unknown field", "POST", sandboxes, `{"vcpu":1}`, 400, "vcpu"},
		{"other case", "POST", sandboxes, `{"VCPUS":1}`, 400, "VCPUS"},
		{"10 000 vCPU", "POST", sandboxes, `{"vcpus":10000}`, 400, "vcpus"},
		{"no vCPU", "POST", sandboxes, `{"vcpus":0}`, 400, "vcpus"},
		{"half a vCPU", "POST", sandboxes, `{"vcpus":1.5}`, 400, "vcpus"},
		{"vCPUs as text", "POST", sandboxes, `{"vcpus":"2"}`, 400, "vcpus"},
		{"vCPUs null", "POST", sandboxes, `{"vcpus":null}`, 400, "vcpus"},
		{"negative memory", "POST", sandboxes, `{"memory_mb":-1}`, 400, "memory_mb"},
		{"little memory", "POST", sandboxes, `{"memory_mb":127}`, 400, "memory_mb"},
		{"negative disk", "POST", sandboxes, `{"disk_mb":-5}`, 400, "disk_mb"},
		{"too large a disk", "POST", sandboxes, `{"disk_mb":1048577}`, 400, "disk_mb"},
		{"negative timeout", "POST", sandboxes, `{"timeout_sec":-1}`, 400, "timeout_sec"},
		{"unknown on_timeout", "POST", sandboxes, `{"on_timeout":"explode"}`, 400, "on_timeout"},
		{"unknown template", "POST", sandboxes, `{"template":"nope"}`, 400, "template"},
		{"template with a path", "POST", sandboxes, `{"template":"../../etc/passwd"}`, 400, "template"},
		{"empty template", "POST", sandboxes, `{"template":""}`, 400, "template"},
		{"name with a slash", "POST", sandboxes, `{"name":"a/b"}`, 400, "name"},
		{"name with dots", "POST", sandboxes, `{"name":".."}`, 400, "name"},
		{"long name", "POST", sandboxes, `{"name":"` + long + `"}`, 400, "name"},
		{"name with NUL", "POST", sandboxes, `{"name":"a\u0000"}`, 400, "name"},
		{"user with a colon", "POST", sandboxes, `{"user":"root:x"}`, 400, "user"},
		{"env with =", "POST", sandboxes, `{"env":{"A=B":"1"}}`, 400, "env"},
		{"env of numbers", "POST", sandboxes, `{"env":{"A":1}}`, 400, "env.A"},
		{"env with NUL", "POST", sandboxes, `{"env":{"A":"\u0000"}}`, 400, "env.A"},
		{"much env", "POST", sandboxes, `{"env":` + many(300, `"x"`) + `}`, 400, "env"},
		{"metadata with =", "POST", sandboxes, `{"metadata":{"a=b":"c"}}`, 400, "metadata"},
		{"metadata without a key", "POST", sandboxes, `{"metadata":{"":"c"}}`, 400, "metadata"},
		{"metadata with NUL in a key", "POST", sandboxes, `{"metadata":{"\u0000":"c"}}`, 400, "metadata"},
		{"much metadata", "POST", sandboxes, `{"metadata":` + many(65, `"x"`) + `}`, 400, "metadata"},
		{"long metadata", "POST", sandboxes, `{"metadata":{"a":"` + long + `"}}`, 400, "metadata.a"},
		{"too large", "POST", sandboxes, `{"name":"` + strings.Repeat("x", 2<<20) + `"}`, 413, ""},

		{"unknown filter", "GET", sandboxes + "?staus=running", "", 400, "staus"},
		{"unknown status", "GET", sandboxes + "?status=dancing", "", 400, "status"},
		{"limit 0", "GET", sandboxes + "?limit=0", "", 400, "limit"},
		{"limit 1001", "GET", sandboxes + "?limit=1001", "", 400, "limit"},
		{"limit of words", "GET", sandboxes + "?limit=many", "", 400, "limit"},
		{"limit twice", "GET", sandboxes + "?limit=1&limit=2", "", 400, "limit"},
		{"cursor of nowhere", "GET", sandboxes + "?cursor=AAAA", "", 400, "cursor"},
		{"cursor of signs", "GET", sandboxes + "?cursor=%27%3B--", "", 400, "cursor"},
		{"cursor with NUL", "GET", sandboxes + "?cursor=MTAgAA", "", 400, "cursor"},
		{"metadata filter without =", "GET", sandboxes + "?metadata=x", "", 400, "metadata.0"},
		{"malformed query", "GET", sandboxes + "?%zz", "", 400, "query"},
		{"query not UTF-8", "GET", sandboxes + "?name=%ff", "", 400, "name"},
		{"query with NUL", "GET", sandboxes + "?name=%00", "", 400, "name"},
		{"id with NUL", "GET", sandboxes + "/sb-%00", "", 404, ""},
		{"id not UTF-8", "GET", sandboxes + "/sb-%ff", "", 404, ""},
		{"id that climbs", "GET", sandboxes + "/..%2f..%2fetc%2fpasswd", "", 404, ""},
		{"id of SQL", "GET", sandboxes + "/'%3B%20DROP%20TABLE%20hosts%3B--", "", 404, ""},
		{"long id", "GET", sandboxes + "/" + long, "", 404, ""},
		{"no route", "GET", "/v1/nothing", "", 404, ""},
		{"no method", "PATCH", sandboxes, "{}", 405, ""},
		{"host path", "GET", "/v1/../../etc/passwd", "", 404, ""},

		{"exec without a body", "POST", sb + "/exec", "", 400, "body"},
		{"exec without a command", "POST", sb + "/exec", `{}`, 400, "cmd"},
		{"exec of nothing", "POST", sb + "/exec", `{"cmd":""}`, 400, "cmd"},
		{"exec for ever", "POST", sb + "/exec", `{"cmd":"true","timeout_sec":86401}`, 400, "timeout_sec"},
		{"exec backwards", "POST", sb + "/exec", `{"cmd":"true","timeout_sec":-1}`, 400, "timeout_sec"},
		{"exec args of numbers", "POST", sb + "/exec", `{"cmd":"true","args":[1]}`, 400, "args.0"},
		{"exec too large", "POST", sb + "/exec", `{"cmd":"` + strings.Repeat("x", 5<<20) + `"}`, 413, ""},
		{"exec nowhere", "POST", sb + "/exec", `{"cmd":"true","cwd":""}`, 400, "cwd"},
		{"signal nothing", "POST", sb + "/processes/0/signal", `{"signal":"TERM"}`, 400, "pid"},
		{"signal minus one", "POST", sb + "/processes/-1/signal", `{"signal":"TERM"}`, 400, "pid"},
		{"signal by words", "POST", sb + "/processes/init/signal", `{"signal":"TERM"}`, 400, "pid"},
		{"unknown signal", "POST", sb + "/processes/1/signal", `{"signal":"SIGWHAT"}`, 400, "signal"},
		{"timeout without", "PUT", sb + "/timeout", `{}`, 400, "timeout_sec"},
		{"timeout of years", "PUT", sb + "/timeout", `{"timeout_sec":99999999}`, 400, "timeout_sec"},
		{"file without a path", "GET", sb + "/files", "", 400, "path"},
		{"move to nowhere", "POST", sb + "/files/move", `{"source":"a"}`, 400, "destination"},
		{"path of 5000", "GET", sb + "/files?path=" + long, "", 400, "path"},

		{"host without type", "POST", "/v1/hosts", `{}`, 400, "type"},
		{"host of another type", "POST", "/v1/hosts", `{"type":"cloud"}`, 400, "type"},
		{"host of nobody's team", "POST", "/v1/hosts", `{"type":"byoc","team_id":"x"}`, 400, "team_id"},
		{"host provider", "POST", "/v1/hosts", `{"type":"byoc","provider":"a/b"}`, 400, "provider"},
		{"register without address", "POST", "/v1/hosts/register", `{"token":"x","arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1}`, 400, "address"},
		{"register a URL", "POST", "/v1/hosts/register", `{"token":"x","arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1,"address":"http://x:1"}`, 400, "address"},
		{"register port 0", "POST", "/v1/hosts/register", `{"token":"x","arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1,"address":"10.0.0.1:0"}`, 400, "address"},
		{"register no cores", "POST", "/v1/hosts/register", `{"token":"x","arch":"amd64","cpu_cores":0,"memory_mb":1,"disk_gb":1,"address":"10.0.0.1:1"}`, 400, "cpu_cores"},
		{"register a wrong token", "POST", "/v1/hosts/register", `{"token":"x","arch":"amd64","cpu_cores":1,"memory_mb":1,"disk_gb":1,"address":"10.0.0.1:1"}`, 401, ""},
		{"signup without @", "POST", "/v1/auth/signup", `{"email":"ada","password":"12345678"}`, 400, "email"},
		{"signup with a short password", "POST", "/v1/auth/signup", `{"email":"a@b.c","password":"1234567"}`, 400, "password"},
		{"signup as admin", "POST", "/v1/auth/signup", `{"email":"a@b.c","password":"12345678","is_admin":true}`, 400, "is_admin"},
		{"key without a name", "POST", "/v1/api-keys", `{}`, 400, "name"},
		{"revoke nothing", "DELETE", "/v1/api-keys/key-nope", "", 404, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var body any
			if c.body != "" {
				body = c.body
			}
			a := u.Do(c.method, c.path, body)
			code := map[int]string{400: "invalid_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}[c.status]
			a.WantError(t, c.status, code)
			if field, _ := a.Detail("field").(string); field != c.field {
				t.Errorf("names the field %q, want %q: %s", field, c.field, a.Body)
			}
			for _, inside := range []string{"SQLSTATE", "pq:", "pgx", ".go:", "/work", "goroutine", "json:", "strconv", "openapi3", long} {
				body, _, _ := strings.Cut(string(a.Body), `"request_id"`) // which is random, and may spell anything
				if strings.Contains(body, inside) {
					t.Errorf("shows %q: %.300s", inside, a.Body)
				}
			}
		})
	}
	t.Cleanup(func() {
		if h.Len() != 1 {
			t.Errorf("bad requests made sandboxes: the host has %d", h.Len())
		}
	})
}

func TestContentType(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	u := p.NewUser()
	u.Do("POST", "/v1/api-keys", `{"name":"x"}`, http.Header{"Content-Type": {"text/xml"}}).WantError(t, 400, "invalid_request")
	u.Do("POST", "/v1/api-keys", `{"name":"x"}`, http.Header{"Content-Type": {"application/json; charset=utf-8"}}).Want(t, 201, nil)
	u.Do("POST", "/v1/api-keys", `{"name":"x"}`, http.Header{"Idempotency-Key": {strings.Repeat("k", 129)}}).WantError(t, 400, "invalid_request")
	u.Do("POST", "/v1/api-keys", `{"name":"x"}`, http.Header{"Idempotency-Key": {"é"}}).WantError(t, 400, "invalid_request")
}

// Heads that are too large, and requests that are none, do not get further than the door.
func TestRawRequests(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	for name, c := range map[string]struct {
		text string
		want int
	}{
		"large head":   {"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Big: " + strings.Repeat("x", 200<<10) + "\r\n\r\n", 431},
		"not HTTP":     {"HELLO\r\n\r\n", 400},
		"no host":      {"GET /healthz HTTP/1.1\r\n\r\n", 400},
		"two lengths":  {"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400},
		"cut off body": {"POST /v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{\"email\":", 400},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, c.text) // the server may close before all is written
			_ = conn.(*net.TCPConn).CloseWrite()
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if res.StatusCode != c.want {
				t.Errorf("status %d, want %d", res.StatusCode, c.want)
			}
		})
	}
}

// A handler that panics answers 500 without a word of why, and the server goes on.
func TestPanic(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{Deps: func(d *api.Deps) { d.Passwords = nil }})
	a := p.Do("POST", "/v1/auth/login", map[string]any{"email": "a@b.c", "password": "xxxxxxxx"}).WantError(t, 500, "internal")
	if strings.Contains(string(a.Body), "nil") || strings.Contains(string(a.Body), "panic") {
		t.Errorf("shows why: %s", a.Body)
	}
	if !strings.Contains(p.Log.String(), "nil pointer") {
		t.Error("the log does not tell")
	}
	p.Do("GET", "/healthz", nil).Want(t, 200, nil)
}
