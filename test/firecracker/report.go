//go:build linux

package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// results are what the suites have told so far, also over several tries: suite, test, PASS, FAIL or SKIP.
type results map[string]map[string]string

var (
	// verdicts are the lines by which a test program tells how a test or a part of one ended.
	verdicts = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
	begins   = regexp.MustCompile(`^=== suite (\S+)`)
)

// add takes what was printed in one try, and tells whether it came to its end. What failed once has failed: a later try
// runs only what this one did not come to.
func (r results) add(output string) (done bool) {
	all := map[string]string{}
	for line := range strings.Lines(output) {
		if m := begins.FindStringSubmatch(line); m != nil {
			if r[m[1]] == nil {
				r[m[1]] = map[string]string{}
			}
			all = r[m[1]]
		}
		if m := verdicts.FindStringSubmatch(line); m != nil && all[m[2]] != "FAIL" {
			all[m[2]] = m[1]
		}
		done = done || strings.HasPrefix(line, "=== done")
	}
	return done
}

// count is how many tests and parts of tests have ended.
func (r results) count() (n int) {
	for _, suite := range r {
		n += len(suite)
	}
	return n
}

// settled is the pattern of a suite's tests, and of the parts of tests that were cut off, that need not be run again; ""
// if there are none.
func (r results) settled(suite string) string {
	var patterns []string
	for name := range r[suite] {
		if !r.within(suite, name) {
			levels := strings.Split(name, "/")
			for i := range levels {
				levels[i] = "^" + regexp.QuoteMeta(levels[i]) + "$"
			}
			patterns = append(patterns, strings.Join(levels, "/"))
		}
	}
	slices.Sort(patterns)
	return strings.Join(patterns, "|")
}

// within tells whether a test is a part of one that has ended.
func (r results) within(suite, name string) bool {
	for at := strings.LastIndexByte(name, '/'); at > 0; at = strings.LastIndexByte(name[:at], '/') {
		if _, ended := r[suite][name[:at]]; ended {
			return true
		}
	}
	return false
}

// passed are the tests of a program's output that did.
func passed(output string) map[string]bool {
	r := results{}
	r.add("=== suite it\n" + output)
	all := map[string]bool{}
	for name, outcome := range r["it"] {
		if outcome == "PASS" {
			all[name] = true
		}
	}
	return all
}

// report counts what the suites tell and fails if anything failed, or is missing of what must pass.
func (r results) report(want map[string][]string, took time.Duration) error {
	total := map[string]int{}
	var missing []string
	for _, s := range suites() {
		count := map[string]int{}
		for name, outcome := range r[s.name] {
			count[outcome]++
			total[outcome]++
			if outcome == "FAIL" {
				fmt.Println("failed:", s.name, name)
			}
		}
		for _, name := range want[s.name] {
			if r[s.name][name] != "PASS" {
				missing = append(missing, strings.TrimSpace(s.name+" "+name+" "+r[s.name][name]))
			}
		}
		fmt.Printf("%-12s %3d passed, %d failed, %d skipped; %d had to pass\n", s.name, count["PASS"], count["FAIL"], count["SKIP"], len(want[s.name]))
	}
	slices.Sort(missing)
	for _, name := range missing {
		fmt.Println("did not pass:", name)
	}
	fmt.Printf("with Firecracker, in %s:\n%d passed, %d failed, %d skipped\n", took.Round(time.Second), total["PASS"], total["FAIL"], total["SKIP"])
	if total["FAIL"] > 0 || len(missing) > 0 {
		return fmt.Errorf("%d failed, %d that had to pass did not: %s", total["FAIL"], len(missing), strings.Join(missing[:min(3, len(missing))], ", "))
	}
	return nil
}
