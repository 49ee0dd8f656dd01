//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestReportFailsForWhatDidNotRun(t *testing.T) {
	t.Parallel()
	const fine = "=== RUN   TestA\n--- PASS: TestA (0.10s)\n    --- PASS: TestA/one (0.05s)\n"
	for name, c := range map[string]struct{ log, complains string }{
		"all passed":  {fine, ""},
		"one failed":  {fine + "--- FAIL: TestB (1.00s)\n", "1 failed"},
		"one missing": {strings.ReplaceAll(fine, "TestA/one", "TestA/two"), "conformance TestA/one"},
		"one skipped": {strings.Replace(fine, "    --- PASS", "    --- SKIP", 1), "TestA/one SKIP"},
		"no output":   {"", "TestA"},
	} {
		dir := t.TempDir()
		for _, s := range suites() {
			log := fine
			if s.name == "conformance" {
				log = c.log
			}
			if err := os.WriteFile(filepath.Join(dir, s.name+".log"), []byte(log), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := report(dir, map[string][]string{"conformance": {"TestA", "TestA/one"}}, time.Second)
		if c.complains == "" && err != nil || c.complains != "" && (err == nil || !strings.Contains(err.Error(), c.complains)) {
			t.Errorf("%s: %v, want %q", name, err, c.complains)
		}
	}
	if err := report(t.TempDir(), nil, time.Second); err == nil {
		t.Error("no results at all are a success")
	}
}
