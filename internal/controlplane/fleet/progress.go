package fleet

import (
	"context"
	"encoding/json"
	"regexp"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// ProgressEvent is the type of the events that say where an operation is. They are published and not kept: who
// does not listen now never hears them.
const ProgressEvent = "sandbox.progress"

const (
	progressAfter = 200 * time.Millisecond // nothing is told of what is over by then
	progressEvery = 200 * time.Millisecond // at most, of one operation
	progressAgain = time.Second            // until a host is asked again that knew nothing of the operation
	progressLimit = time.Second            // for Redis to take one
)

// slow is an operation that a host is asked for and that may take its time.
type slow struct {
	teamID, hostID, sandboxID string
	name                      string // as in the API: create, pause, …
	id                        string
}

type markKey struct{}

// WithMark names the request that operations under this context are done for, in what they tell of their progress.
func WithMark(ctx context.Context, mark string) context.Context {
	return context.WithValue(ctx, markKey{}, mark)
}

// askShowing is ask for an operation whose progress is told to the team. When it returns, no more is told.
func (f *Fleet) askShowing(ctx context.Context, o slow, call func(context.Context, agents.Target) error) error {
	watching, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.tellProgress(watching, o)
	}()
	defer func() {
		stop()
		<-done
	}()
	f.fault(o.name, pointBegun)
	err := f.ask(f.faultWhenSent(ctx, o.name), o.hostID, f.times.RetryFor, call)
	if err == nil {
		f.fault(o.name, pointAsked)
	}
	return err
}

// tellProgress publishes where an operation is until ctx ends.
func (f *Fleet) tellProgress(ctx context.Context, o slow) {
	for wait := progressAfter; ; wait = progressAgain {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		err := f.ask(ctx, o.hostID, 0, func(ctx context.Context, t agents.Target) error { return f.passProgress(ctx, t, o) })
		if wrenn.KindOf(err) == wrenn.KindNotImplemented { // an older agent
			return
		}
		if err != nil && ctx.Err() == nil {
			f.log.Debug("the progress of an operation is not known", "sandbox_id", o.sandboxID, "operation", o.name, "error", err)
		}
	}
}

// passProgress passes on what a host tells of an operation. A host that tells more than it should is not heard.
func (f *Fleet) passProgress(ctx context.Context, t agents.Target, o slow) error {
	stream, err := f.agents.Service(t).WatchProgress(ctx, connect.NewRequest(&agentv1.WatchProgressRequest{Id: o.sandboxID, OperationId: o.id}))
	if err != nil {
		return err
	}
	defer stream.Close()
	var last time.Time
	for stream.Receive() {
		p := stream.Msg().GetProgress()
		if now := time.Now(); validProgress(p) && now.Sub(last) >= progressEvery {
			last = now
			if err := f.publishProgress(ctx, o, p); err != nil {
				return err
			}
		}
	}
	return stream.Err()
}

func (f *Fleet) publishProgress(ctx context.Context, o slow, p *agentv1.Progress) error {
	data := map[string]any{"operation": o.name, "operation_id": o.id, "step": p.GetStep()}
	if mark, ok := ctx.Value(markKey{}).(string); ok {
		data["request"] = mark
	}
	if p.GetTotal() > 0 {
		data["done"], data["total"], data["unit"] = p.GetDone(), p.GetTotal(), p.GetUnit()
	}
	raw, err := json.Marshal(map[string]any{"type": ProgressEvent, "team_id": o.teamID, "subject": o.sandboxID, "data": data, "created_at": time.Now().UTC()})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, progressLimit)
	defer cancel()
	return f.redis.Publish(ctx, EventsTopic, raw)
}

var (
	stepName      = regexp.MustCompile(`^[a-z][a-z_]{0,31}$`)
	progressUnits = map[string]bool{"bytes": true, "sandboxes": true}
)

// validProgress refuses what a host must not tell: the team is shown its words.
func validProgress(p *agentv1.Progress) bool {
	const most = 1 << 53 // exact in every JSON reader
	counts := p.GetTotal() == 0 || progressUnits[p.GetUnit()] && p.GetDone() <= p.GetTotal() && p.GetTotal() < most
	return counts && stepName.MatchString(p.GetStep())
}
