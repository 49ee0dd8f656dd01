package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/wrenn-sandbox/wrenn/test/stack"
)

// sample sums up values of one thing.
type sample struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95"`
	Min float64 `json:"min"`
	Max float64 `json:"max"`
}

// summarize takes percentiles by the nearest rank.
func summarize(values ...float64) sample {
	if len(values) == 0 {
		return sample{}
	}
	v := slices.Sorted(slices.Values(values))
	rank := func(q float64) float64 { return v[max(0, int(math.Ceil(q*float64(len(v))))-1)] }
	return sample{len(v), rank(0.5), rank(0.95), v[0], v[len(v)-1]}
}

// row is one line of the table. Ratio is ours / floor at p50.
type row struct {
	Part      string  `json:"part"`
	Operation string  `json:"operation"`
	Unit      string  `json:"unit"`
	Ours      sample  `json:"ours"`
	Floor     *sample `json:"floor,omitempty"`
	Ratio     float64 `json:"ratio,omitempty"`
	Goal      string  `json:"goal,omitempty"`
	Met       *bool   `json:"met,omitempty"`
}

// goal is what a row should reach.
type goal struct {
	text string
	met  func(ours, floor sample) bool
}

func atMost(limit float64, unit string) *goal {
	return &goal{fmt.Sprintf("≤ %g %s", limit, unit), func(ours, _ sample) bool { return ours.P50 <= limit }}
}

func atMostTimes(factor float64) *goal {
	return &goal{fmt.Sprintf("≤ %g × floor", factor), func(ours, floor sample) bool { return ours.P50 <= factor*floor.P50 }}
}

func atLeastTimes(factor float64) *goal {
	return &goal{fmt.Sprintf("≥ %g × floor", factor), func(ours, floor sample) bool { return ours.P50 >= factor*floor.P50 }}
}

func atMostMore(ms float64) *goal {
	return &goal{fmt.Sprintf("≤ floor + %g ms", ms), func(ours, floor sample) bool { return ours.P50 <= floor.P50+ms }}
}

// report is what a run found.
type report struct {
	StartedAt    time.Time         `json:"started_at"`
	Seconds      float64           `json:"seconds"`
	CPUs         int               `json:"cpus"`
	MemoryMB     int64             `json:"memory_mb"`
	LoadBefore   float64           `json:"load1_before"`
	LoadAfter    float64           `json:"load1_after"`
	Driver       string            `json:"driver"`
	Acceleration string            `json:"acceleration"`
	Versions     map[string]string `json:"versions,omitempty"`
	Rows         []row             `json:"rows"`
	Skipped      []string          `json:"skipped"`
	Failed       []string          `json:"failed"`
}

func newReport(ctx context.Context, s *stack.Stack) *report {
	r := &report{StartedAt: time.Now().UTC(), CPUs: runtime.NumCPU(), LoadBefore: load1(), Rows: []row{}, Skipped: []string{}, Failed: []string{}}
	if host, err := s.Admin.Host(ctx, s.HostID); err == nil { // figures come without it, too
		r.Driver, r.Acceleration, r.Versions, r.MemoryMB = host.Driver, host.Acceleration, host.Versions, host.MemoryMB
	}
	return r
}

// add appends a line to the report. floor and g may be nil.
func (b *bench) add(operation, unit string, ours sample, floor *sample, g *goal) {
	r := row{Part: b.part, Operation: operation, Unit: unit, Ours: ours, Floor: floor}
	against := sample{}
	if floor != nil {
		against = *floor
		if floor.P50 > 0 {
			r.Ratio = ours.P50 / floor.P50
		}
	}
	if g != nil {
		met := g.met(ours, against)
		r.Goal, r.Met = g.text, &met
	}
	b.report.Rows = append(b.report.Rows, r)
}

// skip notes why a part has no figures.
func (b *bench) skip(format string, args ...any) {
	why := b.part + ": " + fmt.Sprintf(format, args...)
	b.say("skipped %s", why)
	b.report.Skipped = append(b.report.Skipped, why)
}

func (r *report) print(out io.Writer) {
	fmt.Fprintf(out, "\n%d CPUs, %d MB, %s (%s), load %.1f before and %.1f after, %.0f s\n\n",
		r.CPUs, r.MemoryMB, r.Driver, r.Acceleration, r.LoadBefore, r.LoadAfter, r.Seconds)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "operation\tours p50\tp95\tfloor p50\tp95\t\tratio\tgoal\tmet")
	for _, row := range r.Rows {
		floor, floor95, ratio, met := "", "", "", ""
		if row.Floor != nil {
			floor, floor95, ratio = number(row.Floor.P50), number(row.Floor.P95), fmt.Sprintf("%.2f", row.Ratio)
		}
		if row.Met != nil {
			met = map[bool]string{true: "yes", false: "NO"}[*row.Met]
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			row.Operation, number(row.Ours.P50), number(row.Ours.P95), floor, floor95, row.Unit, ratio, row.Goal, met)
	}
	w.Flush()
	for _, s := range r.Skipped {
		fmt.Fprintln(out, "skipped", s)
	}
	for _, f := range r.Failed {
		fmt.Fprintln(out, "failed", f)
	}
}

// number shows three figures, and all of those before the point.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func (r *report) write(path string) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(raw, '\n'), 0o644)
}

// load1 is how many tasks wanted to run over the last minute; -1 if it cannot be told.
func load1() float64 {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return -1
	}
	first, _, _ := strings.Cut(string(raw), " ")
	load, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return -1
	}
	return load
}
