//go:build linux

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// qmpLine bounds one message of QEMU. The largest that is asked for is a migration's status.
	qmpLine = 256 << 10
	// qmpTimeout bounds one command: QEMU answers in microseconds unless the host is in trouble.
	qmpTimeout = 15 * time.Second
	// qmpEvents bounds the events that may come before an answer.
	qmpEvents = 10_000
)

// monitor is a connection to QEMU's control socket (QEMU Machine Protocol: JSON objects, one per line).
// QEMU serves one connection at a time; others wait for their turn. It is used by one goroutine.
type monitor struct {
	conn *net.UnixConn
	in   *bufio.Reader
}

// qmpError is an error answer of QEMU.
type qmpError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *qmpError) Error() string { return "qmp " + e.Command + ": " + e.Desc }

type qmpMessage struct {
	QMP    json.RawMessage `json:"QMP"`
	Event  string          `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

// connect opens the control socket and negotiates. The deadline of ctx, or qmpTimeout, holds for
// waiting on another connection's turn too.
func connect(ctx context.Context, socket string) (*monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	conn, err := dialUnix(socket)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, in: bufio.NewReaderSize(conn, 8<<10)}
	greeting, err := m.guarded(ctx, m.read)
	if err == nil && greeting.QMP == nil {
		err = errors.New("no QMP greeting")
	}
	if err == nil {
		err = m.execute(ctx, "qmp_capabilities", nil, nil)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() { m.conn.Close() }

// execute sends a command, with an open file if it wants one, and stores its answer in out if not nil.
func (m *monitor) execute(ctx context.Context, command string, args, out any, files ...*os.File) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	answer, err := m.guarded(ctx, func() (qmpMessage, error) {
		if err := m.send(append(line, '\n'), files); err != nil {
			return qmpMessage{}, err
		}
		return m.answer()
	})
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	if answer.Error != nil {
		answer.Error.Command = command
		return answer.Error
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer.Return, out)
}

// guarded runs an exchange so that ctx ends it. The connection is of no use afterwards.
func (m *monitor) guarded(ctx context.Context, exchange func() (qmpMessage, error)) (qmpMessage, error) {
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	msg, err := exchange()
	if err != nil && ctx.Err() != nil {
		return msg, ctx.Err()
	}
	return msg, err
}

func (m *monitor) send(line []byte, files []*os.File) error {
	if len(files) == 0 {
		_, err := m.conn.Write(line)
		return err
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	_, _, err := m.conn.WriteMsgUnix(line, unix.UnixRights(fds...), nil)
	return err
}

// answer reads up to the next answer and passes over events.
func (m *monitor) answer() (qmpMessage, error) {
	for range qmpEvents {
		msg, err := m.read()
		if err != nil || msg.Return != nil || msg.Error != nil {
			return msg, err
		}
	}
	return qmpMessage{}, errors.New("too many events before an answer")
}

func (m *monitor) read() (qmpMessage, error) {
	line, err := readLine(m.in, qmpLine)
	if err != nil {
		return qmpMessage{}, err
	}
	return parseMessage(line)
}

func parseMessage(line []byte) (qmpMessage, error) {
	var msg qmpMessage
	if err := json.Unmarshal(line, &msg); err != nil {
		return qmpMessage{}, fmt.Errorf("unreadable QMP message: %w", err)
	}
	return msg, nil
}

// readLine reads one line of at most limit bytes.
func readLine(in *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > limit {
			return nil, fmt.Errorf("QMP message is longer than %d bytes", limit)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}
