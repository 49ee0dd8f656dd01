package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
)

// direct asks a guest without anybody in between: by sockets opened in its network namespace.
type direct struct {
	slot   *network.Slot
	client *guest.Client
	token  string
	proc   processconnect.ProcessClient
}

func newDirect(netnsPath, token string) *direct {
	d := &direct{slot: &network.Slot{NetnsPath: netnsPath}, token: token}
	d.client = guest.New(network.GuestIP, d.slot.DialContext)
	d.proc = processconnect.NewProcessClient(d, "http://"+d.client.Host())
	return d
}

// Do implements connect.HTTPClient.
func (d *direct) Do(req *http.Request) (*http.Response, error) { return d.client.Do(req, d.token) }

func (d *direct) close() { d.client.Close() }

// exec runs a command and gives what it printed.
func (d *direct) exec(ctx context.Context, cmd string, args ...string) (string, error) {
	no := false
	stream, err := d.proc.Start(ctx, connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: cmd, Args: args}, Stdin: &no,
	}))
	if err != nil {
		return "", err
	}
	defer stream.Close()
	var out []byte
	var end *process.ProcessEvent_EndEvent
	for stream.Receive() {
		ev := stream.Msg().GetEvent()
		out = append(out, ev.GetData().GetStdout()...)
		if e := ev.GetEnd(); e != nil {
			end = e
		}
	}
	switch {
	case stream.Err() != nil:
		return "", stream.Err()
	case end == nil:
		return "", errors.New("the command's stream has no end")
	case end.GetExitCode() != 0:
		return "", fmt.Errorf("%s: %s", cmd, end.GetStatus())
	}
	return string(out), nil
}

// record is what the agent keeps of a sandbox, as far as it is of use here.
type record struct {
	AccessToken string `json:"access_token"`
	VM          struct {
		PID int `json:"pid"`
	} `json:"vm"`
}

func (b *bench) record(id string) (record, error) {
	var r record
	raw, err := os.ReadFile(filepath.Join(b.volume(), "sandboxes", id, "record.json"))
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err == nil && r.VM.PID == 0 {
		err = fmt.Errorf("sandbox %s has no VM", id)
	}
	return r, err
}

// into opens the direct way into a sandbox's guest.
func (b *bench) into(id string) (*direct, error) {
	r, err := b.record(id)
	if err != nil {
		return nil, err
	}
	return newDirect(fmt.Sprintf("/proc/%d/ns/net", r.VM.PID), r.AccessToken), nil
}
