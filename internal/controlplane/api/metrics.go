package api

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
)

// metrics is what /metrics shows: requests, what the fleet did, and what the database holds.
type metrics struct {
	requests *prometheus.HistogramVec
	handler  http.Handler
}

func newMetrics(reg *prometheus.Registry, st *store.Store, f *fleet.Fleet) *metrics {
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_http_request_seconds", Help: "How long requests took, by route.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"route", "status"}),
		handler: promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}),
	}
	reg.MustRegister(m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), inventory{st})
	stats := f.Stats()
	for name, c := range map[string]struct {
		help string
		get  func() int64
	}{
		"wrenn_sandboxes_created_total":       {"Sandboxes that this process saw come up.", stats.Created.Load},
		"wrenn_sandboxes_created_cold_total":  {"Those of them that had to be booted, their template's first.", stats.CreatedCold.Load},
		"wrenn_sandbox_create_failures_total": {"Creates that failed on a host.", stats.CreateFailures.Load},
		"wrenn_sandboxes_deleted_total":       {"Sandboxes that this process saw go.", stats.Deleted.Load},
		"wrenn_placement_failures_total":      {"Creates for which no host had room.", stats.PlacementFailures.Load},
		"wrenn_operations_taken_over_total":   {"Operations whose replica had died.", stats.TakenOver.Load},
		"wrenn_unknown_sandboxes_total":       {"Times a host reported a sandbox that is not in the database.", stats.Unknown.Load},
		"wrenn_heartbeats_total":              {"Heartbeats taken.", stats.Heartbeats.Load},
	} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: c.help}, func() float64 { return float64(c.get()) }))
	}
	return m
}

func (m *metrics) serve(w http.ResponseWriter, r *http.Request) { m.handler.ServeHTTP(w, r) }

func (m *metrics) observe(route, method string, status int, took time.Duration) {
	if route == "" {
		route = "none"
		if method != http.MethodGet {
			route = "none, not GET"
		}
	}
	m.requests.WithLabelValues(route, strconv.Itoa(status)).Observe(took.Seconds())
}

// inventory counts rows when it is asked.
type inventory struct{ st *store.Store }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Describe names nothing: what there is depends on the database.
func (inventory) Describe(chan<- *prometheus.Desc) {}

// Collect gives what it can: without a database, metrics of the process still come.
func (i inventory) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	up := 1.0
	if err := i.collect(ctx, ch); err != nil {
		up = 0
	}
	gauge(ch, desc("wrenn_database_up", "Whether the database could be asked."), up)
	stat := i.st.Stat()
	gauge(ch, desc("wrenn_database_connections", "Connections of the pool.", "state"), float64(stat.AcquiredConns()), "in use")
	gauge(ch, desc("wrenn_database_connections", "Connections of the pool.", "state"), float64(stat.IdleConns()), "idle")
}

func (i inventory) collect(ctx context.Context, ch chan<- prometheus.Metric) error {
	hosts, err := i.st.HostsByStatus(ctx)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		gauge(ch, desc("wrenn_hosts", "Hosts.", "status", "type"), float64(h.Count), h.Status, h.Type)
	}
	boxes, err := i.st.SandboxesByStatus(ctx)
	if err != nil {
		return err
	}
	for _, b := range boxes {
		gauge(ch, desc("wrenn_sandboxes", "Sandboxes.", "status"), float64(b.Count), b.Status)
	}
	missing, err := i.st.MissingCount(ctx)
	if err != nil {
		return err
	}
	gauge(ch, desc("wrenn_sandboxes_missing", "Sandboxes that their host does not report."), float64(missing))
	return nil
}

func gauge(ch chan<- prometheus.Metric, d *prometheus.Desc, v float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}
