package api

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	onceLease = 10 * time.Second // after which an attempt that stopped renewing it is dead
	onceWait  = 2 * time.Minute  // how long a repetition waits for the first attempt
	onceKeep  = 1 << 20          // the largest answer that is kept

	markDigits = 16 // of the key's hash, by which a client knows the progress of its request
)

// attempt is what a handler may know of its Idempotency-Key.
type attempt struct {
	seed  string // the random part of the ids that the request makes
	again bool   // an earlier attempt died with its replica; it may have got anywhere
}

type attemptKey struct{}

func attemptOf(ctx context.Context) attempt {
	a, _ := ctx.Value(attemptKey{}).(attempt)
	return a
}

// newID makes the id of what a request makes; the same for each attempt of a request with an
// Idempotency-Key, so that a later one finds what an earlier one left.
func newID(ctx context.Context, prefix string) string {
	if a := attemptOf(ctx); a.seed != "" {
		return prefix + "-" + a.seed
	}
	return wrenn.NewID(prefix)
}

// repetition is one request with an Idempotency-Key. The key itself is not stored, only its hash: the
// stored answer may hold a secret that is shown once, and is sealed with a key made of it.
type repetition struct {
	scope, hash string // row key
	request     []byte
	holder      string
	sealKey     []byte
}

func (s *Server) repetition(r *http.Request, key string) (repetition, error) {
	body, err := io.ReadAll(r.Body) // bounded by check
	if err != nil {
		return repetition{}, err
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	scope := auth.From(r.Context()).ActorID()
	hashed := sha256.Sum256([]byte(key))
	request := sha256.New()
	for _, part := range [][]byte{[]byte(r.Method), []byte(r.URL.EscapedPath()), []byte(r.URL.RawQuery), body} {
		sum := sha256.Sum256(part)
		request.Write(sum[:])
	}
	mac := hmac.New(sha256.New, s.Secret)
	mac.Write([]byte("idempotency\x00" + scope + "\x00" + key))
	return repetition{scope, hex.EncodeToString(hashed[:]), request.Sum(nil), wrenn.NewID("try"), mac.Sum(nil)}, nil
}

// serveOnce serves a request with an Idempotency-Key: the first attempt does the work and keeps its answer if it succeeded;
// repetitions wait for that and get it. An attempt that failed leaves nothing, so the next one tries again.
func (s *Server) serveOnce(w http.ResponseWriter, r *http.Request, key string, h http.HandlerFunc) {
	rep, err := s.repetition(r, key)
	if err != nil {
		s.fail(w, r, badRequest(err))
		return
	}
	deadline := time.Now().Add(onceWait)
	for {
		seed := wrenn.NewID("x")[2:]
		row, err := s.st.ClaimIdempotencyKey(r.Context(), db.ClaimIdempotencyKeyParams{
			Scope: rep.scope, Key: rep.hash, RequestHash: rep.request, ResourceSeed: seed, Holder: rep.holder, Lease: onceLease,
		})
		if err == nil {
			s.attempt(w, r, rep, attempt{row.ResourceSeed, row.ResourceSeed != seed}, h)
			return
		}
		if !store.IsNotFound(err) {
			s.fail(w, r, err)
			return
		}
		row, err = s.st.IdempotencyKey(r.Context(), db.IdempotencyKeyParams{Scope: rep.scope, Key: rep.hash})
		switch {
		case store.IsNotFound(err): // released meanwhile: ours to try
			continue
		case err != nil:
			s.fail(w, r, err)
			return
		case !bytes.Equal(row.RequestHash, rep.request):
			s.fail(w, r, wrenn.Errorf(wrenn.KindConflict, "this Idempotency-Key was used for a different request; use a new one").With("field", "Idempotency-Key"))
			return
		case row.Status == "done":
			s.replay(w, r, rep, row)
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.fail(w, r, wrenn.Errorf(wrenn.KindConflict, "the first request with this Idempotency-Key is still being worked on; ask again"))
			return
		}
	}
}

// attempt does the work; a client that goes away does not stop it.
func (s *Server) attempt(w http.ResponseWriter, r *http.Request, rep repetition, a attempt, h http.HandlerFunc) {
	ctx := context.WithoutCancel(r.Context())
	stop := s.keepAttempt(ctx, rep)
	answer := &buffered{header: http.Header{}, status: http.StatusOK}
	finished := false
	defer func() {
		stop()
		if !finished { // a panic: the next attempt may try
			s.release(ctx, rep)
		}
	}()
	h(answer, r.WithContext(fleet.WithMark(context.WithValue(ctx, attemptKey{}, a), rep.hash[:markDigits])))
	if a.again && r.Method == http.MethodDelete && answer.status == http.StatusNotFound {
		answer = &buffered{header: http.Header{}, status: http.StatusNoContent} // the attempt that died had done it
	}
	finished = true
	if answer.status < 300 {
		s.keep(ctx, rep, answer)
	} else {
		s.release(ctx, rep)
	}
	answer.writeTo(w)
}

func (s *Server) keep(ctx context.Context, rep repetition, answer *buffered) {
	status, contentType := int32(answer.status), answer.header.Get("Content-Type")
	p := db.FinishIdempotencyKeyParams{Scope: rep.scope, Key: rep.hash, Holder: rep.holder, StatusCode: &status, ContentType: &contentType}
	if answer.body.Len() <= onceKeep {
		sealed, err := auth.Seal(rep.sealKey, rep.scope, answer.body.Bytes())
		if err != nil {
			s.log.Error("seal an answer", "error", err)
		}
		p.Body = sealed
	}
	if err := s.st.FinishIdempotencyKey(ctx, p); err != nil {
		s.log.Warn("keep an answer", "request_id", requestID(ctx), "error", err)
	}
}

func (s *Server) release(ctx context.Context, rep repetition) {
	err := s.st.ReleaseIdempotencyKey(ctx, db.ReleaseIdempotencyKeyParams{Scope: rep.scope, Key: rep.hash, Holder: rep.holder})
	if err != nil {
		s.log.Warn("release an idempotency key", "request_id", requestID(ctx), "error", err)
	}
}

// keepAttempt renews the lease until stop is called.
func (s *Server) keepAttempt(ctx context.Context, rep repetition) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		tick := time.NewTicker(onceLease / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			p := db.ExtendIdempotencyKeyParams{Scope: rep.scope, Key: rep.hash, Holder: rep.holder, Lease: onceLease}
			if _, err := s.st.ExtendIdempotencyKey(ctx, p); err != nil && ctx.Err() == nil {
				s.log.Warn("renew an idempotency key", "error", err)
			}
		}
	}()
	return cancel
}

