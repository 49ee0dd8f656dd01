// Package store owns the control plane's durable state in PostgreSQL: the schema (migrations), every
// query (queries/*.sql, generated into db), transactions and leader locks. It decides nothing: rules
// live with its callers. What belongs to a team is reached through Team only.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
)

const (
	maxConns         = 16
	maxRelaxedConns  = 4
	connectTimeout   = 5 * time.Second
	statementTimeout = 20 * time.Second
	idleTxTimeout    = 30 * time.Second
)

// Store is a pool of connections. Its embedded queries are those of the control plane itself; requests
// of a team go through Team.
type Store struct {
	*db.Queries
	pool    *pgxpool.Pool
	relaxed *pgxpool.Pool // for what may be lost if the server crashes: its commits do not wait for the disk
}

// Open makes the pool; it connects when first used.
func Open(ctx context.Context, url string) (*Store, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("database URL: %w", err)
	}
	if cfg.MaxConns < maxConns && !strings.Contains(url, "pool_max_conns") {
		cfg.MaxConns = maxConns
	}
	cfg.MaxConnIdleTime = 5 * time.Minute
	cfg.ConnConfig.ConnectTimeout = connectTimeout
	params := cfg.ConnConfig.RuntimeParams
	setDefault(params, "application_name", "wrenn-cp")
	setDefault(params, "statement_timeout", strconv.FormatInt(statementTimeout.Milliseconds(), 10))
	setDefault(params, "idle_in_transaction_session_timeout", strconv.FormatInt(idleTxTimeout.Milliseconds(), 10))
	// One plan per statement, whatever its parameters: planning anew costs more than most queries do, and the
	// server would do it more often the larger the tables are. Team.FindSandboxes is the exception.
	setDefault(params, "plan_cache_mode", "force_generic_plan")
	s := &Store{}
	if s.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return nil, err
	}
	loose := cfg.Copy()
	loose.MaxConns = maxRelaxedConns
	loose.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
	if s.relaxed, err = pgxpool.NewWithConfig(ctx, loose); err != nil {
		s.pool.Close()
		return nil, err
	}
	s.Queries = db.New(s.pool)
	return s, nil
}

// Heartbeat notes what a host reports. The next heartbeat says it again, so it may be lost with the server.
func (s *Store) Heartbeat(ctx context.Context, p db.HeartbeatParams) (db.HeartbeatRow, error) {
	return db.New(s.relaxed).Heartbeat(ctx, p)
}

func setDefault(m map[string]string, key, value string) {
	if _, ok := m[key]; !ok {
		m[key] = value
	}
}

// Close waits for connections in use and closes them.
func (s *Store) Close() {
	s.relaxed.Close()
	s.pool.Close()
}

// Ping asks the server.
func (s *Store) Ping(ctx context.Context) error { return s.pool.Ping(ctx) }

// Stat is how the pool is used.
func (s *Store) Stat() *pgxpool.Stat { return s.pool.Stat() }

// Tx is an open transaction.
type Tx struct{ *db.Queries }

// Tx runs fn in a transaction (read committed), which is committed if fn returns nil.
func (s *Store) Tx(ctx context.Context, fn func(Tx) error) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return fn(Tx{s.WithTx(tx)}) })
}

// IsNotFound tells that a query for one row gave none.
func IsNotFound(err error) bool { return errors.Is(err, pgx.ErrNoRows) }

// IsUniqueViolation tells that another row has what must be unique.
func IsUniqueViolation(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "23505"
}

// IsUnavailable tells that the database could not be reached, went away or had no room: the same
// request may succeed later.
func IsUnavailable(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch {
		case strings.HasPrefix(pg.Code, "08"), strings.HasPrefix(pg.Code, "53"), strings.HasPrefix(pg.Code, "57"),
			pg.Code == "25006", // read only: a failover is under way
			pg.Code == "40001", pg.Code == "40P01":
			return true
		}
		return false
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) ||
		errors.Is(err, net.ErrClosed) || pgconn.SafeToRetry(err) || (err != nil && strings.HasSuffix(err.Error(), "conn closed"))
}
