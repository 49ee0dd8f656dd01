package fleet

import (
	"encoding/json"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Desired is a sandbox's row, as read after its host reported.
type Desired struct {
	ID       string
	HostID   string
	Status   wrenn.SandboxState
	Revision uint64
	Deleted  bool // the row is kept only as the proof that the sandbox was ours and was deleted
	Missing  bool // already known to be missing on its host
	// Settled: the row was there, in this same status, already before the host was asked. Only then does the
	// host's silence about it mean anything.
	Settled bool
}

// Observed is a sandbox as its host reports it.
type Observed struct {
	ID           string
	State        wrenn.SandboxState // "" for one this version does not know
	Revision     uint64
	Reason       string
	LastActiveAt time.Time
	DurableAt    *time.Time      // since when a paused state survives a power cut
	Needs        json.RawMessage // what can resume its memory, if it has one at rest
}

// ActionKind is what is to be done about one sandbox.
type ActionKind string

const (
	ActionApply   ActionKind = "apply"   // write the reported state: it is newer
	ActionTouch   ActionKind = "touch"   // nothing but activity is newer
	ActionMissing ActionKind = "missing" // its host does not have it: say so, change nothing
	ActionRemove  ActionKind = "remove"  // provably ours and not wanted: have the host remove it
	ActionUnknown ActionKind = "unknown" // no row: count and log, never touch
)

// Action about one sandbox.
type Action struct {
	Kind     ActionKind
	ID       string
	From     wrenn.SandboxState // the status the row must still have (apply, missing)
	Revision uint64             // apply: the new one; missing: the one the row must still have
	Observed Observed           // apply, touch
}

// Reconcile compares the rows with what one host reports and says what to do. It is a pure function of
// two snapshots. Its rules:
//
//   - A report is applied only if its revision is newer than the row's and the step is a legal one.
//   - Rows with an operation under way (creating, deleting) belong to that operation.
//   - A reported sandbox is removed only if its row says that it was deleted or that its create failed on this very host.
//     Without a row nobody can tell whose it is (the database may have been restored from a backup), and a
//     row of another host is no proof either: both are only told.
//   - A sandbox that its host does not report keeps its state: it may be back after a repair.
func Reconcile(hostID string, desired []Desired, observed []Observed) []Action {
	rows := make(map[string]Desired, len(desired))
	for _, d := range desired {
		rows[d.ID] = d
	}
	var actions []Action
	reported := make(map[string]bool, len(observed))
	for _, o := range observed {
		reported[o.ID] = true
		if a := judge(hostID, rows, o); a.Kind != "" {
			actions = append(actions, a)
		}
	}
	for _, d := range desired {
		if d.HostID == hostID && !d.Deleted && !d.Missing && d.Settled && stable(d.Status) && !reported[d.ID] {
			actions = append(actions, Action{Kind: ActionMissing, ID: d.ID, From: d.Status, Revision: d.Revision})
		}
	}
	return actions
}

func judge(hostID string, rows map[string]Desired, o Observed) Action {
	d, ok := rows[o.ID]
	switch {
	case !ok, d.HostID != hostID:
		return Action{Kind: ActionUnknown, ID: o.ID}
	case d.Deleted, d.Status == wrenn.SandboxError:
		return Action{Kind: ActionRemove, ID: o.ID}
	case !stable(d.Status):
		return Action{}
	case o.Revision > d.Revision && stable(o.State) && (o.State == d.Status || d.Status.CanBecome(o.State)):
		return Action{Kind: ActionApply, ID: o.ID, From: d.Status, Revision: o.Revision, Observed: o}
	default:
		return Action{Kind: ActionTouch, ID: o.ID, Observed: o}
	}
}

// stable states are those that the host may change by itself.
func stable(s wrenn.SandboxState) bool {
	switch s {
	case wrenn.SandboxRunning, wrenn.SandboxPausing, wrenn.SandboxPaused, wrenn.SandboxResuming:
		return true
	default:
		return false
	}
}
