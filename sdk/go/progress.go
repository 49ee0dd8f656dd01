package wrenn

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// progressAfter is when a call begins to listen for its progress: before that the server tells none.
const progressAfter = 100 * time.Millisecond

type progressKey struct{}

// WithProgress has creates, pauses, resumes, forks, checkpoints, rollbacks and snapshots that are made with the
// returned context tell where they are while they take their time, by calls of tell: one at a time, at most five
// a second, none after the operation's own call has returned. What is told may have gaps.
func WithProgress(ctx context.Context, tell func(api.Progress)) context.Context {
	return context.WithValue(ctx, progressKey{}, tell)
}

// followProgress tells the progress of the request with this Idempotency-Key until stop is called.
func (c *Client) followProgress(ctx context.Context, key string) (stop func()) {
	tell, _ := ctx.Value(progressKey{}).(func(api.Progress))
	if tell == nil || key == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.tellProgress(ctx, markOf(key), tell)
	}()
	return func() {
		cancel()
		<-done
	}
}

func (c *Client) tellProgress(ctx context.Context, mark string, tell func(api.Progress)) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(progressAfter):
	}
	for e, err := range c.Events(ctx, EventOptions{}) {
		if err != nil {
			return // the operation itself tells what is wrong
		}
		if p, ok := ProgressOf(e); ok && p.Request == mark && ctx.Err() == nil {
			tell(p)
		}
	}
}

// ProgressOf gives the progress that an event tells.
func ProgressOf(e api.Event) (p api.Progress, ok bool) {
	if e.Type != "sandbox.progress" {
		return p, false
	}
	raw, err := json.Marshal(e.Data)
	return p, err == nil && json.Unmarshal(raw, &p) == nil
}

// markOf is how the server names the request with this Idempotency-Key in its progress.
func markOf(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:8])
}
