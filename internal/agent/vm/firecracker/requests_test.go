//go:build linux

package firecracker

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"testing"

	"github.com/getkin/kin-openapi/openapi2"
	"github.com/getkin/kin-openapi/openapi2conv"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/oasdiff/yaml"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// specEnv names Firecracker's description of its API: src/firecracker/swagger/firecracker.yaml of its sources.
const specEnv = "WRENN_FIRECRACKER_SPEC"

func loadSpec(t *testing.T) *openapi3.T {
	t.Helper()
	path := os.Getenv(specEnv)
	if path == "" {
		path = "../../../../../shared/spec/firecracker/firecracker.yaml" // beside the clone; a test runs in its package's directory
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Skipf("needs Firecracker's firecracker.yaml: set %s to it", specEnv)
	}
	if raw, err = yaml.YAMLToJSON(raw); err != nil {
		t.Fatal(err)
	}
	var old openapi2.T
	if err := json.Unmarshal(raw, &old); err != nil {
		t.Fatal(err)
	}
	spec, err := openapi2conv.ToV3(&old)
	if err != nil {
		t.Fatal(err)
	}
	for _, schema := range spec.Components.Schemas { // a misspelt field is a fault, not an extension
		if schema.Value.Properties != nil {
			schema.Value.AdditionalProperties = openapi3.AdditionalProperties{Has: new(bool)}
		}
	}
	return spec
}

// everyRequest is each that this driver can send, with all its fields in use.
func everyRequest() []request {
	cfg := vm.Config{
		ID: "sb-x", VCPUs: 2, MemoryMB: 512, Kernel: "/k", Initrd: "/i", Cmdline: "quiet",
		Disks: []vm.Disk{{Path: "/a"}, {Path: "/b", ReadOnly: true}}, Net: vm.Net{TAP: "tap0", MAC: "02:00:5e:00:00:02"},
	}
	limit, none := limiter(vm.DiskLimits{BytesPerSec: 100 << 20, OpsPerSec: 5000}), limiter(vm.DiskLimits{})
	all := append(coldStart(cfg, limit, version{Major: 1, Minor: 16}), coldStart(vm.Config{VCPUs: 1, MemoryMB: 128}, none, oldest)...)
	for _, memory := range []memoryBackend{{"File", memoryPath}, {"Uffd", "/uffd.sock"}} {
		all = append(all, restore(memory, version{Major: 1, Minor: 7}), restore(memory, version{Major: 1, Minor: 16}))
	}
	return append(all, updateDisk(1, vm.Disk{}, none), updateDisk(1, vm.Disk{GrowTo: 1}, limit), instanceStart(), pause(), resume(), snapshotDiff(), describe(), balloonStatistics(), setBalloon(64))
}

func TestEveryRequestIsAsFirecrackerDescribesIt(t *testing.T) {
	t.Parallel()
	router, err := legacy.NewRouter(loadSpec(t), openapi3.DisableExamplesValidation())
	if err != nil {
		t.Fatal(err)
	}
	check := func(r request) error {
		raw := []byte{}
		if r.body != nil {
			if raw, err = json.Marshal(r.body); err != nil {
				return err
			}
		}
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://localhost"+r.path, bytes.NewReader(raw))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		route, params, err := router.FindRoute(req)
		if err != nil {
			return err
		}
		return openapi3filter.ValidateRequest(t.Context(), &openapi3filter.RequestValidationInput{Request: req, Route: route, PathParams: params})
	}
	for _, r := range everyRequest() {
		if err := check(r); err != nil {
			t.Errorf("%s %s %+v: %v", r.method, r.path, r.body, err)
		}
	}
	for name, wrong := range map[string]request{
		"a field unknown":   {http.MethodPatch, "/vm", map[string]any{"state": "Paused", "hurry": true}},
		"a value unknown":   {http.MethodPatch, "/vm", vmState{State: "Frozen"}},
		"a field missing":   {http.MethodPut, "/drives/disk0", map[string]any{"drive_id": "disk0"}},
		"a path unknown":    {http.MethodPut, "/nothing", struct{}{}},
		"a vCPU too many":   {http.MethodPut, "/machine-config", machineConfig{VCPUs: 33, MemoryMB: 128}},
		"a negative bucket": {http.MethodPut, "/entropy", map[string]any{"rate_limiter": rateLimiter{Ops: tokenBucket{Size: -1}}}},
	} {
		if check(wrong) == nil {
			t.Errorf("%s passes the check", name)
		}
	}
}
