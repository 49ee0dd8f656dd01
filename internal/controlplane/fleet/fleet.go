// Package fleet owns hosts and the sandboxes on them: registration and heartbeats, placement, the
// operations that create and delete sandboxes, and the loops that finish what a dead replica left and
// compare rows with what hosts report. Place and Reconcile are pure. It speaks neither HTTP nor JSON to
// users; who may do what is decided by its callers, except what a team owns.
package fleet

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http/httptrace"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Policy is how much of a host sandboxes may take where the host itself does not say.
type Policy struct {
	CPUOvercommit   float64 // vCPUs per core
	DiskOvercommit  float64 // disks are sparse
	MemoryReserveMB int64   // kept for the host
}

// DefaultPolicy is used unless configured otherwise.
func DefaultPolicy() Policy {
	return Policy{CPUOvercommit: 4, DiskOvercommit: 2, MemoryReserveMB: 512}
}

// Times are the periods of the fleet's clockwork; tests shorten them.
type Times struct {
	HostSilence    time.Duration // after which a host is offline
	MonitorEvery   time.Duration
	ReconcileEvery time.Duration
	ReconcileAge   time.Duration // a host is compared at least this often
	Lease          time.Duration // of an operation whose replica may have died
	CreateLimit    time.Duration // for the agent to make a sandbox
	DeleteLimit    time.Duration // for the agent to remove one
	RetryFor       time.Duration // how long an unreachable agent is asked again within one operation
	GiveUpAfter    time.Duration // a create that no replica could finish by then has failed

	HostCredentials time.Duration // how long a host's token and certificate are good; renewed when a third is left
}

// DefaultTimes are the product's.
func DefaultTimes() Times {
	return Times{
		HostSilence: 90 * time.Second, MonitorEvery: 5 * time.Second,
		ReconcileEvery: 2 * time.Second, ReconcileAge: 5 * time.Minute,
		Lease: 10 * time.Second, CreateLimit: 2 * time.Minute, DeleteLimit: time.Minute,
		RetryFor: 20 * time.Second, GiveUpAfter: 5 * time.Minute, HostCredentials: 365 * 24 * time.Hour,
	}
}

// Deps are what a Fleet is made of.
type Deps struct {
	Store  *store.Store
	Redis  *ephemeral.Redis
	Agents *agents.Pool
	CA     *rpc.CA
	Tokens *auth.Tokens
	Policy Policy
	Times  Times
	Log    *slog.Logger
	Faults func(point string) // if not nil, is called at named points of operations; tests end the process there
}

// Fleet is the service. Its methods are safe for concurrent use, also by several replicas on one database.
type Fleet struct {
	store  *store.Store
	redis  *ephemeral.Redis
	agents *agents.Pool
	ca     *rpc.CA
	tokens *auth.Tokens
	policy Policy
	times  Times
	log    *slog.Logger
	work   sync.WaitGroup
	wakes  sync.Map // sandbox id → *wake, those under way
	stats  *Stats
	faults func(point string)
}

// New makes a Fleet.
func New(d Deps) *Fleet {
	return &Fleet{
		store: d.Store, redis: d.Redis, agents: d.Agents, ca: d.CA, tokens: d.Tokens,
		policy: d.Policy, times: d.Times, log: d.Log, stats: &Stats{}, faults: d.Faults,
	}
}

// The points of an operation at which a test may end the process: its row is written, the host has been sent the
// request, it has answered, what it answered is written with its event.
const (
	pointBegun   = ".begun"
	pointSent    = ".sent"
	pointAsked   = ".asked"
	pointWritten = ".written"
)

func (f *Fleet) fault(operation, point string) {
	if f.faults != nil {
		f.faults(operation + point)
	}
}

// faultWhenSent has the point of requests of an operation that were just sent.
func (f *Fleet) faultWhenSent(ctx context.Context, operation string) context.Context {
	if f.faults == nil {
		return ctx
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { f.fault(operation, pointSent) },
	})
}

// Run runs the loops until ctx ends.
func (f *Fleet) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { f.store.Lead(ctx, store.LockMonitor, f.monitor) })
	wg.Go(func() { f.store.Lead(ctx, store.LockReconcile, f.reconcile) })
	wg.Go(func() { f.store.Lead(ctx, store.LockOutbox, f.relayEvents) })
	wg.Go(func() { f.store.Lead(ctx, store.LockExpiry, f.expire) })
	wg.Go(func() { f.store.Lead(ctx, store.LockMoments, f.compareMoments) })
	wg.Wait()
}

// Wait returns when no operation is under way, or when ctx ends.
func (f *Fleet) Wait(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		f.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// event writes to the outbox within the transaction of the change it tells of.
func event(ctx context.Context, tx store.Tx, kind string, teamID *string, subject string, data map[string]any) error {
	if data == nil {
		data = map[string]any{}
	}
	raw, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return tx.InsertEvent(ctx, db.InsertEventParams{Type: kind, TeamID: teamID, Subject: subject, Data: raw})
}

func every(ctx context.Context, period time.Duration, fn func(context.Context)) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		fn(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func notFound(what string) error {
	return wrenn.Errorf(wrenn.KindNotFound, "no such %s", what)
}

func invalid(field, format string, args ...any) error {
	return wrenn.Errorf(wrenn.KindInvalidRequest, "%s: "+format, append([]any{field}, args...)...).With("field", field)
}
