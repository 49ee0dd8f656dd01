//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// verdicts are the lines by which a test program tells how a test or a part of one ended.
var verdicts = regexp.MustCompile(`(?m)^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)

// outcomes maps each test of a program's output to PASS, FAIL or SKIP.
func outcomes(output string) map[string]string {
	all := map[string]string{}
	for _, m := range verdicts.FindAllStringSubmatch(output, -1) {
		all[m[2]] = m[1]
	}
	return all
}

func passed(output string) map[string]bool {
	all := map[string]bool{}
	for name, outcome := range outcomes(output) {
		if outcome == "PASS" {
			all[name] = true
		}
	}
	return all
}

// report counts what the suites' logs tell and fails if anything failed, or is missing of what must pass.
func report(results string, want map[string][]string, took time.Duration) error {
	total := map[string]int{}
	var missing []string
	for _, s := range suites() {
		log, err := os.ReadFile(filepath.Join(results, s.name+".log"))
		if err != nil {
			return fmt.Errorf("no results of %s: %w", s.name, err)
		}
		count := map[string]int{}
		all := outcomes(string(log))
		for _, outcome := range all {
			count[outcome]++
			total[outcome]++
		}
		for _, name := range want[s.name] {
			if all[name] != "PASS" {
				missing = append(missing, s.name+" "+name+" "+all[name])
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
		return fmt.Errorf("%d failed, %d that pass with QEMU did not pass with Firecracker: %s",
			total["FAIL"], len(missing), strings.Join(missing[:min(3, len(missing))], ", "))
	}
	return nil
}
