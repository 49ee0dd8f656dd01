//go:build linux

package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
)

// answerLimit bounds what is read of an answer; the VMM may be in a guest's hands.
const answerLimit = 64 << 10

// client speaks to the API of one Firecracker process.
type client struct {
	http *http.Client
}

// connect makes a client for a socket; nothing is sent yet.
func connect(socket string) *client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &client{&http.Client{Transport: &http.Transport{DialContext: dial, MaxConnsPerHost: 1}}}
}

func (c *client) close() { c.http.CloseIdleConnections() }

// fault is an answer that says no.
type fault struct {
	request request
	status  int
	message string
}

func (f *fault) Error() string {
	return fmt.Sprintf("%s %s: status %d: %s", f.request.method, f.request.path, f.status, f.message)
}

// do sends a request, and decodes the answer unless it is nil.
func (c *client) do(ctx context.Context, r request, answer any) error {
	var body io.Reader
	if r.body != nil {
		raw, err := json.Marshal(r.body)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, "http://localhost"+r.path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit))
	if err != nil {
		return fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		var said struct {
			Message string `json:"fault_message"`
		}
		_ = json.Unmarshal(raw, &said) // else the status must do
		return &fault{r, resp.StatusCode, said.Message}
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(raw, answer); err != nil {
		return fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	return nil
}

// all sends requests one after the other.
func (c *client) all(ctx context.Context, requests ...request) error {
	for _, r := range requests {
		if err := c.do(ctx, r, nil); err != nil {
			return err
		}
	}
	return nil
}

// instance is what a Firecracker process says of itself.
type instance struct {
	State   string `json:"state"`
	Version string `json:"vmm_version"`
}

// States of an instance.
const (
	stateNotStarted = "Not started"
	stateRunning    = "Running"
	statePaused     = "Paused"
)

func (c *client) describe(ctx context.Context) (instance, error) {
	var i instance
	err := c.do(ctx, describe(), &i)
	return i, err
}
