package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// event is a line of `go test -json` (see `go doc test2json`); build failures name ImportPath.
type event struct {
	Action, Package, ImportPath, Test, Output, FailedBuild string
	Elapsed                                                float64
}

// report counts tests and keeps the output of those that may yet fail.
type report struct {
	w                       io.Writer
	began                   time.Time
	passed, failed, skipped int
	failures, skips         []string
	output                  map[string]*strings.Builder
	broken                  bool
}

func newReport(w io.Writer) *report {
	return &report{w: w, began: time.Now(), output: map[string]*strings.Builder{}}
}

const maxLine = 4 << 20

func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 64<<10), maxLine)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(r.w, lines.Text()) // not from a test: let it be seen
			continue
		}
		r.take(e)
	}
	return lines.Err()
}

func (r *report) take(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		if strings.HasPrefix(e.Output, "=== ") { // RUN, PAUSE, CONT: the verdict follows anyway
			return
		}
		if r.output[key] == nil {
			r.output[key] = &strings.Builder{}
		}
		r.output[key].WriteString(e.Output)
	case "build-output":
		fmt.Fprint(r.w, e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e, key)
		} else {
			r.endTest(e, key)
		}
		delete(r.output, key)
	}
}

func (r *report) endTest(e event, key string) {
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed++
		r.failures = append(r.failures, key)
		fmt.Fprintf(r.w, "%s", r.text(key))
	case "skip":
		r.skipped++
		r.skips = append(r.skips, key+reason(r.text(key)))
	}
}

// endPackage prints the package's own last line, as go test does. A package that fails by itself (it
// does not build, or crashes) counts as a failure, with all it has said.
func (r *report) endPackage(e event, key string) {
	text := r.text(key)
	switch {
	case e.Action == "fail" && !r.hasFailure(e.Package):
		r.failed++
		r.failures = append(r.failures, e.Package)
		for k, b := range r.output {
			if strings.HasPrefix(k, e.Package+" ") && k != key {
				fmt.Fprint(r.w, b.String()) // a test that never ended
			}
		}
		fmt.Fprint(r.w, text)
	case e.Action == "fail":
		fmt.Fprintf(r.w, "FAIL\t%s\t%.1fs\n", e.Package, e.Elapsed)
	case !strings.Contains(text, "[no test files]"):
		fmt.Fprint(r.w, lastLine(text))
	}
}

func (r *report) hasFailure(pkg string) bool {
	for _, f := range r.failures {
		if strings.HasPrefix(f, pkg+" ") {
			return true
		}
	}
	return false
}

func (r *report) text(key string) string {
	if b := r.output[key]; b != nil {
		return b.String()
	}
	return ""
}

// exited notes that go test failed; if no test did, that alone is a failure.
func (r *report) exited(module string, err *exec.ExitError) {
	if r.failed == 0 {
		r.broken = true
		fmt.Fprintf(r.w, "go test in %s: %v\n", module, err)
	}
}

// close prints the end of the report and tells whether all is well.
func (r *report) close() bool {
	for _, s := range r.skips {
		fmt.Fprintln(r.w, "skipped:", s)
	}
	for _, f := range r.failures {
		fmt.Fprintln(r.w, "failed:", f)
	}
	fmt.Fprintf(r.w, "%d passed, %d failed, %d skipped in %s\n", r.passed, r.failed, r.skipped, time.Since(r.began).Round(time.Second))
	return r.failed == 0 && !r.broken
}

// reason is what a skipped test said.
func reason(text string) string {
	for _, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
			return ": " + line
		}
	}
	return ""
}

func lastLine(text string) string {
	lines := strings.SplitAfter(strings.TrimRight(text, "\n"), "\n")
	return strings.TrimRight(lines[len(lines)-1], "\n") + "\n"
}
