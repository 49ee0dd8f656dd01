//go:build linux

// Command firecracker runs the tests that need a hypervisor with a real Firecracker: the conformance suite, what confines
// VMMs, the agent's own tests and the end-to-end tests. Where KVM runs our kernel it does so right here; elsewhere inside an
// emulated machine that has KVM (an AMD processor with SVM, emulated by QEMU), with longer time limits. It prints
// what the tests print, and fails if fewer checks passed than QEMU runs.
//
//	FIRECRACKER_BIN=/path/firecracker JAILER_BIN=/path/jailer go run ./test/firecracker [suite…]
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/firecracker"
)

func main() { os.Exit(program()) }

func program() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(binaries()) == 0 {
		fmt.Println("skipped: FIRECRACKER_BIN and JAILER_BIN do not name a Firecracker and its jailer (of one release, from Firecracker's release page)")
		return 0
	}
	if err := run(ctx, inputs{}); err != nil {
		fmt.Fprintln(os.Stderr, "test/firecracker:", err)
		return 1
	}
	return 0
}

// inputs are what is tested, as of test/stack.
type inputs struct{ bin, kernel, images string }

// binaries are pairs of a Firecracker and its jailer. The variables may name several, separated by colons: VMs then run
// with the newest, and a resume is tested that takes another.
func binaries() (pairs [][2]string) {
	jailers := filepath.SplitList(os.Getenv("JAILER_BIN"))
	for i, path := range filepath.SplitList(os.Getenv("FIRECRACKER_BIN")) {
		if i < len(jailers) {
			pairs = append(pairs, [2]string{path, jailers[i]})
		}
	}
	return pairs
}

// suite is a test program and what it must run.
type suite struct {
	name, pkg string
	only      string // -test.run
	skip      string // -test.skip: what needs no VM, measures speed or waits
	env       string // VARIABLE=value
}

// suites are all, or those that the arguments name.
func suites() []suite {
	conformance := []string{"TestEveryRequestIsAsFirecrackerDescribesIt"}
	if len(binaries()) < 2 {
		conformance = append(conformance, "TestResumeTakesTheVersionThatSaved")
	}
	all := []suite{
		{"conformance", "./internal/agent/vm/firecracker", ".", strings.Join(conformance, "|"), ""},
		{"processes", "./internal/agent/vm/vmproc", ".", "", ""}, // with version 2 of cgroups
		{"agent", "./internal/agent", "TestLifeOfASandbox|TestForkCheckpointAndRollback", "", ""},
		{"e2e", "./test/e2e", ".", "TestNeighbourUnderAttack|TestHostOutlivesItsCredentials", ""},
		{"e2e-uffd", "./test/e2e", "TestPauseKeepsProcessesAndFiles|TestForkGoesOnFromThisMoment|TestCheckpointsGoBackAndForth", "", "AGENT_FIRECRACKER_MEMORY=uffd"},
	}
	if len(os.Args) > 1 {
		named := slices.DeleteFunc(slices.Clone(all), func(s suite) bool { return !slices.Contains(os.Args[1:], s.name) })
		if len(named) > 0 {
			return named
		}
	}
	return all
}

func run(ctx context.Context, in inputs) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: virtual machines get namespaces, mounts and cgroups")
	}
	for variable, to := range map[string]*string{"WRENN_TEST_BIN": &in.bin, "WRENN_TEST_KERNEL": &in.kernel, "WRENN_TEST_IMAGES": &in.images} {
		if *to = os.Getenv(variable); *to == "" {
			return fmt.Errorf("%s is not set; use make test-firecracker", variable)
		}
	}
	dir, err := os.MkdirTemp("", "wrenn-firecracker-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	stage := filepath.Join(dir, "stage")
	if err := in.stage(ctx, stage); err != nil {
		return err
	}
	want, err := expected(ctx, stage)
	if err != nil {
		return err
	}
	verdict, err := firecracker.Probe(ctx, firecracker.ProbeOptions{Dir: filepath.Join(stage, "firecracker"), Kernel: in.kernel})
	if err != nil {
		return err
	}
	fmt.Println("here:", verdict.Reason)
	begun := time.Now()
	got := &results{}
	if verdict.Works {
		err = direct(ctx, stage, filepath.Join(dir, "results"), got)
	} else {
		got.forgiven = map[string]map[string]bool{}
		err = inMachine(ctx, dir, stage, got)
	}
	return errors.Join(err, got.report(want, time.Since(begun)))
}

// stage collects in a directory all that the tests need: programs, images, test binaries.
func (in inputs) stage(ctx context.Context, dir string) error {
	for _, folder := range []string{"firecracker", "tests", "builds", "kernels", "images"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil {
			return err
		}
	}
	builds := map[string]string{"tests/guest": "./internal/agent/vm/vmtest/guest"}
	for to, pkg := range builds {
		if err := command(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, to), pkg); err != nil {
			return err
		}
	}
	for _, s := range suites() {
		if err := command(ctx, "go", "test", "-c", "-o", filepath.Join(dir, "tests", s.name), s.pkg); err != nil {
			return err
		}
	}
	copies := [][2]string{
		{filepath.Join(in.bin, "."), "builds"}, {filepath.Join(filepath.Dir(in.kernel), "."), "kernels"},
		{filepath.Join(in.images, "."), "images"},
	}
	for i, pair := range binaries() {
		copies = append(copies, [2]string{pair[0], fmt.Sprintf("firecracker/firecracker-%d", i)}, [2]string{pair[1], fmt.Sprintf("firecracker/jailer-%d", i)})
	}
	for _, c := range copies {
		from := c[0]
		if info, err := os.Stat(from); err == nil && info.IsDir() {
			from += "/."
		}
		if err := command(ctx, "cp", "-rL", "--sparse=always", from, filepath.Join(dir, c[1])); err != nil {
			return err
		}
	}
	return nil
}

// command runs a program, which is not to be dynamic if it is one that is built.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %.2000s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// expected lists what must pass: by suite, the checks that QEMU runs here and the tests of the other programs.
func expected(ctx context.Context, stage string) (map[string][]string, error) {
	fmt.Println("the conformance suite with QEMU, for what must be run:")
	out, err := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-run", "TestQEMUConforms", "./internal/agent/vm/qemu").CombinedOutput()
	want := map[string][]string{}
	for name := range passed(string(out)) {
		if _, check, ok := strings.Cut(name, "TestQEMUConforms/"); ok {
			want["conformance"] = append(want["conformance"], "TestFirecrackerConforms/"+check)
		}
	}
	if err != nil || len(want["conformance"]) == 0 {
		return nil, fmt.Errorf("the suite does not pass with QEMU: %w\n%s", err, telling(string(out)))
	}
	for _, s := range suites() {
		skipped, err := regexp.Compile("^(" + s.skip + ")$")
		if err != nil {
			return nil, err
		}
		out, err := exec.CommandContext(ctx, filepath.Join(stage, "tests", s.name), "-test.list", s.only).Output()
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", s.name, err)
		}
		for line := range strings.Lines(string(out)) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "Test") && !skipped.MatchString(line) {
				want[s.name] = append(want[s.name], line)
			}
		}
	}
	return want, nil
}

// direct runs the suites on this host.
func direct(ctx context.Context, stage, file string, got *results) error {
	cmd := exec.CommandContext(ctx, "bash", "-c", suiteScript(got), "suites", stage, file)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	printed, readErr := os.ReadFile(file)
	got.add(string(printed))
	return errors.Join(err, readErr)
}
