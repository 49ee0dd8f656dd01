package api

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// guest is a running sandbox of the team that asks, and the way to it.
type guest struct {
	id     string
	target agents.Target
}

// guest finds the way into a sandbox, and wakes it if its owner allowed that; it must run, and its host must
// be there.
func (s *Server) guest(ctx context.Context, id string) (guest, error) {
	team := auth.From(ctx).TeamID
	row, err := s.st.Team(team).SandboxRoute(ctx, id)
	for try := 0; err == nil && toBeAwaited(row) && try < maxWakes; try++ { // it may be paused again at once
		if err := s.Fleet.Wake(ctx, actor(ctx), team, id); err != nil {
			return guest{}, err
		}
		row, err = s.st.Team(team).SandboxRoute(ctx, id)
	}
	switch {
	case store.IsNotFound(err):
		return guest{}, notFound("sandbox")
	case err != nil:
		return guest{}, err
	case row.Status != string(wrenn.SandboxRunning):
		return guest{}, wrenn.Errorf(wrenn.KindInvalidState, "the sandbox is %s, not running", row.Status).With("status", row.Status)
	case !row.HostOnline || row.Address == nil || !row.MTLSEnabled:
		return guest{}, wrenn.Errorf(wrenn.KindHostUnavailable, "the sandbox's host cannot be reached now; the sandbox itself is not lost; try again").With("host_id", row.HostID)
	}
	return guest{row.ID, agents.Target{HostID: row.HostID, Address: *row.Address, Fingerprint: row.CertFingerprint, Next: row.NextCertFingerprint}}, nil
}

// toBeAwaited tells that a sandbox is about to run, or may be made to.
func toBeAwaited(row db.SandboxRouteRow) bool {
	switch wrenn.SandboxState(row.Status) {
	case wrenn.SandboxPausing, wrenn.SandboxResuming:
		return true
	case wrenn.SandboxPaused:
		return row.AutoResume
	}
	return false
}

// asUser names the user in the guest; empty is the sandbox's default.
func asUser(h http.Header, user *string) {
	if user != nil && *user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(*user+":")))
	}
}

// guestKinds are what errors of the guest agent mean to the one who asked.
var guestKinds = map[connect.Code]wrenn.Kind{
	connect.CodeInvalidArgument:    wrenn.KindInvalidRequest,
	connect.CodeUnauthenticated:    wrenn.KindInvalidRequest, // no such user
	connect.CodeNotFound:           wrenn.KindNotFound,
	connect.CodeAlreadyExists:      wrenn.KindAlreadyExists,
	connect.CodePermissionDenied:   wrenn.KindForbidden,
	connect.CodeFailedPrecondition: wrenn.KindInvalidState,
	connect.CodeResourceExhausted:  wrenn.KindDiskFull,
	connect.CodeUnimplemented:      wrenn.KindNotImplemented,
}

// errPaused tells that a host refused a request into a sandbox which does not run any more: nothing of it was done.
var errPaused = errors.New("paused meanwhile")

const (
	// maxWakes is how often one attempt of a request wakes its sandbox before it reaches the host.
	maxWakes = 3
	// heldFor is how long a request is tried again because its host refused it. Mostly once is enough, as the row
	// says why; one whose VM ended by itself is known as running until its host is heard.
	heldFor    = 10 * time.Second
	heldEvery  = 20 * time.Millisecond
	heldEvery2 = time.Second // at last
)

// held makes a call into a sandbox. One that its host refuses because a pause was quicker waits for the pause to
// end, and is made again when the sandbox runs.
func held[T any](ctx context.Context, s *Server, id string, call func(guest) (T, error)) (T, error) {
	deadline := time.Now().Add(heldFor)
	for wait := heldEvery; ; wait = min(2*wait, heldEvery2) {
		g, err := s.guest(ctx, id)
		if err != nil {
			var none T
			return none, err
		}
		res, err := call(g)
		if !errors.Is(err, errPaused) || time.Now().After(deadline) {
			return res, err
		}
		select {
		case <-ctx.Done():
			return res, err
		case <-time.After(wait):
		}
	}
}

// refused marks an error of a host as one of a request that did not reach its guest.
func refused(cause error, pub *wrenn.Error) error {
	return wrenn.Wrap(errors.Join(errPaused, cause), pub.Kind, "%s", pub.Message)
}

const maxGuestMessage = 512

// guestError turns a failure of a call into a guest into ours. The guest is the caller's own, so its words may
// be shown; an error of the agent on the way is told from the guest's by its kind.
func guestError(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.Meta().Get(rpc.KindHeader) != "" || !connect.IsWireError(err) {
		own := rpc.FromConnect(err)
		if pub := wrenn.Public(own); pub.Kind == wrenn.KindInvalidState {
			return refused(err, pub)
		}
		if wrenn.KindOf(own) == wrenn.KindNotFound {
			return wrenn.Wrap(err, wrenn.KindAgentError, "the host does not have this sandbox; its state is as last known")
		}
		return own
	}
	kind, ok := guestKinds[ce.Code()]
	if !ok {
		return wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's guest agent failed: %s", clip(ce.Message(), maxGuestMessage))
	}
	return wrenn.Wrap(err, kind, "%s", clip(ce.Message(), maxGuestMessage))
}
