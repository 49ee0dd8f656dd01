package api

import (
	"encoding/base64"
	"strconv"
	"strings"
	"time"
)

const defaultLimit = 100

// page is which part of a list is asked for: so many rows after a place in the order (created_at, id), newest
// first.
type page struct {
	limit   int
	afterAt *time.Time
	afterID string
}

func readPage(limit *int, cursor *string) (page, error) {
	p := page{limit: defaultLimit}
	if limit != nil {
		p.limit = *limit
	}
	if cursor == nil {
		return p, nil
	}
	bad := invalid("cursor", "is not one that this list gave")
	raw, err := base64.RawURLEncoding.DecodeString(*cursor)
	if err != nil {
		return p, bad
	}
	micros, id, ok := strings.Cut(string(raw), " ")
	n, err := strconv.ParseInt(micros, 36, 64)
	if !ok || err != nil || checkText("cursor", id) != nil || n < 0 || n > maxMicros {
		return p, bad
	}
	at := time.UnixMicro(n).UTC()
	p.afterAt, p.afterID = &at, id
	return p, nil
}

// maxMicros is the year 9999, the last that a timestamp of RFC 3339 can have.
const maxMicros = 253402300799 * 1_000_000

// before is the place that the page begins after; that of the first page is after everything.
func (p page) before() (time.Time, string) {
	if p.afterAt == nil {
		return time.UnixMicro(maxMicros).UTC(), ""
	}
	return *p.afterAt, p.afterID
}

// fetch is how many rows to ask the database for: one more tells whether there are more.
func (p page) fetch() int32 { return int32(p.limit) + 1 }

// cut drops the extra row and gives the cursor of what follows, nil at the end.
func cut[T any](p page, rows []T, place func(T) (time.Time, string)) ([]T, *string) {
	if len(rows) <= p.limit {
		return rows, nil
	}
	rows = rows[:p.limit]
	at, id := place(rows[p.limit-1])
	cursor := base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(at.UnixMicro(), 36) + " " + id))
	return rows, &cursor
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	u := t.UTC()
	return &u
}
