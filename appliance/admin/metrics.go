package admin

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// figures describes the metrics once: name, help with the unit, labels.
type figure struct {
	kind prometheus.ValueType
	desc *prometheus.Desc
}

func counter(name, help string, labels ...string) figure {
	return figure{prometheus.CounterValue, prometheus.NewDesc("sidegate_"+name, help, labels, nil)}
}

func gauge(name, help string, labels ...string) figure {
	return figure{prometheus.GaugeValue, prometheus.NewDesc("sidegate_"+name, help, labels, nil)}
}

var (
	buildInfo    = gauge("build_info", "Constant 1, with the version of the daemon.", "version")
	flowsDecided = counter("flows_decided_total", "Flows decided, by verdict, by the rule that decided (#N: the Nth of the file without a name) and by outbound. Since the daemon started.", "verdict", "rule", "outbound")
	drops        = counter("dropped_packets_total", "Packets of LAN clients that the datapath dropped or refused, by reason. It survives a restart of the daemon.", "reason")
	entries      = gauge("table_entries", "Entries in a table of the datapath.", "table")
	capacity     = gauge("table_capacity", "Entries that fit in a table of the datapath; entries divided by this is the pressure.", "table")
	clients      = gauge("clients", "Clients (MAC addresses, or IP addresses on links without) with flows in the flow table.")
	generation   = gauge("policy_generation", "Number of the policy in force. It grows with each change, and across restarts.")
	rules        = gauge("policy_rules", "Rules of the policy in force, without the implicit ones.")
	reloadOK     = gauge("last_reload_success", "1 if the configuration was taken when it was last read, 0 if it was refused and the one before is in force.")
	reloadTime   = gauge("last_reload_timestamp_seconds", "When the configuration was last read, in seconds since the epoch.")
	problems     = gauge("problems", "Things that keep the gateway from doing its work; `sidegate status` names them.")
	attached     = gauge("interface_attached", "1 if the policy meets the packets of a LAN interface of the configuration, 0 if not.", "interface")

	proxyBytes    = counter("proxy_bytes_total", "Payload bytes relayed, TCP and UDP, by outbound and direction (up: from the client).", "outbound", "direction")
	proxyPackets  = counter("proxy_udp_datagrams_total", "UDP datagrams relayed, by outbound and direction (up: from the client).", "outbound", "direction")
	proxyOpened   = counter("proxy_opened_total", "TCP connections and UDP sessions opened through an outbound.", "outbound", "network")
	proxyFailures = counter("proxy_failures_total", "TCP connections and UDP sessions that an outbound failed to open.", "outbound")
	proxyLive     = gauge("proxy_connections", "TCP connections being relayed.")
	proxySessions = gauge("proxy_udp_sessions", "UDP sessions (client endpoints with a mapping at an outbound) being relayed.")
	proxyFlows    = gauge("proxy_udp_flows", "UDP flows (pairs of endpoints) being relayed.")
	proxyRefused  = counter("proxy_refused_total", "TCP connections and UDP datagrams that the proxy refused or lost, by reason.", "reason")

	sniffed = counter("sniffed_flows_total", "Flows whose first bytes were read for a name, by what they told: tls, http, quic, nothing, timeout.", "result")

	dnsQueries     = counter("dns_queries_total", "DNS questions of the LAN.")
	dnsCached      = counter("dns_cached_total", "DNS questions answered from the cache.")
	dnsStale       = counter("dns_stale_total", "DNS questions answered from the cache after the answer's end, because the upstream did not answer.")
	dnsFailed      = counter("dns_failed_total", "DNS questions answered SERVFAIL.")
	dnsTruncated   = counter("dns_truncated_total", "DNS answers too long for UDP: the client asks again by TCP.")
	dnsTaught      = counter("dns_taught_total", "Times that the names of a DNS answer were written down for its client before it left.")
	dnsFiltered    = counter("dns_filtered_total", "DNS answers of which the rebinding filter took something.")
	dnsDropped     = counter("dns_dropped_total", "DNS questions without an answer, by reason.", "reason")
	dnsAsked       = counter("dns_upstream_queries_total", "DNS questions to an upstream.", "upstream")
	dnsAskedFailed = counter("dns_upstream_failures_total", "DNS questions that an upstream did not answer.", "upstream")
	dnsConnections = gauge("dns_connections", "TCP connections of DNS clients.")
	dnsEntries     = gauge("dns_cache_entries", "Answers in the DNS cache.")
)

