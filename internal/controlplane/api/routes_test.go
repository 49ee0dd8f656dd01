package api

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
)

func newServer(t testing.TB) *Server {
	t.Helper()
	st, err := store.Open(context.Background(), "postgres://nobody@127.0.0.1:1/none")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	log := slog.New(slog.DiscardHandler)
	s, err := New(context.Background(), Deps{Store: st, Fleet: fleet.New(fleet.Deps{Store: st, Log: log}), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The table and the contract say the same: routes, who may call them, and what takes Idempotency-Key.
func TestRoutesMatchContract(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	described := map[string]*openapi3.Operation{}
	for path, item := range s.spec.doc.Paths.Map() {
		for method, op := range item.Operations() {
			described[method+" "+path] = op
		}
	}
	schemes := map[who][]string{anyone: nil, user: {"Bearer"}, hostAdmin: {"Bearer"}, team: {"ApiKey", "Bearer"}, host: {"HostToken"}}
	for _, rt := range s.routes(gen.ServerInterfaceWrapper{}) {
		name := rt.method + " " + rt.path
		op := described[name]
		if op == nil {
			t.Errorf("%s is served and not described", name)
			continue
		}
		delete(described, name)
		if got := securityOf(s.spec.doc, op); !slices.Equal(got, schemes[rt.who]) {
			t.Errorf("%s: the contract says %v, the table %v", name, got, schemes[rt.who])
		}
		takesKey := slices.ContainsFunc(op.Parameters, func(p *openapi3.ParameterRef) bool { return p.Value.Name == "Idempotency-Key" })
		if takesKey != rt.once {
			t.Errorf("%s: Idempotency-Key is %v in the contract, %v in the table", name, takesKey, rt.once)
		}
		mutates := rt.method != "GET" && rt.who != anyone && rt.who != host && rt.body != noLimit
		if mutates != rt.once {
			t.Errorf("%s: mutates %v, repeatable %v", name, mutates, rt.once)
		}
	}
	for name := range described {
		t.Errorf("%s is described and not served", name)
	}
}

func securityOf(doc *openapi3.T, op *openapi3.Operation) []string {
	reqs := doc.Security
	if op.Security != nil {
		reqs = *op.Security
	}
	var out []string
	for _, r := range reqs {
		out = append(out, slices.Collect(maps.Keys(r))...)
	}
	slices.Sort(out)
	return out
}

// Every text and number from outside has bounds.
func TestContractBoundsEverything(t *testing.T) {
	t.Parallel()
	doc := newServer(t).spec.doc
	seen := map[*openapi3.Schema]bool{}
	var walk func(where string, s *openapi3.Schema)
	walk = func(where string, s *openapi3.Schema) {
		if s == nil || seen[s] {
			return
		}
		seen[s] = true
		switch {
		case s.Type.Is("string") && len(s.Enum) == 0 && s.MaxLength == nil && s.Format != "binary":
			t.Errorf("%s: text without a longest length", where)
		case (s.Type.Is("integer") || s.Type.Is("number")) && (s.Min == nil || s.Max == nil):
			t.Errorf("%s: number without bounds", where)
		case s.Type.Is("array"):
			if s.MaxItems == nil {
				t.Errorf("%s: list without a longest length", where)
			}
			walk(where+"[]", s.Items.Value)
		case s.Type.Is("object") && s.AdditionalProperties.Schema != nil:
			if s.MaxProps == nil {
				t.Errorf("%s: map without a largest size", where)
			}
			walk(where+".*", s.AdditionalProperties.Schema.Value)
		}
		for name, p := range s.Properties {
			walk(where+"."+name, p.Value)
		}
		for _, p := range s.AllOf {
			walk(where, p.Value)
		}
	}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			where := method + " " + path
			for _, p := range slices.Concat(item.Parameters, op.Parameters) {
				walk(where+" "+p.Value.Name, p.Value.Schema.Value)
			}
			if op.RequestBody == nil {
				continue
			}
			for _, m := range op.RequestBody.Value.Content {
				walk(where, m.Schema.Value)
				open := strings.HasSuffix(path, "/register") || strings.HasSuffix(path, "/heartbeat")
				if s := m.Schema.Value; s.Type.Is("object") && (s.AdditionalProperties.Has == nil || *s.AdditionalProperties.Has) != open {
					t.Errorf("%s: unknown fields allowed or refused wrongly", where)
				}
			}
		}
	}
	walk("StreamClientMessage", doc.Components.Schemas["StreamClientMessage"].Value)
}

// The reference page is whole, and needs nothing from elsewhere.
func TestDocsPage(t *testing.T) {
	t.Parallel()
	sp := newServer(t).spec
	page := string(sp.html)
	for path, item := range sp.doc.Paths.Map() {
		for _, op := range item.Operations() {
			if !strings.Contains(page, `id="`+op.OperationID+`"`) || !strings.Contains(page, path) {
				t.Errorf("%s is not on the page", op.OperationID)
			}
		}
	}
	for _, bad := range []string{"<no value>", "src=", "@import", "url(", "ZgotmplZ", "//cdn"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	for _, link := range strings.Split(page, `href="#`)[1:] {
		id, _, _ := strings.Cut(link, `"`)
		if !strings.Contains(page, `id="`+id+`"`) {
			t.Errorf("a link leads to #%s, which is not there", id)
		}
	}
}
