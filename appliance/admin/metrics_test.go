package admin

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestNameMetrics: what is known of DNS and sniffing is in the figures, and DNS is only where it is answered.
func TestNameMetrics(t *testing.T) {
	g := &gatewayOf{status: Status{
		Sniff: Sniff{TLS: 1, HTTP: 2, QUIC: 3, Nothing: 4, Timeout: 5},
		DNS: &DNS{
			Queries: 6, Cached: 7, Stale: 8, Failed: 9, Truncated: 10, Taught: 11, Filtered: 12, Connections: 13, Entries: 14,
			Upstreams: map[string]DNSUpstream{"isp": {Queries: 15, Failures: 16}},
			Dropped:   map[string]uint64{"malformed": 17},
		},
	}}
	log := slog.New(slog.DiscardHandler)
	handler := metricsHandler(newRegistry(g, log), log)
	scrape := func() (int, string) {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
		return w.Code, w.Body.String()
	}
	status, text := scrape()
	if status != http.StatusOK {
		t.Fatalf("status %d: %s", status, text)
	}
	for _, line := range []string{
		`sidegate_sniffed_flows_total{result="tls"} 1`,
		`sidegate_sniffed_flows_total{result="http"} 2`,
		`sidegate_sniffed_flows_total{result="quic"} 3`,
		`sidegate_sniffed_flows_total{result="nothing"} 4`,
		`sidegate_sniffed_flows_total{result="timeout"} 5`,
		`sidegate_dns_queries_total 6`,
		`sidegate_dns_cached_total 7`,
		`sidegate_dns_stale_total 8`,
		`sidegate_dns_failed_total 9`,
		`sidegate_dns_truncated_total 10`,
		`sidegate_dns_taught_total 11`,
		`sidegate_dns_filtered_total 12`,
		`sidegate_dns_connections 13`,
		`sidegate_dns_cache_entries 14`,
		`sidegate_dns_upstream_queries_total{upstream="isp"} 15`,
		`sidegate_dns_upstream_failures_total{upstream="isp"} 16`,
		`sidegate_dns_dropped_total{reason="malformed"} 17`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("there is no %s", line)
		}
	}

	g.status.DNS = nil
	if _, text := scrape(); strings.Contains(text, "sidegate_dns_") {
		t.Errorf("there are figures of DNS, which is not answered:\n%s", text)
	}
	g.err = errors.New("reading the drops: no such map")
	if status, text := scrape(); status == http.StatusOK {
		t.Errorf("a scrape without figures succeeds:\n%s", text)
	}
}
