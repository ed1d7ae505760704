package outbound

import (
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
	"strconv"
	"strings"
	"syscall"

	"sidegate/appliance/policy"
)

// Credentials are what an upstream proxy asks for. They print as nothing.
type Credentials struct {
	Username, Password string
}

// String hides the content, so that no format verb shows it.
func (Credentials) String() string { return "(credentials)" }

// GoString hides the content from %#v.
func (c Credentials) GoString() string { return c.String() }

// LogValue hides the content from log/slog.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// scheme is one kind of upstream that a URL can describe.
type scheme struct {
	name    string
	kind    string   // for errors
	port    uint16   // when the URL has none; 0: there is no usual one, so it must be given
	queries []string // the parameters that it knows
	make    func(u upstream, c Credentials, query url.Values) (Outbound, error)
}

// schemes has 1080 for SOCKS5 (IANA's, RFC 1928) and 443 for https. HTTP proxies listen on 3128, 8080,
// 8888 or 80 with nobody agreeing, and a wrong guess fails late: there the port is mandatory.
var schemes = []scheme{
	{name: "socks5", kind: "socks5 server", port: 1080, make: newSOCKS5},
	{name: "http", kind: "http proxy", make: newHTTP},
	{name: "https", kind: "https proxy", port: 443, queries: []string{"ca_file", "server_name"}, make: newHTTPS},
}

// New makes the outbound that a URL describes:
//
//	socks5://HOST[:1080]    RFC 1928; the username and password of RFC 1929 from the credentials
//	http://HOST:PORT        CONNECT; basic authentication (RFC 7617) from the credentials
//	https://HOST[:443]      the same inside TLS; the proxy's certificate is verified for HOST against
//	                        the system's authorities
//	    ?ca_file=PATH       … against the PEM certificates in this file instead
//	    ?server_name=NAME   … for this name instead
//
// HOST is an address or a name; a name is looked up for each connection and all its addresses are
// tried (RFC 8305). A username may stand in the URL or in the credentials; a password only in the
// credentials. Errors are one line that names the outbound and never shows the URL's user part.
func New(name, rawURL string, credentials Credentials, o Options) (Outbound, error) {
	made, err := parse(name, rawURL, credentials, o)
	if err != nil {
		return nil, fmt.Errorf("outbound %q: %w", name, err)
	}
	return made, nil
}

func parse(name, rawURL string, credentials Credentials, o Options) (Outbound, error) {
	switch name {
	case "":
		return nil, errors.New("the name is empty")
	case policy.OutboundDirect, policy.OutboundBlock:
		return nil, errors.New("the name is built in: choose another one")
	}
	// The parser's own errors quote the URL, and where it went wrong a password may be in any part.
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, errors.New("the url cannot be parsed (want scheme://host:port)")
	}
	if _, inline := u.User.Password(); inline {
		return nil, errors.New("the url contains a password: put it into password_file")
	}
	known := slices.IndexFunc(schemes, func(s scheme) bool { return s.name == u.Scheme })
	switch {
	case known < 0 && u.Scheme == "":
		return nil, fmt.Errorf("the url has no scheme (have: %s)", schemeNames())
	case known < 0:
		return nil, fmt.Errorf("unknown scheme %q (have: %s)", u.Scheme, schemeNames())
	case u.Opaque != "" || u.Path != "" && u.Path != "/" || u.Fragment != "":
		return nil, fmt.Errorf("the url has more than a host and a port (want %s://host:port)", u.Scheme)
	}
	s := schemes[known]

	server := upstream{outbound: name, kind: s.kind, host: u.Hostname(), options: o, dialer: o.dialer()}
	if server.port, err = parsePort(u, s); err != nil {
		return nil, err
	}
	if server.host, err = canonicalHost(server.host); err != nil {
		return nil, err
	}
	if user := u.User.Username(); user != "" {
		if credentials.Username != "" && credentials.Username != user {
			return nil, errors.New("the username is given twice, in the url and beside it")
		}
		credentials.Username = user
	}
	if credentials.Username == "" && credentials.Password != "" {
		return nil, errors.New("there is a password but no username: set username")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errors.New("the parameters after ? cannot be parsed")
	}
	for key, values := range query {
		if !slices.Contains(s.queries, key) {
			return nil, fmt.Errorf("unknown url parameter %q (%s has: %s)", key, s.name, orNone(s.queries))
		}
		if len(values) != 1 || values[0] == "" {
			return nil, fmt.Errorf("the url parameter %s wants one value", key)
		}
	}
	return s.make(server, credentials, query)
}

func schemeNames() string {
	var names []string
	for _, s := range schemes {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

func parsePort(u *url.URL, s scheme) (uint16, error) {
	text := u.Port()
	if text == "" {
		if s.port == 0 || strings.HasSuffix(u.Host, ":") {
			return 0, fmt.Errorf("the url has no port (want %s://host:port)", s.name)
		}
		return s.port, nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("bad port %q (want 1-65535)", text)
	}
	return uint16(port), nil
}

// canonicalHost checks the host of an upstream and gives it one spelling: Set.Upstreams lists each once.
func canonicalHost(host string) (string, error) {
	if host == "" {
		return "", errors.New("the url has no host")
	}
	if address, err := netip.ParseAddr(host); err == nil {
		if address.IsUnspecified() || address.IsMulticast() {
			return "", fmt.Errorf("%s is not the address of a server", address)
		}
		return address.Unmap().String(), nil
	}
	if err := validName(host); err != nil {
		return "", fmt.Errorf("bad host: %w", err)
	}
	return strings.ToLower(host), nil
}

func newSOCKS5(u upstream, c Credentials, _ url.Values) (Outbound, error) {
	switch {
	case len(c.Username) > 255:
		return nil, errors.New("the username is longer than 255 bytes, which socks5 cannot send")
	case len(c.Password) > 255:
		return nil, errors.New("the password is longer than 255 bytes, which socks5 cannot send")
	case c.Username != "" && c.Password == "":
		return nil, errors.New("there is a username but no password: set password_file")
	}
	s := &socks5{upstream: u}
	if c.Username != "" {
		s.credentials = func() Credentials { return c }
	}
	return s, nil
}

func newHTTP(u upstream, c Credentials, _ url.Values) (Outbound, error) { return newConnect(u, c) }

func newConnect(u upstream, c Credentials) (*httpConnect, error) {
	h := &httpConnect{upstream: u}
	if strings.Contains(c.Username, ":") {
		return nil, errors.New("the username contains a colon, which basic authentication cannot send")
	}
	if strings.ContainsFunc(c.Username+c.Password, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return nil, errors.New("the username or password contains a control character, such as a line break")
	}
	if c.Username != "" {
		h.authorization = func() string { return basicAuthorization(c) }
	}
	return h, nil
}

func newHTTPS(u upstream, c Credentials, query url.Values) (Outbound, error) {
	h, err := newConnect(u, c)
	if err != nil {
		return nil, err
	}
	name := u.host
	if address, err := netip.ParseAddr(name); err == nil {
		name = address.WithZone("").String()
	}
	h.secure = &tls.Config{
		ServerName:         name,
		NextProtos:         []string{"http/1.1"},
		MinVersion:         tls.VersionTLS12,
		ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}
	if name := query.Get("server_name"); name != "" {
		if h.secure.ServerName, err = canonicalHost(name); err != nil {
			return nil, fmt.Errorf("server_name: %w", err)
		}
	}
	if path := query.Get("ca_file"); path != "" {
		if h.secure.RootCAs, err = readAuthorities(path); err != nil {
			return nil, fmt.Errorf("reading ca_file: %w", err)
		}
	}
	return h, nil
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
