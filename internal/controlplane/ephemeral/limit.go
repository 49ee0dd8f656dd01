package ephemeral

import (
	"context"
	"sync"
	"time"
)

// Limit is so many events in a window.
type Limit struct {
	Name   string
	Events int
	Window time.Duration
}

// count adds to a fixed window and gives its count and what is left of it in milliseconds.
const count = `
local n = redis.call('INCRBY', KEYS[1], ARGV[2])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
  left = tonumber(ARGV[1])
end
return {n, left}`

// Allow counts one event of subject and tells whether the limit still allowed it; if not, wait is how
// long until the next may succeed. Without Redis each process counts by itself: an outage of Redis
// neither locks users out nor lifts the limit.
func (r *Redis) Allow(ctx context.Context, l Limit, subject string) (ok bool, wait time.Duration) {
	n, left := r.add(ctx, l, subject, 1)
	return n <= l.Events, left
}

// Check tells what Allow would, without counting.
func (r *Redis) Check(ctx context.Context, l Limit, subject string) (ok bool, wait time.Duration) {
	n, left := r.add(ctx, l, subject, 0)
	return n < l.Events, left
}

func (r *Redis) add(ctx context.Context, l Limit, subject string, n int) (int, time.Duration) {
	key := "wrenn:limit:" + l.Name + ":" + subject
	res, err := r.count.Run(ctx, r.c, []string{key}, l.Window.Milliseconds(), n).Int64Slice()
	if err != nil || len(res) != 2 {
		return r.local.add(key, n, l.Window, time.Now())
	}
	return int(res[0]), time.Duration(res[1]) * time.Millisecond
}

// windows are the counters of one process, for when Redis is away.
type windows struct {
	mu sync.Mutex
	m  map[string]window
}

type window struct {
	count int
	ends  time.Time
}

const maxWindows = 100_000 // bounds memory under an attack from many addresses

func newWindows() *windows { return &windows{m: map[string]window{}} }

func (w *windows) add(key string, n int, length time.Duration, now time.Time) (int, time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	cur, ok := w.m[key]
	if !ok || !now.Before(cur.ends) {
		w.makeRoom(now)
		cur = window{ends: now.Add(length)}
	}
	cur.count += n
	w.m[key] = cur
	return cur.count, cur.ends.Sub(now)
}

func (w *windows) makeRoom(now time.Time) {
	if len(w.m) < maxWindows {
		return
	}
	for k, v := range w.m {
		if !now.Before(v.ends) || len(w.m) >= maxWindows {
			delete(w.m, k)
		}
	}
}
