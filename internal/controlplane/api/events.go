package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	eventBatch   = 200
	eventsSign   = 15 * time.Second // of life; also how late events are at most while Redis is away
	eventsWrite  = 30 * time.Second // for a client to take what it is sent
	maxFollowers = 100              // of one team, in one process
	maxLive      = 32               // progress that waits for a follower
	hubRetry     = time.Second
)

// hub tells those who follow a team's events that there are new ones. What they are the database tells:
// Redis may lose a message. Progress is all in its message, and may be lost.
type hub struct {
	mu        sync.Mutex
	followers map[string]map[*follower]bool // by team
}

// follower is one stream of events.
type follower struct {
	news chan struct{}  // receives when there may be new events
	live chan gen.Event // progress; what it does not take in time is dropped
}

// run listens to Redis until ctx ends.
func (h *hub) run(ctx context.Context, redis *ephemeral.Redis) {
	for ctx.Err() == nil {
		if messages, err := redis.Subscribe(ctx, fleet.EventsTopic); err == nil {
			for m := range messages {
				h.pass([]byte(m))
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(hubRetry):
		}
	}
}

// pass tells a message to those whom it concerns.
func (h *hub) pass(message []byte) {
	var e struct {
		TeamID    string    `json:"team_id"`
		Type      string    `json:"type"`
		Subject   string    `json:"subject"`
		Data      any       `json:"data"`
		CreatedAt time.Time `json:"created_at"`
	}
	if json.Unmarshal(message, &e) != nil {
		return
	}
	data, _ := e.Data.(map[string]any)
	h.mu.Lock()
	defer h.mu.Unlock()
	for f := range h.followers[e.TeamID] {
		if e.Type == fleet.ProgressEvent {
			select {
			case f.live <- gen.Event{Type: e.Type, Subject: e.Subject, Data: data, CreatedAt: e.CreatedAt.UTC()}:
			default:
			}
			continue
		}
		select {
		case f.news <- struct{}{}:
		default: // it knows already
		}
	}
}

// follow gives what happens to a team's things, and what ends that.
func (h *hub) follow(team string) (f *follower, stop func(), err error) {
	f = &follower{news: make(chan struct{}, 1), live: make(chan gen.Event, maxLive)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.followers[team]) >= maxFollowers {
		return nil, nil, wrenn.Errorf(wrenn.KindRateLimited, "the team follows its events %d times already; end one", maxFollowers).With("retry_after_sec", 5)
	}
	if h.followers[team] == nil {
		h.followers[team] = map[*follower]bool{}
	}
	h.followers[team][f] = true
	return f, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.followers[team], f)
		if len(h.followers[team]) == 0 {
			delete(h.followers, team)
		}
	}, nil
}

// streamEvents sends a team's events as they come (Server-Sent Events, HTML Living Standard §9.2).
func (s *Server) streamEvents(w http.ResponseWriter, r *http.Request) {
	ctx, end := context.WithCancel(r.Context())
	defer end()
	defer context.AfterFunc(s.streams, end)()
	team := auth.From(ctx).TeamID
	f, stop, err := s.hub.follow(team)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer stop()
	after, err := s.eventsAfter(ctx, r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := &eventWriter{w: w, rc: http.NewResponseController(w), subject: r.URL.Query().Get("subject"), last: after}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // a proxy in between shall not hold them back
	w.WriteHeader(http.StatusOK)
	defer func() { _ = out.rc.SetWriteDeadline(time.Time{}) }() // the connection goes on
	// An id alone tells the client where it is, should it be cut off before the first event.
	if out.write(fmt.Sprintf(": events follow\nid: %d\n\n", after)) != nil {
		return
	}
	sign := time.NewTicker(eventsSign)
	defer sign.Stop()
	for {
		err := out.progress(f.live)
		if err == nil {
			err = s.sendEvents(ctx, team, out)
		}
		if err == nil {
			err = s.awaitEvents(ctx, f, sign.C, out)
		}
		if err != nil {
			s.log.Debug("a stream of events ends", "request_id", requestID(ctx), "error", err)
			return
		}
	}
}

// awaitEvents sends progress and signs of life until there may be new events.
func (s *Server) awaitEvents(ctx context.Context, f *follower, sign <-chan time.Time, out *eventWriter) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.news:
			return nil
		case e := <-f.live:
			if err := out.live(e); err != nil {
				return err
			}
		case <-sign:
			return out.comment("alive")
		}
	}
}

// eventsAfter is where a stream begins: after what the client has seen, else with what is yet to come.
func (s *Server) eventsAfter(ctx context.Context, r *http.Request) (int64, error) {
	text, field := r.Header.Get("Last-Event-ID"), "Last-Event-ID"
	if text == "" {
		text, field = r.URL.Query().Get("after"), "after"
	}
	if text == "" {
		return s.st.LastEvent(ctx)
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, invalid(field, "is not the id of an event")
	}
	return n, nil
}

// sendEvents sends what came after the last event that was sent.
func (s *Server) sendEvents(ctx context.Context, team string, out *eventWriter) error {
	for {
		events, err := s.st.Team(team).EventsAfter(ctx, out.last, eventBatch)
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := out.event(e); err != nil {
				return err
			}
		}
		if len(events) < eventBatch {
			return nil
		}
	}
}

// eventWriter writes events to one client. A client that does not take them is let go.
type eventWriter struct {
	w       http.ResponseWriter
	rc      *http.ResponseController
	subject string // "": all
	last    int64
}

func (o *eventWriter) event(e db.Event) error {
	o.last = *e.Seq
	if o.subject != "" && e.Subject != o.subject {
		return nil
	}
	data := map[string]any{}
	_ = json.Unmarshal(e.Data, &data) // written by fleet from a map
	text, err := json.Marshal(gen.Event{ID: *e.Seq, Type: e.Type, Subject: e.Subject, Data: data, CreatedAt: e.CreatedAt.UTC()})
	if err != nil {
		return err
	}
	return o.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", *e.Seq, e.Type, text))
}

// progress sends what waits; what happened before an event is told before it.
func (o *eventWriter) progress(live <-chan gen.Event) error {
	for {
		select {
		case e := <-live:
			if err := o.live(e); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// live sends an event that is not kept. It has no id: a client that connects again goes on after the last
// one that is.
func (o *eventWriter) live(e gen.Event) error {
	if o.subject != "" && e.Subject != o.subject {
		return nil
	}
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return o.write(fmt.Sprintf("event: %s\ndata: %s\n\n", e.Type, text))
}

func (o *eventWriter) comment(text string) error { return o.write(": " + text + "\n\n") }

func (o *eventWriter) write(text string) error {
	_ = o.rc.SetWriteDeadline(time.Now().Add(eventsWrite)) // where the connection has none, nothing is lost but the bound
	if _, err := o.w.Write([]byte(text)); err != nil {
		return err
	}
	return o.rc.Flush()
}
