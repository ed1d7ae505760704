package exchange

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
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
	return &udp{p.endpoint, p.pool(openStream(p.endpoint, nil), streamLimits), p.Timeout, p.Log, atomic.Bool{}}
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

// New makes the upstream that a URL describes, without any traffic:
//
//	udp://HOST[:53]            plain DNS; by TCP where the answer is truncated or may be forged
//	tcp://HOST[:53]            plain DNS by TCP
//	tls://HOST[:853]           DNS over TLS (RFC 7858)
//	https://HOST[:443][/PATH]  DNS over HTTPS (RFC 8484), by HTTP/2; the path is /dns-query
//	h3://HOST[:443][/PATH]     the same by HTTP/3
//	quic://HOST[:853]          DNS over QUIC (RFC 9250)
//
// HOST is an address or a name; IPv6 stands in brackets. Errors are one line that names the upstream
// and says what to write instead.
func New(name, rawURL string, o Options) (*Upstream, error) {
	u, err := parse(name, rawURL, o)
	if err != nil {
		return nil, fmt.Errorf("dns upstream %q: %w", name, err)
	}
	return u, nil
}

func parse(name, rawURL string, o Options) (*Upstream, error) {
	// The parser's own errors quote the URL, and its path may be a secret.
	where, err := url.Parse(rawURL)
	if err != nil {
		return nil, errors.New("the url cannot be parsed (want scheme://host)")
	}
	known := slices.IndexFunc(schemes, func(s scheme) bool { return s.name == where.Scheme })
	switch {
	case known < 0 && !strings.Contains(rawURL, "://"):
		return nil, fmt.Errorf("the url has no scheme (have: %s; for example udp://192.0.2.53)", schemeNames())
	case known < 0:
		return nil, fmt.Errorf("unknown scheme %q (have: %s)", where.Scheme, schemeNames())
	}
	s := schemes[known]
	e := &endpoint{dialer: o.Dialer}
	if err := s.check(where, o); err != nil {
		return nil, err
	}
	if e.port, err = parsePort(where, s); err != nil {
		return nil, err
	}
	address, err := parseHost(where.Hostname())
	if err != nil {
		return nil, err
	}
	e.host = strings.ToLower(where.Hostname())
	if address.IsValid() {
		e.host = address.String()
	}

	o = o.complete()
	e.dialer = o.Dialer
	u := &Upstream{name: name, scheme: s.name, endpoint: e, timeout: o.Timeout, life: newLife(), slots: make(chan struct{}, maxQuestions)}
	switch {
	case address.IsValid() && len(o.Addresses)+len(o.Bootstrap) > 0:
		return nil, fmt.Errorf("the host %s is an address already: leave out addresses and bootstrap", address)
	case address.IsValid():
		e.fixed = []netip.AddrPort{netip.AddrPortFrom(address, e.port)}
	case len(o.Addresses) > 0:
		list := usable(o.Addresses)
		if len(list) < len(o.Addresses) {
			return nil, fmt.Errorf("addresses: one of %v is twice there or is not the address of a server, or there are more than %d", o.Addresses, maxAddresses)
		}
		for _, a := range list {
			e.fixed = append(e.fixed, netip.AddrPortFrom(a, e.port))
		}
	default:
		look, err := lookUp(o, u.life)
		if err != nil {
			return nil, err
		}
		u.located = &locator{host: e.host, look: look, timeout: lookUpTimeout(o.Timeout), life: u.life}
		e.locate = u.located
	}

	p := parts{endpoint: e, url: s.request(where, e), life: u.life, Options: o}
	if s.secure {
		if p.secure, err = certificates(e.host, o); err != nil {
			return nil, err
		}
		if s.alpn != "" {
			p.secure.NextProtos = []string{s.alpn}
		}
	}
	u.transport = s.make(p)
	return u, nil
}

