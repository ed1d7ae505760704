package exchange

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// New makes the upstream that a URL describes, without any traffic:
//
//	udp://HOST[:53]            plain DNS; by TCP where the answer is truncated or may be forged. A server that
//	                           changes the case of names and has no TCP is believed once 3 answers agree.
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
	o = o.complete()
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
	e.host = strings.TrimSuffix(strings.ToLower(where.Hostname()), ".")
	if address.IsValid() {
		e.host = address.String()
	}

	u := &Upstream{name: name, scheme: s.name, endpoint: e, bound: o.Timeout + o.Overtime, life: newLife(), slots: make(chan struct{}, maxQuestions)}
	if err := u.place(address, o); err != nil {
		return nil, err
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

// place says where the host is, or how to find that out.
func (u *Upstream) place(address netip.Addr, o Options) error {
	e := u.endpoint
	list := []netip.Addr{address}
	switch given := len(o.Addresses); {
	case address.IsValid() && given+len(o.Bootstrap) > 0:
		return fmt.Errorf("the host %s is an address already: leave out addresses and bootstrap", address)
	case lacksZone(address):
		return fmt.Errorf("%[1]s is on every link: write the server's global or unique local address, or [%[1]s%%25eth0] with its interface", address)
	case address.IsValid():
	case given > 0:
		if i := slices.IndexFunc(o.Addresses, lacksZone); i >= 0 {
			return fmt.Errorf("addresses: %s is on every link: write the server's global or unique local address", o.Addresses[i])
		}
		if list = usable(o.Addresses); len(list) < given {
			return fmt.Errorf("addresses: one of %v is there twice or is not the address of a server, or there are more than %d", o.Addresses, maxAddresses)
		}
	default:
		look, err := lookUp(o, u.life)
		u.located = &locator{host: e.host, look: look, timeout: lookUpTimeout(o.Timeout), life: u.life}
		e.locate = u.located
		return err
	}
	for _, a := range list {
		e.fixed = append(e.fixed, netip.AddrPortFrom(a, e.port))
	}
	return nil
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
		if lacksZone(b.Addr()) {
			return nil, fmt.Errorf("bootstrap: %s is on every link: write the server's global or unique local address", b.Addr())
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
	var err error
	if c.RootCAs, err = readAuthorities(o.CAFile); err != nil {
		return nil, fmt.Errorf("reading ca_file: %w", err)
	}
	return c, nil
}

// maxAuthorities bounds a file of certificates, in bytes. All that browsers trust have a quarter of it.
const maxAuthorities = 1 << 20

// readAuthorities reads certificates from a file that may be anything: a named pipe would be waited
// for, and a device has no end. Errors name the file.
func readAuthorities(path string) (*x509.CertPool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a pipe would wait for its writer
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	pem, err := io.ReadAll(io.LimitReader(f, maxAuthorities+1))
	if err != nil {
		return nil, err
	}
	authorities := x509.NewCertPool()
	switch {
	case len(pem) > maxAuthorities:
		return nil, fmt.Errorf("%s has more than %d MiB: leave only the authorities' certificates in it", path, maxAuthorities>>20)
	case !authorities.AppendCertsFromPEM(pem):
		return nil, fmt.Errorf("%s contains no PEM certificate", path)
	}
	return authorities, nil
}
