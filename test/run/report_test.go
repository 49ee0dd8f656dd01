package main

import (
	"slices"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, events string
		ok           bool
		want         []string
	}{
		{"all well", `{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:3: needs root\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}`, true, []string{"ok  \tp\t0.1s", "skipped: p TestB: b_test.go:3: needs root", "1 passed, 0 failed, 1 skipped"}},
		{"a failing test", `{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: got 2\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}`, false, []string{"a_test.go:1: got 2", "failed: p TestA", "0 passed, 1 failed, 0 skipped"}},
		{"a crash", `{"Action":"output","Package":"p","Test":"TestA","Output":"panic: boom\n"}
{"Action":"fail","Package":"p"}`, false, []string{"panic: boom", "failed: p", "0 passed, 1 failed, 0 skipped"}},
		{"does not build", `{"ImportPath":"p","Action":"build-output","Output":"p.go:1: syntax error\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"fail","Package":"p","FailedBuild":"p"}`, false, []string{"p.go:1: syntax error", "0 passed, 1 failed, 0 skipped"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(tc.events)); err != nil {
				t.Fatal(err)
			}
			if ok := r.close(); ok != tc.ok {
				t.Errorf("ok is %v", ok)
			}
			for _, want := range tc.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%q is missing in:\n%s", want, out.String())
				}
			}
		})
	}
}

func TestModulesWithoutANamedPackageAreLeftOut(t *testing.T) {
	t.Chdir("../..")
	for _, c := range []struct {
		args string
		want []string
	}{
		{"-timeout 30m ./...", modules},
		{"-run TestX ./test/chaos", []string{"."}},
		{"./test/chaos ./internal/agent", []string{"."}},
		{"./nowhere", nil},
	} {
		var got []string
		for _, m := range modules {
			if has(m, strings.Fields(c.args)) {
				got = append(got, m)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.args, got, c.want)
		}
	}
}
