package wrenn

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"time"
)

const (
	attempts = 4
	// firstDelay doubles with each attempt; a random half of it is added.
	firstDelay = 200 * time.Millisecond
	// maxRetryAfter is the longest wait the server can ask of us; a longer one is the caller's to decide.
	maxRetryAfter = 10 * time.Second
	// maxAnswer bounds a JSON answer: two output streams of 16 MiB, escaped.
	maxAnswer = 256 << 20
)

// call is one request of the API with a JSON answer.
type call struct {
	method, path string
	query        url.Values
	body         any // encoded as JSON; nil for none
	out          any // decoded from the answer; nil if it is of no interest
	as           credential
}

// do performs the call. It is repeated after failures of the connection and when the server asks to
// come back: reads may always be repeated, and mutations carry one Idempotency-Key over all attempts.
// It gives the status of the answer.
func (c *Client) do(ctx context.Context, r call) (int, error) {
	var body []byte
	if r.body != nil {
		var err error
		if body, err = json.Marshal(r.body); err != nil {
			return 0, fmt.Errorf("wrenn: encoding the request: %w", err)
		}
	}
	key := ""
	if r.method != http.MethodGet && r.as != asNobody {
		key = newIdempotencyKey()
	}
	defer c.followProgress(ctx, key)()
	for try := 1; ; try++ {
		status, err := c.once(ctx, r, body, key)
		wait, again := retryDelay(err, try)
		if r.as == asNobody {
			again = false // a login is not repeated: each counts against a limit
		}
		if !again || try == attempts {
			return status, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return status, errors.Join(ctx.Err(), err)
		case <-timer.C:
		}
	}
}

func (c *Client) once(ctx context.Context, r call, body []byte, key string) (int, error) {
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := c.request(ctx, r, reader)
	if err != nil {
		return 0, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return 0, c.connectionError(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		return res.StatusCode, readError(res)
	}
	if r.out == nil || res.StatusCode == http.StatusNoContent {
		_, err = io.Copy(io.Discard, io.LimitReader(res.Body, maxErrorBody))
		return res.StatusCode, err
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(r.out); err != nil {
		return res.StatusCode, c.connectionError(ctx, fmt.Errorf("reading the answer: %w", err))
	}
	return res.StatusCode, nil
}

func (c *Client) request(ctx context.Context, r call, body io.Reader) (*http.Request, error) {
	u := *c.base
	u.Path += r.path
	u.RawQuery = r.query.Encode()
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("wrenn: %w", err)
	}
	req.Header.Set("Accept", "application/json")
	c.authorize(req.Header, r.as)
	return req, nil
}

// ConnectionError is a failure to reach the server or to read its answer: what became of the request
// is not known.
type ConnectionError struct {
	URL string
	Err error
}

func (e *ConnectionError) Error() string { return fmt.Sprintf("cannot reach %s: %v", e.URL, e.Err) }

// Unwrap gives the cause.
func (e *ConnectionError) Unwrap() error { return e.Err }

// connectionError keeps the caller's own cancellation apart from failures of the connection.
func (c *Client) connectionError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the method and the whole URL
	}
	return &ConnectionError{URL: c.URL(), Err: err}
}

// retryDelay decides whether the failure of an attempt is worth another, and after what time.
// no_capacity and host_unavailable are not: waiting for room is the caller's decision.
func retryDelay(err error, try int) (time.Duration, bool) {
	delay := firstDelay << (try - 1)
	delay += time.Duration(mathrand.Int64N(int64(delay) / 2))
	var conn *ConnectionError
	var failed *APIError
	switch {
	case errors.As(err, &conn):
		return delay, true
	case !errors.As(err, &failed):
		return 0, false
	case failed.Code == CodeRateLimited || failed.Code == CodeUnavailable:
		if failed.RetryAfter > maxRetryAfter {
			return 0, false
		}
		return max(delay, failed.RetryAfter), true
	}
	return 0, false
}

func newIdempotencyKey() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand since Go 1.24)
	return hex.EncodeToString(b[:])
}
