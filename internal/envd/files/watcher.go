package files

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"sync"

	"connectrpc.com/connect"

	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

// Bounds of watchers that are polled. One that nobody polls costs at most its buffer; the oldest is given
// up when there are too many, since its client is most likely gone.
const (
	maxWatchers       = 128
	maxBufferedEvents = 8192
)

// bufferedWatcher collects changes between polls.
type bufferedWatcher struct {
	seq          uint64
	tree         *tree
	includeEntry bool

	mu     sync.Mutex
	events []change
	err    error
}

func (w *bufferedWatcher) run() {
	for {
		list, err := w.tree.next()
		w.mu.Lock()
		if err == nil && len(w.events)+len(list) > maxBufferedEvents {
			err = errOverflow
		}
		if err != nil {
			w.err, w.events = err, nil
			w.mu.Unlock()
			w.tree.close()
			return
		}
		w.events = append(w.events, list...)
		w.mu.Unlock()
	}
}

// take empties the buffer.
func (w *bufferedWatcher) take() ([]change, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	events := w.events
	w.events = nil
	return events, w.err
}

// CreateWatcher begins to collect changes.
func (s *Service) CreateWatcher(_ context.Context, req *connect.Request[filesystempb.CreateWatcherRequest]) (*connect.Response[filesystempb.CreateWatcherResponse], error) {
	t, err := s.openTree(req, req.Msg)
	if err != nil {
		return nil, err
	}
	w := &bufferedWatcher{tree: t, includeEntry: req.Msg.GetIncludeEntry()}
	id := s.keep(w)
	go w.run()
	return connect.NewResponse(&filesystempb.CreateWatcherResponse{WatcherId: id}), nil
}

func (s *Service) keep(w *bufferedWatcher) string {
	raw := make([]byte, 12)
	_, _ = rand.Read(raw) // never fails (crypto/rand since Go 1.24)
	id := "w" + hex.EncodeToString(raw)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.watchers) >= maxWatchers {
		oldest := ""
		for other, o := range s.watchers {
			if oldest == "" || o.seq < s.watchers[oldest].seq {
				oldest = other
			}
		}
		s.watchers[oldest].tree.close()
		delete(s.watchers, oldest)
	}
	s.watcherSeq++
	w.seq = s.watcherSeq
	s.watchers[id] = w
	return id
}

// GetWatcherEvents gives what changed since the last time.
func (s *Service) GetWatcherEvents(_ context.Context, req *connect.Request[filesystempb.GetWatcherEventsRequest]) (*connect.Response[filesystempb.GetWatcherEventsResponse], error) {
	w, err := s.watcher(req.Msg.GetWatcherId(), false)
	if err != nil {
		return nil, err
	}
	events, err := w.take()
	if err != nil {
		return nil, watchError(err)
	}
	res := &filesystempb.GetWatcherEventsResponse{}
	for _, c := range events {
		res.Events = append(res.Events, s.present(w.tree.root, c, w.includeEntry))
	}
	return connect.NewResponse(res), nil
}

// RemoveWatcher ends a watcher.
func (s *Service) RemoveWatcher(_ context.Context, req *connect.Request[filesystempb.RemoveWatcherRequest]) (*connect.Response[filesystempb.RemoveWatcherResponse], error) {
	w, err := s.watcher(req.Msg.GetWatcherId(), true)
	if err != nil {
		return nil, err
	}
	w.tree.close()
	return connect.NewResponse(&filesystempb.RemoveWatcherResponse{}), nil
}

func (s *Service) watcher(id string, remove bool) (*bufferedWatcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, ok := s.watchers[id]
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such watcher; it was removed, or given up for newer ones"))
	}
	if remove {
		delete(s.watchers, id)
	}
	return w, nil
}
