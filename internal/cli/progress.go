package cli

import (
	"fmt"
	"io"
	"sync"
	"time"
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
