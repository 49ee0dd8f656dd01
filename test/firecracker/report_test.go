//go:build linux

package main

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const fine = "=== RUN   TestA\n--- PASS: TestA (0.10s)\n    --- PASS: TestA/one (0.05s)\n"

// logs is what a whole run prints, with this for the conformance suite.
func logs(conformance string) string {
	var all strings.Builder
	for _, s := range suites() {
		text := fine
		if s.name == "conformance" {
			text = conformance
		}
		all.WriteString("=== suite " + s.name + "\n" + text)
	}
	return all.String() + "=== done\n"
}

func TestReportFailsForWhatDidNotRun(t *testing.T) {
	t.Parallel()
	want := map[string][]string{"conformance": {"TestA", "TestA/one"}}
	for name, c := range map[string]struct{ log, complains string }{
		"all passed":  {fine, ""},
		"one failed":  {fine + "--- FAIL: TestB (1.00s)\n", "1 failed"},
		"one missing": {strings.ReplaceAll(fine, "TestA/one", "TestA/two"), "conformance TestA/one"},
		"one skipped": {strings.Replace(fine, "    --- PASS", "    --- SKIP", 1), "TestA/one SKIP"},
		"no output":   {"", "TestA"},
	} {
		r := &results{}
		if !r.add(logs(c.log)) {
			t.Errorf("%s: the end was not seen", name)
		}
		err := r.report(want, time.Second)
		if c.complains == "" && err != nil || c.complains != "" && (err == nil || !strings.Contains(err.Error(), c.complains)) {
			t.Errorf("%s: %v, want %q", name, err, c.complains)
		}
	}
	if err := (&results{}).report(want, time.Second); err == nil {
		t.Error("no results at all are a success")
	}
}

func TestATryGoesOnWhereTheLastOneHung(t *testing.T) {
	t.Parallel()
	r := &results{}
	if r.add("=== suite conformance\n--- PASS: TestA (1.0s)\n    --- PASS: TestA/one (0.1s)\n--- FAIL: TestB (1.0s)\n=== RUN   TestC\n--- PASS: TestC/it's (1.0s)\n=== RUN   TestC/more\n") {
		t.Error("a try that hung is at its end")
	}
	if got := r.settled("conformance"); got != "^TestA$|^TestB$|^TestC$/^it's$" {
		t.Errorf("the next try leaves out %q", got)
	}
	if got := quoted("it's"); got != `'it'\''s'` {
		t.Errorf("the shell is told %s", got)
	}
	if got := r.settled("e2e"); got != "" {
		t.Errorf("of a suite that did not begin, the next try leaves out %q", got)
	}
	if !r.add(logs("--- PASS: TestB (1.0s)\n--- PASS: TestC (1.0s)\n")) {
		t.Error("the second try has no end")
	}
	want := map[string][]string{"conformance": {"TestA", "TestA/one", "TestC", "TestC/it's"}}
	if err := r.report(want, time.Second); err == nil || !strings.Contains(err.Error(), "1 failed") || r.ended["conformance"]["TestB"] != "FAIL" {
		t.Errorf("what failed in the first try is forgotten: %v, %v", err, r)
	}
}

func TestWhatFailsInAnEmulatedMachineHasASecondChance(t *testing.T) {
	t.Parallel()
	for second, complains := range map[string]string{"PASS": "", "FAIL": "2 failed", "SKIP": "TestA/one SKIP"} {
		r := &results{forgiven: map[string]map[string]bool{}}
		if !r.add(logs("--- FAIL: TestA (1.0s)\n    --- FAIL: TestA/one (0.1s)\n    --- PASS: TestA/two (0.1s)\n")) || !r.again() {
			t.Fatal("what failed is not tried again")
		}
		if got := r.settled("conformance"); got != "^TestA$/^two$" {
			t.Errorf("the next try leaves out %q", got)
		}
		before := r.count()
		parent := strings.Replace(second, "SKIP", "PASS", 1)
		if !r.add("=== suite conformance\n--- "+parent+": TestA (1.0s)\n    --- "+second+": TestA/one (0.1s)\n=== done\n") || r.again() || r.count() <= before {
			t.Error("there is a third chance")
		}
		err := r.report(map[string][]string{"conformance": {"TestA", "TestA/one", "TestA/two"}}, time.Second)
		if complains == "" && err != nil || complains != "" && (err == nil || !strings.Contains(err.Error(), complains)) {
			t.Errorf("%s: %v, want %q", second, err, complains)
		}
	}
}

func TestOnlyASignOfLifeCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const limit = time.Minute
		silent := make(chan time.Time, 1)
		w := watch(limit, func() { silent <- time.Now() })
		w.show = io.Discard
		for _, piece := range []string{"BUG: soft lockup\r\n", "ali", "ve\r", "\nBUG", ": soft lockup\r\n", "a live\r\n"} {
			time.Sleep(limit / 8)
			if _, err := w.Write([]byte(piece)); err != nil {
				t.Fatal(err)
			}
		}
		alive := time.Now().Add(-2 * limit / 8) // the fourth of six pieces
		if after := (<-silent).Sub(alive); after != limit {
			t.Errorf("silent %v after the sign of life", after)
		}
	})
}
