package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
	"github.com/wrenn-sandbox/wrenn/test/stack"
)

const (
	planeClients = 8
	planeHosts   = 64
	planeSlice   = time.Second
	planeSlices  = 3
	fewRows      = 10
	manyRows     = 100_000
)

// measurePlane counts requests per second of the control plane alone, each beside one that passes the same
// middleware with the same credentials and then has nothing to do.
func measurePlane(ctx context.Context, b *bench) (err error) {
	db, err := pgx.Connect(ctx, b.stack.Postgres.URL)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	p := &plane{b: b, db: db, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: planeClients}}}
	defer p.http.CloseIdleConnections()
	defer func() { err = errors.Join(err, p.clear(ctx)) }()
	if err := p.heartbeats(ctx); err != nil {
		return err
	}
	return p.reads(ctx)
}

// heartbeats are those of many hosts in turn. The empty one says that it is another host's.
func (p *plane) heartbeats(ctx context.Context) error {
	beat, err := json.Marshal(api.HeartbeatRequest{FreeMemoryMB: 1024, FreeDiskMB: 10_000, Load1: 0.5, StateRevision: 1})
	if err != nil {
		return err
	}
	var beats, empty []request
	for range planeHosts {
		id, token, err := p.b.registerHost(ctx)
		if err != nil {
			return err
		}
		p.hosts = append(p.hosts, id)
		r := request{method: http.MethodPost, path: "/v1/hosts/" + id + "/heartbeat", header: "X-Host-Token", value: token, body: beat}
		beats = append(beats, r)
		r.path, r.status = "/v1/hosts/"+p.hosts[0]+"x/heartbeat", http.StatusForbidden
		empty = append(empty, r)
	}
	_, err = p.compare(ctx, fmt.Sprintf("heartbeats per second of %d hosts", planeHosts), beats, empty)
	return err
}

// reads compares get and list with "who am I", which is known after authentication.
func (p *plane) reads(ctx context.Context) error {
	b := p.b
	session, err := b.stack.Admin.Login(ctx, stack.Email, stack.Password)
	if err != nil {
		return err
	}
	as := func(path string) []request {
		return []request{{method: http.MethodGet, path: path, header: "Authorization", value: "Bearer " + session.Token}}
	}
	var lists []sample
	for _, rows := range []int{fewRows, manyRows} {
		first, err := p.insert(ctx, rows)
		if err != nil {
			return err
		}
		if _, err := p.compare(ctx, fmt.Sprintf("get per second, team of %d sandboxes", rows), as("/v1/sandboxes/"+first), as("/v1/me")); err != nil {
			return err
		}
		rate, err := p.compare(ctx, fmt.Sprintf("list of 10 per second, team of %d", rows), as("/v1/sandboxes?limit=10"), as("/v1/me"))
		if err != nil {
			return err
		}
		lists = append(lists, rate)
	}
	b.add(fmt.Sprintf("list: %d sandboxes beside %d", manyRows, fewRows), "1/s", lists[1], &lists[0], atLeastTimes(0.8))
	return nil
}

type plane struct {
	b     *bench
	db    *pgx.Conn
	hosts []string
	http  *http.Client
}

// registerHost makes a host that only heartbeats: without a certificate nothing is placed on it.
func (b *bench) registerHost(ctx context.Context) (id, token string, err error) {
	made, err := b.stack.Admin.CreateHost(ctx, api.CreateHostRequest{Type: api.HostTypeRegular})
	if err != nil {
		return "", "", err
	}
	body, err := json.Marshal(api.RegisterHostRequest{Token: made.RegistrationToken, Arch: "amd64", CPUCores: 2, MemoryMB: 4096, DiskGB: 10, Address: "127.0.0.1:1"})
	if err != nil {
		return "", "", err
	}
	var out api.RegisteredHost
	raw, err := request{method: http.MethodPost, path: "/v1/hosts/register", body: body}.do(ctx, http.DefaultClient, b.stack.URL)
	if err == nil {
		err = json.Unmarshal(raw, &out)
	}
	return made.Host.ID, out.Token, err
}

// insert fills the team up to so many paused sandboxes on that host, and gives the id of one.
func (p *plane) insert(ctx context.Context, rows int) (string, error) {
	me, err := p.b.stack.Admin.Me(ctx)
	if err != nil {
		return "", err
	}
	_, err = p.db.Exec(ctx, `
		INSERT INTO sandboxes (id, team_id, host_id, status, template, default_user, vcpus, memory_mb, disk_mb, operation_id, created_by, created_at)
		SELECT 'sb-' || lpad(n::text, 25, '0'), $1, $2, 'paused', 'minimal', 'user', 1, 256, 2048, '', $3, now() - n * interval '1 second'
		FROM generate_series(1, $4::int) n ON CONFLICT DO NOTHING`, me.TeamID, p.hosts[0], me.ID, rows)
	if err == nil {
		_, err = p.db.Exec(ctx, `ANALYZE sandboxes`) // as autovacuum does, a little later
	}
	return fmt.Sprintf("sb-%025d", rows/2), err
}

func (p *plane) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	_, err := p.db.Exec(ctx, `DELETE FROM sandboxes WHERE host_id = ANY($1)`, p.hosts)
	errs := []error{err}
	for _, id := range p.hosts {
		errs = append(errs, p.b.stack.Admin.DeleteHost(ctx, id))
	}
	return errors.Join(errs...)
}

// compare takes turns between the requests and the empty ones.
func (p *plane) compare(ctx context.Context, operation string, requests, empty []request) (sample, error) {
	var ours, floor []float64
	for range planeSlices {
		rate, err := p.rate(ctx, empty)
		if err != nil {
			return sample{}, err
		}
		floor = append(floor, rate)
		if rate, err = p.rate(ctx, requests); err != nil {
			return sample{}, fmt.Errorf("%s: %w", operation, err)
		}
		ours = append(ours, rate)
	}
	o, f := summarize(ours...), summarize(floor...)
	p.b.add(operation, "1/s", o, &f, atLeastTimes(0.5))
	return o, nil
}

// rate is how many of the requests, in turn, planeClients clients get answered in a second.
func (p *plane) rate(ctx context.Context, requests []request) (float64, error) {
	var done atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, planeClients)
	began := time.Now()
	for i := range planeClients {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := i; time.Since(began) < planeSlice && errs[i] == nil; n += planeClients {
				if _, errs[i] = requests[n%len(requests)].do(ctx, p.http, p.b.stack.URL); errs[i] == nil {
					done.Add(1)
				}
			}
		}()
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(began).Seconds(), errors.Join(errs...)
}

// request is one that is made again and again; without the SDK, whose share is not to be measured.
type request struct {
	method, path  string
	header, value string
	body          []byte
	status        int // that is wanted; 0 is any that says yes
}

func (r request) do(ctx context.Context, client *http.Client, base string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, r.method, base+r.path, bytes.NewReader(r.body))
	if err != nil {
		return nil, err
	}
	if r.header != "" {
		req.Header.Set(r.header, r.value)
	}
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err == nil && res.StatusCode >= 300 && res.StatusCode != r.status {
		err = &statusError{res.StatusCode, fmt.Sprintf("%s %s: %s: %s", r.method, r.path, res.Status, raw)}
	}
	return raw, err
}

// statusError is an answer that says no.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return e.text }
