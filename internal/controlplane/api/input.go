package api

import (
	"encoding/base64"

	"connectrpc.com/connect"

	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
)

// inputQueue is how many messages of standard input may wait for a process that does not read, so that a
// signal sent after them still arrives. Bounds memory to inputQueue × maxFrame.
const inputQueue = 4

// ctrlD ends the input of a terminal.
const ctrlD = 4

// inlet is the way of a client's messages to its process.
type inlet struct {
	k      *socket
	client processconnect.ProcessClient
	sel    *process.ProcessSelector
	tty    bool // the process has a terminal, as far as is known
	queue  chan *[]byte
	failed chan error
}

// passInput gives a client's messages to its process, until the client goes away (errGone) or breaks the
// contract. Input keeps its order; signals and sizes do not wait for it.
func (k *socket) passInput(client processconnect.ProcessClient, pid uint32, tty bool) error {
	in := &inlet{k, client, byPID(pid), tty, make(chan *[]byte, inputQueue), make(chan error, 1)}
	defer close(in.queue)
	go in.write()
	for {
		m, err := k.receive(k.ctx)
		if err != nil {
			return err
		}
		if err := in.pass(m); err != nil {
			return err
		}
	}
}

// write writes what is queued; nil stands for the end of input.
func (in *inlet) write() {
	for data := range in.queue {
		var err error
		if data == nil {
			err = in.closeInput()
		} else {
			err = in.stdin(*data)
		}
		if err != nil {
			in.failed <- err
			break
		}
	}
	for range in.queue { // nobody may block on a queue that nobody reads
	}
}

func (in *inlet) enqueue(data *[]byte) error {
	select {
	case in.queue <- data:
		return nil
	case err := <-in.failed:
		return err
	case <-in.k.ctx.Done():
		return errGone
	}
}

func (in *inlet) pass(m gen.StreamClientMessage) error {
	ctx := in.k.ctx
	switch m.Type {
	case gen.StreamClientMessageTypeStdin:
		data, err := base64.StdEncoding.DecodeString(or(m.Data, ""))
		if err != nil {
			return invalid("data", "must be base64")
		}
		if len(data) > maxStdin {
			return invalid("data", "is at most %d bytes before base64", maxStdin)
		}
		return in.enqueue(&data)
	case gen.StreamClientMessageTypeClose:
		return in.enqueue(nil)
	case gen.StreamClientMessageTypeResize:
		if m.Tty == nil {
			return invalid("tty", "is missing")
		}
		size := &process.PTY_Size{Cols: uint32(m.Tty.Cols), Rows: uint32(m.Tty.Rows)}
		_, err := in.client.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: in.sel, Pty: &process.PTY{Size: size}}))
		return settle(err)
	case gen.StreamClientMessageTypeSignal:
		n, err := parseSignal(or(m.Signal, ""))
		if err != nil {
			return err
		}
		_, err = in.client.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: in.sel, Signal: process.Signal(n)}))
		return settle(err)
	}
	return invalid("type", "%s is for the beginning of a stream only", m.Type)
}

// stdin writes to the process's pipe or terminal, whichever it has.
func (in *inlet) stdin(data []byte) error {
	err := in.send(data, in.tty)
	if code := connect.CodeOf(err); err != nil && (code == connect.CodeFailedPrecondition || code == connect.CodeInvalidArgument) && in.send(data, !in.tty) == nil {
		in.tty = !in.tty // what an attach could not know
		return nil
	}
	return settle(err)
}

func (in *inlet) send(data []byte, tty bool) error {
	msg := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: data}}
	if tty {
		msg.Input = &process.ProcessInput_Pty{Pty: data}
	}
	_, err := in.client.SendInput(in.k.ctx, connect.NewRequest(&process.SendInputRequest{Process: in.sel, Input: msg}))
	return err
}

func (in *inlet) closeInput() error {
	if in.tty {
		return settle(in.send([]byte{ctrlD}, true))
	}
	_, err := in.client.CloseStdin(in.k.ctx, connect.NewRequest(&process.CloseStdinRequest{Process: in.sel}))
	return settle(err)
}

// settle ignores that a process has ended or closed its input meanwhile: its end is on the way. What
// else fails ends the client's side of the stream.
func settle(err error) error {
	if err == nil {
		return nil
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeFailedPrecondition, connect.CodeCanceled:
		return nil
	}
	return guestError(err)
}
