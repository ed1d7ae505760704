package endtoend

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/lab"
)

// lookUp asks a resolver that does not exist for a name's address, as a client does before it connects, and wants this
// one.
func lookUp(ctx context.Context, from *lab.Host, name string, want netip.Addr) error {
	kind := dns.TypeA
	if want.Is6() {
		kind = dns.TypeAAAA
	}
	c, err := from.Dial(ctx, "udp", netip.AddrPortFrom(somewhere, 53).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	conn := &dns.Conn{Conn: c}
	if err := conn.WriteMsg(new(dns.Msg).SetQuestion(name+".", kind)); err != nil {
		return err
	}
	m, err := conn.ReadMsg()
	if err != nil {
		return fmt.Errorf("asking for %s: %w", name, err)
	}
	for _, r := range m.Answer {
		switch r := r.(type) {
		case *dns.A:
			if got, _ := netip.AddrFromSlice(r.A.To4()); got == want {
				return nil
			}
		case *dns.AAAA:
			if got, _ := netip.AddrFromSlice(r.AAAA); got == want {
				return nil
			}
		}
	}
	return fmt.Errorf("asking for %s: %s, want %s", name, m, want)
}

// visitAt opens https://name/whoami, or the same by http, h2c (HTTP/2 without TLS) or h3, at an address, without asking
// for the name, on a new connection. It says how long it was from the first packet to the first byte of the answer.
func (w *namesWorld) visitAt(ctx context.Context, from *lab.Host, protocol, name string, at netip.Addr) (v lab.Visit, took time.Duration, err error) {
	return w.visitFrom(ctx, 0, from, protocol, name, at)
}

// visitFrom is visitAt by h3 from a port; 0 is any free one.
func (w *namesWorld) visitFrom(ctx context.Context, port uint16, from *lab.Host, protocol, name string, at netip.Addr) (v lab.Visit, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if protocol == "h3" {
		return from.VisitHTTP3(ctx, port, name, netip.AddrPortFrom(at, 443))
	}
	authority, err := w.Authority()
	if err != nil {
		return v, 0, err
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return from.Dial(ctx, network, net.JoinHostPort(at.String(), port))
		},
		TLSClientConfig:   &tls.Config{RootCAs: authority.Pool},
		DisableKeepAlives: true,
		ForceAttemptHTTP2: true,
		Protocols:         new(http.Protocols),
	}
	defer transport.CloseIdleConnections()
	url := protocol + "://" + name + "/whoami"
	switch protocol {
	case "https":
		transport.Protocols.SetHTTP1(true)
		transport.Protocols.SetHTTP2(true)
	case "http":
		transport.Protocols.SetHTTP1(true)
	case "h2c":
		transport.Protocols.SetUnencryptedHTTP2(true)
		url = "http://" + name + ":8080/whoami"
	}
	var begun, first time.Time
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn:              func(string) { begun = time.Now() },
		GotFirstResponseByte: func() { first = time.Now() },
	})
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return v, 0, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return v, 0, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return v, 0, err
	}
	v, err = lab.ParseVisit(string(text))
	return v, first.Sub(begun), err
}
