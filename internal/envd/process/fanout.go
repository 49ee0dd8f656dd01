package process

import (
	"sync"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// fanout hands every event to every attached reader, in order, and waits for the slowest.
type fanout struct {
	mu      sync.Mutex
	readers map[*reader]struct{}
	end     *processpb.ProcessEvent_EndEvent
}

// reader is one attached stream. Events are read from ch until it is closed; then end() is the last one.
type reader struct {
	from *fanout
	ch   chan *processpb.ProcessEvent_DataEvent
	gone chan struct{}
	once sync.Once
}

func newFanout() *fanout { return &fanout{readers: map[*reader]struct{}{}} }

// attach adds a reader; it gets what is published from now on. If the end came already the reader gets
// only that.
func (f *fanout) attach() *reader {
	r := &reader{from: f, ch: make(chan *processpb.ProcessEvent_DataEvent, readerQueue), gone: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.end != nil {
		close(r.ch)
		return r
	}
	f.readers[r] = struct{}{}
	return r
}

// detach takes the reader away and lets a publisher go that waits for it.
func (r *reader) detach() {
	r.once.Do(func() {
		close(r.gone)
		r.from.mu.Lock()
		delete(r.from.readers, r)
		r.from.mu.Unlock()
	})
}

// last is the end event; valid once ch is closed.
func (r *reader) last() *processpb.ProcessEvent_EndEvent {
	r.from.mu.Lock()
	defer r.from.mu.Unlock()
	return r.from.end
}

// publish gives ev to all readers and returns when each has room for it or is gone.
func (f *fanout) publish(ev *processpb.ProcessEvent_DataEvent) {
	f.mu.Lock()
	readers := make([]*reader, 0, len(f.readers))
	for r := range f.readers {
		readers = append(readers, r)
	}
	f.mu.Unlock()
	for _, r := range readers {
		select {
		case r.ch <- ev:
		case <-r.gone:
		}
	}
}

// finish publishes the end. No publish may run or follow.
func (f *fanout) finish(end *processpb.ProcessEvent_EndEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end = end
	for r := range f.readers {
		close(r.ch)
	}
	f.readers = map[*reader]struct{}{}
}
