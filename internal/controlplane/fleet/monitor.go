package fleet

import (
	"context"
	"encoding/json"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
)

const (
	purgeEvery = 10 * time.Minute
	relayEvery = 200 * time.Millisecond
	relayLimit = 500

	// EventsTopic is where the outbox is published in Redis.
	EventsTopic = "wrenn:events"
)

// monitor marks silent hosts offline and clears away what has served its time; one replica runs it.
// Sandboxes of an offline host keep their state.
func (f *Fleet) monitor(ctx context.Context) {
	var purged time.Time
	every(ctx, f.times.MonitorEvery, func(ctx context.Context) {
		if err := f.markOffline(ctx); err != nil && ctx.Err() == nil {
			f.log.Warn("host monitor", "error", err)
		}
		if time.Since(purged) < purgeEvery {
			return
		}
		purged = time.Now()
		for _, purge := range []func(context.Context) error{f.store.PurgeIdempotencyKeys, f.store.PurgeEvents, f.store.PurgeDeleted} {
			if err := purge(ctx); err != nil && ctx.Err() == nil {
				f.log.Warn("purge", "error", err)
			}
		}
	})
}

func (f *Fleet) markOffline(ctx context.Context) error {
	return f.store.Tx(ctx, func(tx store.Tx) error {
		hosts, err := tx.MarkSilentHostsOffline(ctx, f.times.HostSilence)
		if err != nil {
			return err
		}
		for _, h := range hosts {
			f.log.Warn("host is offline: no heartbeat", "host_id", h.ID, "silence", f.times.HostSilence)
			if err := event(ctx, tx, "host.offline", h.TeamID, h.ID, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// relayEvents gives events their order and publishes them in it; one replica runs it. An event may be published
// twice, never not at all.
func (f *Fleet) relayEvents(ctx context.Context) {
	every(ctx, relayEvery, func(ctx context.Context) {
		for {
			n, err := f.relayOnce(ctx)
			if err != nil && ctx.Err() == nil {
				f.log.Warn("publish events", "error", err)
			}
			if err != nil || n < relayLimit {
				return
			}
		}
	})
}

func (f *Fleet) orderEvents(ctx context.Context) error {
	return f.store.Tx(ctx, func(tx store.Tx) error {
		if err := tx.LockEventOrder(ctx); err != nil {
			return err
		}
		_, err := tx.OrderEvents(ctx, relayLimit)
		return err
	})
}

func (f *Fleet) relayOnce(ctx context.Context) (int, error) {
	if err := f.orderEvents(ctx); err != nil {
		return 0, err
	}
	events, err := f.store.UnpublishedEvents(ctx, relayLimit)
	if err != nil || len(events) == 0 {
		return 0, err
	}
	ids := make([]int64, len(events))
	for i, e := range events {
		ids[i] = e.ID
		raw, err := json.Marshal(map[string]any{
			"id": e.Seq, "type": e.Type, "team_id": e.TeamID, "subject": e.Subject, "data": e.Data, "created_at": e.CreatedAt.UTC(),
		})
		if err != nil {
			return 0, err
		}
		if err := f.redis.Publish(ctx, EventsTopic, raw); err != nil {
			return 0, err
		}
	}
	f.fault("events", ".published")
	return len(events), f.store.MarkPublished(ctx, ids)
}
