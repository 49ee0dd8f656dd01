package fleet

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

var allStates = []wrenn.SandboxState{
	wrenn.SandboxCreating, wrenn.SandboxRunning, wrenn.SandboxPausing, wrenn.SandboxPaused, wrenn.SandboxResuming, wrenn.SandboxDeleting, wrenn.SandboxError,
}

const here = "host-here"

func genSnapshots(t *rapid.T) ([]Desired, []Observed) {
	var desired []Desired
	var observed []Observed
	for i := range rapid.IntRange(0, 8).Draw(t, "ids") {
		id := fmt.Sprintf("sb-%d", i)
		if rapid.IntRange(0, 4).Draw(t, "has row") != 0 {
			desired = append(desired, Desired{
				ID: id, HostID: rapid.SampledFrom([]string{here, here, here, "host-there"}).Draw(t, "host"), Status: rapid.SampledFrom(allStates).Draw(t, "status"),
				Revision: rapid.Uint64Range(0, 5).Draw(t, "revision"), Deleted: rapid.IntRange(0, 4).Draw(t, "deleted") == 0,
				Missing: rapid.Bool().Draw(t, "missing"), Settled: rapid.Bool().Draw(t, "settled"),
			})
		}
		if rapid.Bool().Draw(t, "is reported") {
			observed = append(observed, Observed{
				ID: id, State: rapid.SampledFrom(append(allStates, "")).Draw(t, "state"), Revision: rapid.Uint64Range(0, 5).Draw(t, "reported revision"),
				LastActiveAt: time.Unix(rapid.Int64Range(0, 100).Draw(t, "active"), 0),
			})
		}
	}
	return desired, observed
}

func TestReconcileProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		desired, observed := genSnapshots(t)
		rows, reports := map[string]Desired{}, map[string]Observed{}
		for _, d := range desired {
			rows[d.ID] = d
		}
		for _, o := range observed {
			reports[o.ID] = o
		}
		seen := map[string]bool{}
		for _, a := range Reconcile(here, desired, observed) {
			if seen[a.ID] {
				t.Fatalf("two actions for %s", a.ID)
			}
			seen[a.ID] = true
			d, hasRow := rows[a.ID]
			o, reported := reports[a.ID]
			switch a.Kind {
			case ActionRemove:
				if !hasRow || d.HostID != here || (!d.Deleted && d.Status != wrenn.SandboxError) || !reported {
					t.Fatalf("removes %+v, which is not provably ours to remove", d)
				}
			case ActionApply:
				if !hasRow || d.Deleted || d.HostID != here || o.Revision <= d.Revision || (o.State != d.Status && !d.Status.CanBecome(o.State)) {
					t.Fatalf("applies %+v to %+v", o, d)
				}
				if o.State == wrenn.SandboxDeleting || o.State == wrenn.SandboxError || d.Status == wrenn.SandboxDeleting || d.Status == wrenn.SandboxCreating {
					t.Fatalf("a report ends or overrides: %+v on %+v", o, d)
				}
			case ActionMissing:
				if reported || !hasRow || d.Deleted || d.Missing || !d.Settled || d.HostID != here {
					t.Fatalf("calls %+v missing", d)
				}
			case ActionUnknown:
				if hasRow && d.HostID == here {
					t.Fatalf("%+v is not unknown", d)
				}
			case ActionTouch:
				if !hasRow || !reported {
					t.Fatalf("touches %s", a.ID)
				}
			default:
				t.Fatalf("unknown action %+v", a)
			}
		}
		// What is applied leaves nothing to apply, and nothing is missing twice.
		for _, a := range Reconcile(here, applied(desired, Reconcile(here, desired, observed)), observed) {
			if a.Kind == ActionApply || a.Kind == ActionMissing {
				t.Fatalf("%s again: %+v", a.Kind, a)
			}
		}
	})
}

func applied(desired []Desired, actions []Action) []Desired {
	byID := map[string]Action{}
	for _, a := range actions {
		byID[a.ID] = a
	}
	out := append([]Desired{}, desired...)
	for i := range out {
		switch a := byID[out[i].ID]; a.Kind {
		case ActionApply:
			out[i].Status, out[i].Revision, out[i].Missing = a.Observed.State, a.Revision, false
		case ActionMissing:
			out[i].Missing = true
		}
	}
	return out
}

// Reports that come late, twice or in another order lead to the state of the newest.
func TestReportsInAnyOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		history := []Observed{
			{ID: "sb-1", State: wrenn.SandboxPaused, Revision: 3}, {ID: "sb-1", State: wrenn.SandboxRunning, Revision: 4}, {ID: "sb-1", State: wrenn.SandboxPaused, Revision: 5},
		}
		row := []Desired{{ID: "sb-1", HostID: here, Status: wrenn.SandboxRunning, Revision: 2}}
		sequence := append(rapid.SliceOf(rapid.SampledFrom(history)).Draw(t, "reports"), history[2])
		sequence = append(sequence, rapid.SliceOf(rapid.SampledFrom(history)).Draw(t, "late reports")...)
		for _, o := range sequence {
			row = applied(row, Reconcile(here, row, []Observed{o}))
		}
		if want := (Desired{ID: "sb-1", HostID: here, Status: wrenn.SandboxPaused, Revision: 5}); !cmp.Equal(row[0], want) {
			t.Fatal(cmp.Diff(want, row[0]))
		}
	})
}
