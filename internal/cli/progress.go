package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// steps shows what is being done and for how long: on a terminal as a line that is kept up to date,
// elsewhere as a line per step and a sign of life every ten seconds.
type steps struct {
	w     io.Writer
	live  bool
	start time.Time
}

const (
	liveEvery  = 100 * time.Millisecond
	plainEvery = 10 * time.Second
)

func newSteps(w io.Writer) *steps {
	_, live := terminal(w)
	return &steps{w: w, live: live, start: time.Now()}
}

// Step begins a step; see localstack.Progress.
func (s *steps) Step(name string) func(outcome string, err error) {
	began, stop, stopped := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		s.watch(name, began, stop)
	}()
	var once sync.Once
	return func(outcome string, err error) {
		once.Do(func() {
			close(stop)
			<-stopped
			s.end(name, outcome, time.Since(began), err)
		})
	}
}

func (s *steps) watch(name string, began time.Time, stop <-chan struct{}) {
	every := plainEvery
	if s.live {
		every = liveEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			if s.live {
				fmt.Fprintf(s.w, "\r\033[K  … %s  %.1fs", name, time.Since(began).Seconds())
			} else {
				fmt.Fprintf(s.w, "  … %s, for %.0fs\n", name, time.Since(began).Seconds())
			}
		}
	}
}

func (s *steps) end(name, outcome string, took time.Duration, err error) {
	if s.live {
		fmt.Fprint(s.w, "\r\033[K")
	}
	mark := "✓"
	if err != nil {
		mark, outcome = "✗", "failed"
	}
	fmt.Fprintf(s.w, "  %s %-22s %6.1fs  %s\n", mark, name, took.Seconds(), outcome)
}

// operation shows where an operation of the server is: on a terminal as a line that is kept up to date and goes
// at the end, elsewhere as a line for each step, and for what is counted one a second.
type operation struct {
	w    io.Writer
	live bool
	what string

	mu    sync.Mutex
	start time.Time
	now   api.Progress
	told  time.Time
}

// showing has what is done with the returned context show where it is, until done is called; with -o json it
// is silent.
func (a *app) showing(ctx context.Context, what string) (_ context.Context, done func()) {
	if a.output == "json" {
		return ctx, func() {}
	}
	_, live := terminal(a.stdio.Err)
	o := &operation{w: a.stdio.Err, live: live, what: what, start: time.Now()}
	ctx = wrenn.WithProgress(ctx, o.tell)
	if !live {
		return ctx, func() {}
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		o.watch(stop)
	}()
	return ctx, func() {
		close(stop)
		<-stopped
		fmt.Fprint(o.w, "\r\033[K")
	}
}

func (o *operation) watch(stop <-chan struct{}) {
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			o.mu.Lock()
			fmt.Fprintf(o.w, "\r\033[K  … %s  %.1fs", o.line(), time.Since(o.start).Seconds())
			o.mu.Unlock()
		}
	}
}

// tell notes where the operation is.
func (o *operation) tell(p api.Progress) {
	o.mu.Lock()
	defer o.mu.Unlock()
	same := p.Step == o.now.Step
	o.now = p
	if o.live || same && time.Since(o.told) < time.Second {
		return
	}
	o.told = time.Now()
	fmt.Fprintf(o.w, "  … %s\n", o.line())
}

// line says what is done and how much of it: "creating the sandbox: saving memory, 12.0 MiB of 512.0 MiB".
func (o *operation) line() string {
	if o.now.Step == "" {
		return o.what
	}
	text := o.what + ": " + strings.ReplaceAll(o.now.Step, "_", " ")
	switch {
	case o.now.Total == 0:
	case o.now.Unit == api.ProgressUnitBytes:
		text += fmt.Sprintf(", %s of %s", size(o.now.Done), size(o.now.Total))
	default:
		text += fmt.Sprintf(", %d of %d", o.now.Done, o.now.Total)
	}
	return clean(text)
}
