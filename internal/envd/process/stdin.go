package process

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// SendInput writes to the standard input or terminal of a process and returns when all is written.
func (s *Service) SendInput(ctx context.Context, req *connect.Request[processpb.SendInputRequest]) (*connect.Response[processpb.SendInputResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.write(ctx, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.SendInputResponse{}), nil
}

// StreamInput writes many inputs to one process, in order.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[processpb.StreamInputRequest]) (*connect.Response[processpb.StreamInputResponse], error) {
	var p *Proc
	for stream.Receive() {
		switch ev := stream.Msg().GetEvent().(type) {
		case *processpb.StreamInputRequest_Start:
			found, err := s.find(ev.Start.GetProcess())
			if err != nil {
				return nil, err
			}
			p = found
		case *processpb.StreamInputRequest_Data:
			if p == nil {
				return nil, invalid("the first message of StreamInput must be start")
			}
			if err := p.write(ctx, ev.Data.GetInput()); err != nil {
				return nil, err
			}
		case *processpb.StreamInputRequest_Keepalive:
		default:
			return nil, invalid("a message of StreamInput is empty")
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processpb.StreamInputResponse{}), nil
}

// CloseStdin ends the standard input of a process.
func (s *Service) CloseStdin(_ context.Context, req *connect.Request[processpb.CloseStdinRequest]) (*connect.Response[processpb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if p.tty != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("a terminal's input cannot be closed; send the byte 4 (Ctrl-D) instead"))
	}
	p.in.close()
	return connect.NewResponse(&processpb.CloseStdinResponse{}), nil
}

// write puts one input where it belongs.
func (p *Proc) write(ctx context.Context, in *processpb.ProcessInput) error {
	var data []byte
	switch v := in.GetInput().(type) {
	case *processpb.ProcessInput_Stdin:
		if p.tty != nil {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has a terminal; send input.pty, not input.stdin"))
		}
		data = v.Stdin
	case *processpb.ProcessInput_Pty:
		if p.tty == nil {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has no terminal; send input.stdin, not input.pty"))
		}
		data = v.Pty
	default:
		return invalid("input holds neither stdin nor pty")
	}
	err := p.in.write(ctx, data)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNoStdin), errors.Is(err, errStdinClosed):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("process %d did not read its input in time", p.pid))
	default:
		return err
	}
}
