package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// monitorTimeout bounds every exchange with a floor VM's monitor.
const monitorTimeout = 15 * time.Second

// monitor speaks to a QEMU (QEMU Machine Protocol).
type monitor struct {
	conn net.Conn
	in   *json.Decoder
}

func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	dialer := net.Dialer{Timeout: monitorTimeout}
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, in: json.NewDecoder(conn)}
	var greeting struct {
		QMP json.RawMessage `json:"QMP"`
	}
	err = conn.SetDeadline(time.Now().Add(monitorTimeout))
	if err == nil {
		err = m.in.Decode(&greeting)
	}
	if err == nil && greeting.QMP == nil {
		err = errors.New("no greeting")
	}
	if err == nil {
		err = m.do("qmp_capabilities", nil, nil)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("monitor: %w", err)
	}
	return m, nil
}

func (m *monitor) close() { m.conn.Close() }

// do executes a command; out may be nil.
func (m *monitor) do(command string, args map[string]any, out any) error {
	if err := m.conn.SetDeadline(time.Now().Add(monitorTimeout)); err != nil {
		return err
	}
	msg := map[string]any{"execute": command}
	if args != nil {
		msg["arguments"] = args
	}
	if err := json.NewEncoder(m.conn).Encode(msg); err != nil {
		return err
	}
	for {
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		switch err := m.in.Decode(&answer); {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case answer.Error != nil:
			return fmt.Errorf("%s: %s", command, answer.Error.Desc)
		case answer.Return != nil && out != nil:
			return json.Unmarshal(answer.Return, out)
		case answer.Return != nil:
			return nil
		} // else an event
	}
}

// ignoreSharedRAM leaves RAM in its file, and out of the stream of devices.
func (m *monitor) ignoreSharedRAM() error {
	on := map[string]any{"capability": "x-ignore-shared", "state": true}
	return m.do("migrate-set-capabilities", map[string]any{"capabilities": []any{on}}, nil)
}

// load reads the devices' state from descriptor 4 and lets the machine go on. QEMU wants to be told whether
// the state was saved by save, which leaves out RAM that is shared; a template's knows nothing of RAM.
func (vm *floorVM) load(ctx context.Context, saved bool) error {
	if saved {
		if err := vm.monitor.ignoreSharedRAM(); err != nil {
			return err
		}
	}
	if err := vm.monitor.do("migrate-incoming", map[string]any{"uri": "fd:4"}, nil); err != nil {
		return err
	}
	err := vm.until(ctx, "query-status", func(status string) bool { return status != "inmigrate" })
	if err != nil {
		return err
	}
	return vm.monitor.do("cont", nil, nil)
}

// until asks a query every millisecond until its status is as wanted.
func (vm *floorVM) until(ctx context.Context, query string, wanted func(status string) bool) error {
	for {
		var now struct {
			Status string `json:"status"`
		}
		if err := vm.monitor.do(query, nil, &now); err != nil || wanted(now.Status) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// save freezes the machine and writes the devices' state; its RAM is in its file already.
func (vm *floorVM) save(ctx context.Context, path string) error {
	if err := vm.monitor.do("stop", nil, nil); err != nil {
		return err
	}
	if err := vm.monitor.ignoreSharedRAM(); err != nil {
		return err
	}
	if err := vm.monitor.do("migrate", map[string]any{"uri": "exec:cat > " + path}, nil); err != nil {
		return err
	}
	last := ""
	err := vm.until(ctx, "query-migrate", func(status string) bool {
		last = status
		return status == "completed" || status == "failed" || status == "cancelled"
	})
	if err == nil && last != "completed" {
		err = fmt.Errorf("writing the state: %s", last)
	}
	return err
}
