package wrenn

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// EventOptions say which events to follow.
type EventOptions struct {
	// After is the id of an event: those that came since are told first. Without it, and without All, events are
	// told from now on.
	After int64
	// All begins with the oldest that is kept.
	All bool
	// Subject is the one sandbox or snapshot to follow; empty for all.
	Subject string
}

// maxEventLine bounds one line of a stream of events.
const maxEventLine = 1 << 20

// Events follows what happens to the team's things, in order, until the caller breaks off or ctx ends. A
// connection that is cut off is made again where it was; an event is given once.
func (c *Client) Events(ctx context.Context, o EventOptions) iter.Seq2[api.Event, error] {
	return func(yield func(api.Event, error) bool) {
		f := &follower{client: c, options: o, known: o.After > 0 || o.All, last: o.After}
		for try := 1; ; try++ {
			before := f.last
			err := f.follow(ctx, yield)
			if errors.Is(err, errEnough) {
				return
			}
			if f.last > before {
				try = 1
			}
			wait, again := retryDelay(err, min(try, attempts))
			if !again || ctx.Err() != nil {
				yield(api.Event{}, errors.Join(ctx.Err(), err))
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
	}
}

// errEnough tells that the caller wants no more.
var errEnough = errors.New("enough")

type follower struct {
	client  *Client
	options EventOptions
	known   bool // last counts
	last    int64
}

// follow gives the events of one connection.
func (f *follower) follow(ctx context.Context, yield func(api.Event, error) bool) error {
	q := url.Values{}
	set(q, "subject", f.options.Subject)
	if f.known {
		q.Set("after", strconv.FormatInt(f.last, 10))
	}
	req, err := f.client.request(ctx, call{method: http.MethodGet, path: "/v1/events", query: q}, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/event-stream")
	res, err := f.client.http.Do(req)
	if err != nil {
		return f.client.connectionError(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return readError(res)
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxEventLine)
	var id, data string
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "id":
			id = value
		case "data":
			data = value
		case "": // the end of an event, or a comment
			if err := f.take(id, data, yield); err != nil {
				return err
			}
			id, data = "", ""
		}
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return f.client.connectionError(ctx, err)
}

// take gives one event. An id without data only tells where the stream is.
func (f *follower) take(id, data string, yield func(api.Event, error) bool) error {
	if data == "" {
		if n, err := strconv.ParseInt(id, 10, 64); err == nil && !f.known {
			f.last, f.known = n, true
		}
		return nil
	}
	var e api.Event
	if err := json.Unmarshal([]byte(data), &e); err != nil {
		return fmt.Errorf("wrenn: an event is not understood: %w", err)
	}
	if e.ID != 0 { // else it is not kept, and where the stream is stays as it was
		if f.known && e.ID <= f.last {
			return nil
		}
		f.last, f.known = e.ID, true
	}
	if !yield(e, nil) {
		return errEnough
	}
	return nil
}
