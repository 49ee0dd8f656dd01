// Package ephemeral owns what the control plane keeps in Redis: things that may expire or be lost without
// losing a user's work (one-time tokens, rate limits, live events). Nothing durable belongs here.
package ephemeral

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	dialTimeout = 3 * time.Second
	ioTimeout   = 3 * time.Second
)

// Redis is the connection to the server.
type Redis struct {
	c     *redis.Client
	local *windows
	count *redis.Script
}

// Open makes the pool; it connects when first used.
func Open(url string) (*Redis, error) {
	quiet.Do(func() { redis.SetLogger(silence{}) })
	opt, err := redis.ParseURL(url)
	if err != nil {
		return nil, fmt.Errorf("redis URL: %w", err)
	}
	opt.DialTimeout, opt.ReadTimeout, opt.WriteTimeout = dialTimeout, ioTimeout, ioTimeout
	opt.ContextTimeoutEnabled = true
	opt.MaxRetries, opt.DialerRetries = 1, 1 // a Redis that is away is told at once
	opt.PoolSize = 16
	return &Redis{c: redis.NewClient(opt), local: newWindows(), count: redis.NewScript(count)}, nil
}

// quiet guards the library's one logger, which writes to standard error past our log what its calls
// return as errors anyway.
var quiet sync.Once

type silence struct{}

// Printf implements the library's logger.
func (silence) Printf(context.Context, string, ...any) {}

// Close closes the pool.
func (r *Redis) Close() error { return r.c.Close() }

// Ping asks the server.
func (r *Redis) Ping(ctx context.Context) error { return r.c.Ping(ctx).Err() }

// Error is any failure to reach or use Redis.
type Error struct{ cause error }

func (e *Error) Error() string { return "redis: " + e.cause.Error() }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.cause }

// IsUnavailable tells that Redis failed.
func IsUnavailable(err error) bool {
	var e *Error
	return errors.As(err, &e)
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return &Error{err}
}

func tokenKey(hash []byte) string { return "wrenn:host-token:" + hex.EncodeToString(hash) }

// PutHostToken keeps a one-time registration token, by its hash, for ttl.
func (r *Redis) PutHostToken(ctx context.Context, hash []byte, hostID string, ttl time.Duration) error {
	return wrap(r.c.Set(ctx, tokenKey(hash), hostID, ttl).Err())
}

// TakeHostToken spends a one-time token: of any number of callers, one gets the host id, the rest "".
func (r *Redis) TakeHostToken(ctx context.Context, hash []byte) (string, error) {
	id, err := r.c.GetDel(ctx, tokenKey(hash)).Result()
	if errors.Is(err, redis.Nil) {
		return "", nil
	}
	return id, wrap(err)
}

// DropHostTokens forgets tokens.
func (r *Redis) DropHostTokens(ctx context.Context, hashes [][]byte) error {
	if len(hashes) == 0 {
		return nil
	}
	keys := make([]string, len(hashes))
	for i, h := range hashes {
		keys[i] = tokenKey(h)
	}
	return wrap(r.c.Del(ctx, keys...).Err())
}

// Publish sends a message to whoever listens now.
func (r *Redis) Publish(ctx context.Context, channel string, message []byte) error {
	return wrap(r.c.Publish(ctx, channel, message).Err())
}

// Subscribe gives the messages published from now on, until ctx ends.
func (r *Redis) Subscribe(ctx context.Context, channel string) (<-chan string, error) {
	sub := r.c.Subscribe(ctx, channel)
	if _, err := sub.Receive(ctx); err != nil {
		_ = sub.Close()
		return nil, wrap(err)
	}
	out := make(chan string)
	go func() {
		defer close(out)
		defer sub.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case m, ok := <-sub.Channel():
				if !ok {
					return
				}
				select {
				case out <- m.Payload:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, nil
}