// newRegistry has the gateway's figures and the daemon's own health, and nothing of the library's default registry.
func newRegistry(g Gateway, log *slog.Logger) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(&collector{g, log})
	prometheus.WrapRegistererWithPrefix("sidegate_", r).MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return r
}

// collector asks the gateway when it is scraped. Its metrics vary with the policy, so it is an unchecked
// one: it describes nothing beforehand.
type collector struct {
	gateway Gateway
	log     *slog.Logger
}

func (c *collector) Describe(chan<- *prometheus.Desc) {}

// scrapeTimeout is below Prometheus' default of 10 s.
const scrapeTimeout = 8 * time.Second

func (c *collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	emit := func(f figure, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(f.desc, f.kind, value, labels...)
	}
	status, err := c.gateway.Status(ctx)
	if err == nil {
		emitStatus(emit, status)
	}
	counts, errCounts := c.gateway.FlowCounts(ctx)
	for _, n := range counts {
		emit(flowsDecided, float64(n.Flows), n.Verdict, n.Rule, n.Outbound)
	}
	if err == nil {
		err = errCounts
	}
	if err != nil { // a scrape that lacks figures says so: it fails
		c.log.Warn("reading the figures for prometheus", "error", err)
		out <- prometheus.NewInvalidMetric(buildInfo.desc, err)
	}
}

func emitStatus(emit func(figure, float64, ...string), s Status) {
	emit(buildInfo, 1, s.Version)
	emit(generation, float64(s.Generation))
	emit(rules, float64(s.Config.Rules))
	emit(reloadOK, oneIf(s.LastReload.OK))
	emit(reloadTime, float64(s.LastReload.Time.UnixMilli())/1000)
	emit(problems, float64(len(s.Problems)))
	for _, i := range s.Interfaces {
		emit(attached, oneIf(i.Attached), i.Name)
	}
	for reason, n := range s.Drops {
		emit(drops, float64(n), reason)
	}
	for name, t := range s.Tables {
		emit(entries, float64(t.Entries), name)
		emit(capacity, float64(t.Max), name)
	}
	emit(clients, float64(s.Tables["clients"].Entries))

	emit(proxyLive, float64(s.Proxy.Connections))
	emit(proxySessions, float64(s.Proxy.Sessions))
	emit(proxyFlows, float64(s.Proxy.Flows))
	for reason, n := range s.Proxy.Refused {
		emit(proxyRefused, float64(n), reason)
	}
	for name, t := range s.Proxy.Outbounds {
		emit(proxyBytes, float64(t.BytesUp), name, "up")
		emit(proxyBytes, float64(t.BytesDown), name, "down")
		emit(proxyPackets, float64(t.PacketsUp), name, "up")
		emit(proxyPackets, float64(t.PacketsDown), name, "down")
		emit(proxyOpened, float64(t.Connections), name, "tcp")
		emit(proxyOpened, float64(t.Sessions), name, "udp")
		emit(proxyFailures, float64(t.Failures), name)
	}
	for result, n := range map[string]uint64{
		"tls": s.Sniff.TLS, "http": s.Sniff.HTTP, "quic": s.Sniff.QUIC, "nothing": s.Sniff.Nothing, "timeout": s.Sniff.Timeout,
	} {
		emit(sniffed, float64(n), result)
	}
	if s.DNS != nil {
		emitDNS(emit, s.DNS)
	}
}

func emitDNS(emit func(figure, float64, ...string), d *DNS) {
	emit(dnsQueries, float64(d.Queries))
	emit(dnsCached, float64(d.Cached))
	emit(dnsStale, float64(d.Stale))
	emit(dnsFailed, float64(d.Failed))
	emit(dnsTruncated, float64(d.Truncated))
	emit(dnsTaught, float64(d.Taught))
	emit(dnsFiltered, float64(d.Filtered))
	emit(dnsConnections, float64(d.Connections))
	emit(dnsEntries, float64(d.Entries))
	for reason, n := range d.Dropped {
		emit(dnsDropped, float64(n), reason)
	}
	for name, u := range d.Upstreams {
		emit(dnsAsked, float64(u.Queries), name)
		emit(dnsAskedFailed, float64(u.Failures), name)
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
