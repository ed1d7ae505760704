package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics is the Prometheus endpoint: GET /metrics on a loopback address, and nothing else. It can be moved
// to another address, or switched off, while it runs.
type Metrics struct {
	log     *slog.Logger
	handler http.Handler
	ready   chan struct{}

	mu      sync.Mutex
	address string            // empty: off
	change  chan net.Listener // nil listener: off
}

// NewMetrics makes an endpoint that is off.
func NewMetrics(g Gateway, log *slog.Logger) *Metrics {
	return &Metrics{
		log:     log,
		handler: localOnly(metricsHandler(newRegistry(g, log), log)),
		ready:   make(chan struct{}),
		change:  make(chan net.Listener, 1),
	}
}

func metricsHandler(r *prometheus.Registry, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		MaxRequestsInFlight: 4, // a scrape walks the flow table
		Timeout:             scrapeTimeout + time.Second,
	}))
	return mux
}

// localOnly refuses what a web page can make a browser on this machine ask: a page of the attacker's site
// whose name he has pointed at 127.0.0.1 comes with that name as Host, and a foreign page with an Origin.
func localOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !localHost(r.Host):
			http.Error(w, "this endpoint is only for the machine itself: ask by a loopback address", http.StatusMisdirectedRequest)
		case r.Header.Get("Origin") != "" || crossSite(r.Header.Get("Sec-Fetch-Site")):
			http.Error(w, "web pages may not read this", http.StatusForbidden)
		case r.Method != http.MethodGet:
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, "read-only", http.StatusMethodNotAllowed)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func localHost(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	address, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && address.IsLoopback()
}

func crossSite(fetch string) bool { return fetch != "" && fetch != "none" && fetch != "same-origin" }

// Prepare opens a socket on the address (empty: none), without serving on it. Then either commit moves the
// endpoint there, or abort gives the socket up. The address in use needs no new socket.
func (m *Metrics) Prepare(address string) (commit, abort func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if address == m.address {
		return func() {}, func() {}, nil
	}
	var listener net.Listener
	if address != "" {
		at, err := netip.ParseAddrPort(address)
		if err == nil && !at.Addr().IsLoopback() {
			err = errors.New("it is not a loopback address")
		}
		if err == nil {
			listener, err = net.Listen("tcp", address)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("listening on %s: %w", address, err)
		}
	}
	commit = func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.address = address
		select {
		case waiting := <-m.change: // not yet taken by Run
			if waiting != nil {
				waiting.Close()
			}
		default:
		}
		m.change <- listener
	}
	abort = func() {
		if listener != nil {
			listener.Close()
		}
	}
	return commit, abort, nil
}

func (m *Metrics) String() string { return "metrics" }

// Ready is closed when the endpoint is where it was last moved to.
func (m *Metrics) Ready() <-chan struct{} { return m.ready }

// Run serves until ctx ends.
func (m *Metrics) Run(ctx context.Context) error {
	close(m.ready)
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			m.discard()
			return nil
		case listener := <-m.change:
			stop()
			stop = m.serve(ctx, listener)
		}
	}
}

// serve starts serving and returns how to stop, which waits.
func (m *Metrics) serve(ctx context.Context, listener net.Listener) (stop func()) {
	if listener == nil {
		return func() {}
	}
	server := &http.Server{
		Handler:           http.MaxBytesHandler(m.handler, 0),
		MaxHeaderBytes:    maxHeader,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       headerTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := serve(ctx, server, listener); err != nil {
			m.log.Warn("the metrics endpoint has ended", "address", listener.Addr().String(), "error", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// Close gives up a socket that was prepared and never served on.
func (m *Metrics) Close() { m.discard() }

func (m *Metrics) discard() {
	select {
	case listener := <-m.change:
		if listener != nil {
			listener.Close()
		}
	default:
	}
}
