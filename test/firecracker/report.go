//go:build linux

package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// results are what the suites have told so far, also over several tries.
type results struct {
	ended map[string]map[string]string // by suite and test: PASS, FAIL or SKIP
	// forgiven are what failed once, by suite and test, where there is a second chance: an emulated processor breaks a guest
	// now and then. Nil where there is none.
	forgiven map[string]map[string]bool
}

var (
	// verdicts are the lines by which a test program tells how a test or a part of one ended.
	verdicts = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
	begins   = regexp.MustCompile(`^=== suite (\S+)`)
)

// add takes what was printed in one try, and tells whether it came to its end. What has failed for good has failed: a later
// try runs only what this one did not come to.
func (r *results) add(output string) (done bool) {
	suite := ""
	for line := range strings.Lines(output) {
		if m := begins.FindStringSubmatch(line); m != nil {
			suite = m[1]
		}
		if m := verdicts.FindStringSubmatch(line); m != nil {
			r.end(suite, m[2], m[1])
		}
		done = done || strings.HasPrefix(line, "=== done")
	}
	return done
}

func (r *results) end(suite, name, outcome string) {
	if outcome == "FAIL" && r.forgiven != nil && !r.forgiven[suite][name] {
		if r.forgiven[suite] == nil {
			r.forgiven[suite] = map[string]bool{}
		}
		r.forgiven[suite][name] = true
		return
	}
	if r.ended == nil {
		r.ended = map[string]map[string]string{}
	}
	if r.ended[suite] == nil {
		r.ended[suite] = map[string]string{}
	}
	if r.ended[suite][name] != "FAIL" {
		r.ended[suite][name] = outcome
	}
}

// again tells whether something is still to have its second chance.
func (r *results) again() bool {
	for suite, names := range r.forgiven {
		for name := range names {
			if _, ended := r.ended[suite][name]; !ended {
				return true
			}
		}
	}
	return false
}

// count grows with each test and part of a test that ends.
func (r *results) count() (n int) {
	for _, suite := range r.ended {
		n += len(suite)
	}
	for _, suite := range r.forgiven {
		n += len(suite)
	}
	return n
}

// settled is the pattern of a suite's tests, and of the parts of tests that were cut off, that need not be run again; ""
// if there are none.
func (r *results) settled(suite string) string {
	var patterns []string
	for name := range r.ended[suite] {
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
func (r *results) within(suite, name string) bool {
	for at := strings.LastIndexByte(name, '/'); at > 0; at = strings.LastIndexByte(name[:at], '/') {
		if _, ended := r.ended[suite][name[:at]]; ended {
			return true
		}
	}
	return false
}

// passed are the tests of a program's output that did.
func passed(output string) map[string]bool {
	r := &results{}
	r.add("=== suite it\n" + output)
	all := map[string]bool{}
	for name, outcome := range r.ended["it"] {
		if outcome == "PASS" {
			all[name] = true
		}
	}
	return all
}

// telling is the end of a test run's output, without the lines that say only that a test began, waits or passed.
func telling(output string) string {
	const most = 8000
	var b strings.Builder
	for line := range strings.Lines(output) {
		if t := strings.TrimSpace(line); !strings.HasPrefix(t, "=== ") && !strings.HasPrefix(t, "--- PASS") {
			b.WriteString(line)
		}
	}
	return b.String()[max(0, b.Len()-most):]
}

// report counts what the suites tell and fails if anything failed, or is missing of what must pass.
func (r *results) report(want map[string][]string, took time.Duration) error {
	total := map[string]int{}
	var missing []string
	for _, s := range suites() {
		count := map[string]int{}
		for name, outcome := range r.ended[s.name] {
			count[outcome]++
			total[outcome]++
			if outcome == "FAIL" {
				fmt.Println("failed:", s.name, name)
			} else if r.forgiven[s.name][name] {
				fmt.Println("at the second try only:", s.name, name, outcome)
			}
		}
		for _, name := range want[s.name] {
			if r.ended[s.name][name] != "PASS" {
				missing = append(missing, strings.TrimSpace(s.name+" "+name+" "+r.ended[s.name][name]))
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