func (s *Server) replay(w http.ResponseWriter, r *http.Request, rep repetition, row db.IdempotencyKey) {
	w.Header().Set("Idempotent-Replayed", "true")
	if row.Body == nil {
		s.fail(w, r, wrenn.Errorf(wrenn.KindConflict, "the request was done already; its answer was too large to be kept").With("status", row.StatusCode))
		return
	}
	body, err := auth.Open(rep.sealKey, rep.scope, row.Body)
	if err != nil {
		s.fail(w, r, wrenn.Wrap(err, wrenn.KindConflict, "the request was done already; its answer cannot be read any more"))
		return
	}
	if *row.ContentType != "" {
		w.Header().Set("Content-Type", *row.ContentType)
	}
	w.WriteHeader(int(*row.StatusCode))
	_, _ = w.Write(body)
}

// buffered is an answer that is held back until it has been kept.
type buffered struct {
	header http.Header
	status int
	wrote  bool
	body   bytes.Buffer
}

func (b *buffered) Header() http.Header { return b.header }

func (b *buffered) WriteHeader(status int) {
	if !b.wrote {
		b.status, b.wrote = status, true
	}
}

func (b *buffered) Write(p []byte) (int, error) {
	b.wrote = true
	return b.body.Write(p)
}

func (b *buffered) writeTo(w http.ResponseWriter) {
	for k, v := range b.header {
		w.Header()[k] = v
	}
	w.WriteHeader(b.status)
	_, _ = w.Write(b.body.Bytes())
}
