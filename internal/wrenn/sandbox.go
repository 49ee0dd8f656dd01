package wrenn

import "slices"

// SandboxState is where a sandbox is in its life.
//
//	creating ──► running ◄──► paused ──► (deleted)
//	    │           │ pausing / resuming while an operation runs; resuming also while a rollback does
//	    └► error    └────────► deleting ──► (deleted)
//
// `error` is only for a create that failed. A state is never guessed: an unreachable host leaves it
// as it is.
type SandboxState string

const (
	SandboxCreating SandboxState = "creating"
	SandboxRunning  SandboxState = "running"
	SandboxPausing  SandboxState = "pausing"
	SandboxPaused   SandboxState = "paused"
	SandboxResuming SandboxState = "resuming"
	SandboxDeleting SandboxState = "deleting"
	SandboxError    SandboxState = "error"
)

var sandboxNext = map[SandboxState][]SandboxState{
	SandboxCreating: {SandboxRunning, SandboxError, SandboxDeleting},
	SandboxRunning:  {SandboxPausing, SandboxPaused, SandboxResuming, SandboxDeleting},
	SandboxPausing:  {SandboxPaused, SandboxRunning, SandboxDeleting},
	SandboxPaused:   {SandboxResuming, SandboxRunning, SandboxDeleting},
	SandboxResuming: {SandboxRunning, SandboxPaused, SandboxDeleting},
	SandboxError:    {SandboxDeleting},
	SandboxDeleting: {},
}

// CanBecome tells whether a sandbox in state s may go to next in one step.
func (s SandboxState) CanBecome(next SandboxState) bool { return slices.Contains(sandboxNext[s], next) }

// Valid tells whether s is one of the states.
func (s SandboxState) Valid() bool { _, ok := sandboxNext[s]; return ok }

// OnTimeout is what happens to a sandbox that was idle for its timeout.
type OnTimeout string

const (
	OnTimeoutPause OnTimeout = "pause"
	OnTimeoutKill  OnTimeout = "kill"
)

// Bounds of what a sandbox may ask for. They are checked at both edges: REST and agent RPC.
const (
	MaxVCPUs    = 32
	MinMemoryMB = 128
	MaxMemoryMB = 64 * 1024
	MinDiskMB   = 64
	MaxDiskMB   = 1024 * 1024

	DefaultTemplate = "minimal"
	DefaultVCPUs    = 1
	DefaultMemoryMB = 512
)
