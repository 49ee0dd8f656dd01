// Package arch holds the import arrows of the design: which part may know of which. It looks at what
// each package's product code imports, directly or through others.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/wrenn-sandbox/wrenn/"

// rules: a package below From imports, directly or not, nothing below Never.
var rules = []struct{ from, never, why string }{
	{"internal/wrenn", ".", "the domain imports only the standard library"},
	{"internal/controlplane", module + "internal/agent", "the control plane speaks to agents by RPC only"},
	{"internal/controlplane", module + "internal/envd", "the control plane speaks to guests by their API only"},
	{"internal/agent", module + "internal/controlplane", "the agent speaks to the control plane by REST only"},
	{"internal/agent", module + "internal/envd", "the agent speaks to guests by their API only"},
	{"internal/agent", "github.com/jackc/pgx", "the agent has no database"},
	{"internal/envd", module + "internal/controlplane", "the guest agent knows nothing of the control plane"},
	{"internal/envd", module + "internal/agent", "the guest agent knows nothing of the host"},
	{"internal/envd", "github.com/jackc/pgx", "the guest agent has no database"},
	{"internal/cli", module + "internal/controlplane", "the command line is a client as any other"},
	{"internal/cli", module + "internal/agent", "the command line is a client as any other"},
	{"internal/localstack", module + "internal/controlplane", "the local stack runs the programs, it does not contain them"},
	{"internal/localstack", module + "internal/agent", "the local stack runs the programs, it does not contain them"},
}

// direct lists all of ours that a package below the key imports itself.
var direct = map[string][]string{
	"internal/cli": {"sdk/go", "internal/localstack", "internal/version"},
	"cmd/wrenn":    {"internal/cli"},
}

type listed struct {
	ImportPath, Name string
	Imports, Deps    []string
}

func TestImportArrows(t *testing.T) {
	t.Parallel()
	packages := list(t)
	for _, rule := range rules {
		seen := false
		for _, p := range packages {
			if !below(p.ImportPath, module+rule.from) || below(p.ImportPath, rule.never) || testSupport(p.ImportPath) {
				continue
			}
			seen = true
			for _, dep := range p.Deps {
				if forbidden(dep, rule.never) {
					t.Errorf("%s imports %s: %s", p.ImportPath, dep, rule.why)
				}
			}
		}
		if !seen {
			t.Errorf("no package is below %s: the rule %q holds nothing", rule.from, rule.why)
		}
	}
}

// TestProgramsCarryNoTestSupport holds that packages made for tests, which may import what they like, are
// in no program.
func TestProgramsCarryNoTestSupport(t *testing.T) {
	t.Parallel()
	programs := 0
	for _, p := range list(t) {
		if p.Name != "main" || !below(p.ImportPath, module+"cmd") {
			continue
		}
		programs++
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, module) && testSupport(dep) {
				t.Errorf("%s contains %s, which is for tests", p.ImportPath, dep)
			}
		}
	}
	if programs < 4 {
		t.Errorf("looked at %d programs, want wrenn-cp, wrenn-agent, envd and wrenn", programs)
	}
}

// testSupport tells a package for tests, such as stacktest, by its name; what lies below it is too.
func testSupport(path string) bool {
	for _, part := range strings.Split(strings.TrimPrefix(path, module), "/") {
		if strings.HasSuffix(part, "test") {
			return true
		}
	}
	return false
}

func TestDirectImports(t *testing.T) {
	t.Parallel()
	packages := list(t)
	for from, allowed := range direct {
		for _, p := range packages {
			if !below(p.ImportPath, module+from) {
				continue
			}
			for _, dep := range p.Imports {
				if strings.HasPrefix(dep, module) && !below(dep, module+from) && !anyBelow(dep, allowed) {
					t.Errorf("%s imports %s; of ours it may import only %v", p.ImportPath, dep, allowed)
				}
			}
		}
	}
}

// below tells whether path is prefix or lies under it.
func below(path, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

func anyBelow(path string, prefixes []string) bool {
	for _, p := range prefixes {
		if below(path, module+p) {
			return true
		}
	}
	return false
}

// forbidden: "." stands for everything that is not the standard library, whose paths begin without a
// host name.
func forbidden(dep, never string) bool {
	if never == "." {
		host, _, _ := strings.Cut(dep, "/")
		return strings.Contains(host, ".") && !strings.HasPrefix(dep, "vendor/") && !below(dep, module+"internal/wrenn")
	}
	return below(dep, never) && !below(dep, module+"internal/wrenn")
}

func list(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Imports,Deps", "./cmd/...", "./internal/...")
	cmd.Dir = "../.."
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, complaints.String())
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}
