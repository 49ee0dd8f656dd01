package process

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"
)

var (
	errNoStdin     = errors.New("the process was started without a standard input that can be written to")
	errStdinClosed = errors.New("the standard input of the process is closed")
)

// input is the writable side of a process: a pipe, a terminal, or nothing. Writes do not mix.
type input struct {
	writing chan struct{} // holds one token: who has it may write

	mu     sync.Mutex
	dst    *os.File
	closed bool
	own    bool // close the file with the input (a terminal is closed by its reader)
}

func newInput(dst *os.File, own bool) *input {
	in := &input{dst: dst, own: own, writing: make(chan struct{}, 1)}
	in.writing <- struct{}{}
	return in
}

// write writes all of data, waiting as long as the process does not read and ctx allows.
func (in *input) write(ctx context.Context, data []byte) error {
	select {
	case <-in.writing:
		defer func() { in.writing <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	}
	in.mu.Lock()
	dst, closed := in.dst, in.closed
	in.mu.Unlock()
	switch {
	case dst == nil:
		return errNoStdin
	case closed:
		return errStdinClosed
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = dst.SetWriteDeadline(time.Now())
	})
	_, err := dst.Write(data)
	if !stop() {
		<-interrupted
		_ = dst.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	default:
		return errStdinClosed // EPIPE, or closed meanwhile
	}
}

// close ends the input; the process reads end of file after what was written. It does not wait for a
// write that is under way: that one fails.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || in.dst == nil {
		return
	}
	in.closed = true
	if in.own {
		in.dst.Close()
	}
}