// complete puts the defaults where nothing is given.
func (o Options) complete() Options {
	if o.Dialer == nil {
		o.Dialer = Direct(nil)
	}
	if o.BootstrapDialer == nil {
		o.BootstrapDialer = Direct(nil)
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// check refuses what the scheme has no use for.
func (s scheme) check(where *url.URL, o Options) error {
	switch {
	case where.User != nil:
		return errors.New("the url has a user name, which no dns upstream wants")
	case strings.Contains(where.Path+where.RawQuery, "{"):
		return errors.New("the url is a template: leave out the part in braces")
	case where.Opaque != "" || where.Fragment != "" || s.path == "" && (where.Path != "" && where.Path != "/" || where.RawQuery != ""):
		return fmt.Errorf("the url has more than a host and a port (want %s://host:port)", s.name)
	case !s.secure && o.CAFile != "":
		return fmt.Errorf("%s has no certificate to verify: leave out ca_file", s.name)
	case !s.secure && o.ServerName != "":
		return fmt.Errorf("%s has no certificate to verify: leave out server_name", s.name)
	}
	return nil
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

// lookUpTimeout leaves time for the question itself.
func lookUpTimeout(whole time.Duration) time.Duration { return whole / 2 }

// lookUp is how the host's addresses are found.
func lookUp(o Options, life *life) (func(context.Context, string) ([]netip.Addr, time.Duration, error), error) {
	if len(o.Bootstrap) == 0 {
		return system(o.BootstrapDialer), nil
	}
	servers := &endpoint{host: "bootstrap", dialer: o.BootstrapDialer}
	for _, b := range o.Bootstrap {
		if !b.IsValid() || b.Port() == 0 || b.Addr().IsUnspecified() || b.Addr().IsMulticast() {
			return nil, fmt.Errorf("bootstrap: %s is not the address and port of a server", b)
		}
		servers.fixed = append(servers.fixed, unmap(b))
	}
	o.Timeout = lookUpTimeout(o.Timeout)
	return bootstrap(newUDP(parts{endpoint: servers, life: life, Options: o})), nil
}

// certificates is how a server's identity is verified.
func certificates(host string, o Options) (*tls.Config, error) {
	c := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	if o.ServerName != "" {
		if _, err := parseHost(o.ServerName); err != nil {
			return nil, fmt.Errorf("server_name: %w", err)
		}
		c.ServerName = o.ServerName
	}
	if address, err := netip.ParseAddr(c.ServerName); err == nil {
		c.ServerName = address.WithZone("").String()
	}
	if o.CAFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(o.CAFile)
	if err != nil {
		return nil, fmt.Errorf("reading ca_file: %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading ca_file: %s contains no PEM certificate", o.CAFile)
	}
	return c, nil
}

func schemeNames() string {
	var names []string
	for _, s := range schemes {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

func parsePort(where *url.URL, s scheme) (uint16, error) {
	text := where.Port()
	if text == "" {
		return s.port, nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("bad port %q (want 1-65535)", text)
	}
	return uint16(port), nil
}

// parseHost checks a host; the address is valid where it is one.
func parseHost(host string) (netip.Addr, error) {
	if host == "" {
		return netip.Addr{}, errors.New("the url has no host")
	}
	if address, err := netip.ParseAddr(host); err == nil {
		if address.IsUnspecified() || address.IsMulticast() {
			return netip.Addr{}, fmt.Errorf("%s is not the address of a server", address)
		}
		return address.Unmap(), nil
	}
	if !validName(host) {
		return netip.Addr{}, fmt.Errorf("%q is neither an address nor a host name", host)
	}
	return netip.Addr{}, nil
}

// validName takes names of hosts. One with a number at its end is read as an address by some and not
// by others (2130706433, 0x7f.1), so that is none.
func validName(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if len(name) > 253 {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, notInName) {
			return false
		}
		last = label
	}
	_, err := strconv.ParseUint(last, 0, 64)
	return err != nil && strings.Trim(last, "0123456789") != ""
}

func notInName(c rune) bool {
	return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_')
}
