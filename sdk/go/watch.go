package wrenn

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"

	"github.com/coder/websocket"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// FileEvent is a change below a watched directory.
type FileEvent struct {
	Event api.WatchMessageEvent
	// Name is relative to the watched directory.
	Name string
}

// Watch gives the changes of a directory, and of those below it if recursive. It returns once the
// watch is in place; the sequence ends with an error when it cannot go on, which includes the end of ctx.
func (f Files) Watch(ctx context.Context, path string, recursive bool) (iter.Seq2[FileEvent, error], error) {
	q := f.query(path)
	if recursive {
		q.Set("recursive", "true")
	}
	conn, err := f.sandbox.client.dial(ctx, f.sandbox.path("/files/watch"), q)
	if err != nil {
		return nil, err
	}
	if m, err := readWatch(ctx, conn); err != nil {
		_ = conn.CloseNow()
		return nil, err
	} else if m.Type != api.WatchMessageTypeStart {
		_ = conn.CloseNow()
		return nil, fmt.Errorf("wrenn: the server began a watch with %q", m.Type)
	}
	return func(yield func(FileEvent, error) bool) {
		defer func() { _ = conn.CloseNow() }()
		for {
			m, err := readWatch(ctx, conn)
			if err != nil {
				yield(FileEvent{}, err)
				return
			}
			if m.Type == api.WatchMessageTypeEvent && !yield(FileEvent{Event: m.Event, Name: m.Name}, nil) {
				return
			}
		}
	}, nil
}

func readWatch(ctx context.Context, conn *websocket.Conn) (*api.WatchMessage, error) {
	_, raw, err := conn.Read(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("the watch was cut off: %w", err)
	}
	var m api.WatchMessage
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("wrenn: a message of the watch is not understood: %w", err)
	}
	if m.Type == api.WatchMessageTypeError {
		e := &APIError{}
		e.fill(m.Error)
		return nil, e
	}
	return &m, nil
}

func decode(r io.Reader, out any) error {
	if err := json.NewDecoder(io.LimitReader(r, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("wrenn: reading the answer: %w", err)
	}
	return nil
}
