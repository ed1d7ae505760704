package exchange

import (
	"context"
	"crypto/tls"
	"net/url"
	"strconv"
	"strings"
)

// scheme is one kind of upstream that a URL can describe.
type scheme struct {
	name string
	port uint16 // when the URL has none
	// alpn is the protocol to agree on in TLS; secure says that there is TLS. RFC 7858 has none for tls://.
	secure bool
	alpn   string
	path   string // when the URL has none; empty: it must not have one
	make   func(p parts) transport
}

// parts are what transports are made of.
type parts struct {
	*endpoint
	url    string      // of requests, for those that make them
	secure *tls.Config // nil where the scheme is not
	life   *life
	Options
}

var schemes = []scheme{
	{name: "udp", port: 53, make: newUDP},
	{name: "tcp", port: 53, make: newTCP},
	{name: "tls", port: 853, secure: true, make: newTLS},
	{name: "https", port: 443, secure: true, alpn: "h2", path: "/dns-query", make: newHTTPS},
	{name: "h3", port: 443, secure: true, alpn: "h3", path: "/dns-query", make: newH3},
	{name: "quic", port: 853, secure: true, alpn: "doq", make: newDoQ},
}

var (
	// streamLimits spread questions, since some servers answer in order, and a slow one holds up those
	// behind it.
	streamLimits = limits{width: 4, depth: 8}
	// multiplexLimits are for protocols whose questions are independent. Servers allow 100 at a time.
	multiplexLimits = limits{width: 2, depth: 64}
	encrypted       = shape{padded: true}
)

func newUDP(p parts) transport {
	return &udp{
		endpoint: p.endpoint, tcp: p.pool(openStream(p.endpoint, nil), streamLimits), timeout: p.Timeout,
		folding: folding{log: p.Log, host: p.endpoint.host},
	}
}

func newTCP(p parts) transport {
	return &pooled{p.pool(openStream(p.endpoint, nil), streamLimits), shape{}}
}

func newTLS(p parts) transport {
	return &pooled{p.pool(openStream(p.endpoint, p.secure), streamLimits), encrypted}
}

func newHTTPS(p parts) transport {
	return &pooled{p.pool(openHTTPS(p.endpoint, p.secure, p.url), multiplexLimits), encrypted}
}

func newH3(p parts) transport {
	return &pooled{p.pool(openH3(p.endpoint, p.secure, p.url), multiplexLimits), encrypted}
}

func newDoQ(p parts) transport {
	return &pooled{p.pool(openDoQ(p.endpoint, p.secure), multiplexLimits), encrypted}
}

// pool connects in less than the timeout, so that questions hear what went wrong.
func (p parts) pool(open func(context.Context) (session, error), l limits) *pool {
	return &pool{open: open, timeout: p.Timeout, connectTimeout: p.Timeout * 3 / 4, life: p.life, limits: l}
}

// request is the URL of requests to the endpoint.
func (s scheme) request(where *url.URL, e *endpoint) string {
	u := url.URL{Scheme: "https", Host: hostPort(e.host, e.port), Path: where.Path, RawPath: where.RawPath, RawQuery: where.RawQuery}
	if e.port == s.port {
		u.Host = strings.TrimSuffix(u.Host, ":"+strconv.Itoa(int(e.port)))
	}
	if u.Path == "" {
		u.Path = s.path
	}
	return u.String()
}

func schemeNames() string {
	var names []string
	for _, s := range schemes {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}
