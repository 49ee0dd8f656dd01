package fleet

import "sync/atomic"

// Stats count what the fleet did since the process started.
type Stats struct {
	Created, CreatedCold, CreateFailures, Deleted, PlacementFailures, TakenOver, Unknown, Heartbeats atomic.Int64
}

// Stats gives the live counters.
func (f *Fleet) Stats() *Stats { return f.stats }
