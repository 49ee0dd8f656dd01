package store

import (
	"context"
	"time"
)

// Advisory lock keys of the control plane's loops: one replica runs each.
const (
	LockMonitor   = 0x7772656e01 // "wren" 1
	LockReconcile = 0x7772656e02
	LockOutbox    = 0x7772656e03
	LockExpiry    = 0x7772656e04
	LockMoments   = 0x7772656e05
)

const (
	leaderRetry = 5 * time.Second
	leaderCheck = 10 * time.Second
)

// Lead calls fn while this process holds the advisory lock key, again and again until ctx ends. The
// context given to fn ends when the lock's connection is lost, so two replicas lead at once for at most
// the few seconds that takes to notice; fn's own writes must be safe against that.
func (s *Store) Lead(ctx context.Context, key int64, fn func(context.Context)) {
	for ctx.Err() == nil {
		s.leadOnce(ctx, key, fn)
		select {
		case <-ctx.Done():
		case <-time.After(leaderRetry):
		}
	}
}

func (s *Store) leadOnce(ctx context.Context, key int64, fn func(context.Context)) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return
	}
	defer conn.Release()
	var got bool
	if err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", key).Scan(&got); err != nil || !got {
		return
	}
	lead, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(lead)
	}()
	tick := time.NewTicker(leaderCheck)
	defer tick.Stop()
	for alive := true; alive; {
		select {
		case <-done:
			alive = false
		case <-ctx.Done():
			alive = false
		case <-tick.C:
			check, stop := context.WithTimeout(ctx, leaderCheck)
			alive = conn.Ping(check) == nil
			stop()
		}
	}
	cancel()
	<-done
	release, stop := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
	defer stop()
	if _, err := conn.Exec(release, "SELECT pg_advisory_unlock($1)", key); err != nil {
		_ = conn.Conn().Close(release) // the server lets go of the lock with the session
	}
}
