// Package exchange asks one question of one DNS upstream, over any of the transports that upstreams
// speak: UDP and TCP (RFC 1035, RFC 7766), TLS (RFC 7858), HTTPS (RFC 8484, over HTTP/2), HTTP/3, and
// QUIC (RFC 9250).
//
// What comes back answers the question that was asked, or it does not come back. Everything ends in
// bounded time; an upstream has a bounded number of sockets and questions; nothing outlives Close.
//
// It reads as: an Upstream has a transport. The transport of udp is itself (udp.go); the others are a
// pool of links (pool.go), each a session (stream.go, https.go, h3.go, doq.go) with one of the
// addresses (reach.go) that the host has (locate.go). question.go says what is sent, and what counts
// as an answer to it; folding.go, what becomes of answers that do not repeat the question's spelling.
package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Options say how an upstream is reached. The zero value is usable for a host that is an address.
type Options struct {
	// Dialer opens the sockets of questions; nil is Direct(nil). A detour gives its own.
	Dialer Dialer
	// Addresses are the host's own, where it is a name that must not be looked up.
	Addresses []netip.Addr
	// Bootstrap are plain DNS servers, asked by UDP for the host's addresses. Without them and without
	// Addresses, a host that is a name is looked up as /etc/resolv.conf and /etc/hosts say.
	Bootstrap []netip.AddrPort
	// BootstrapDialer opens the sockets of both kinds of look-up; nil is Direct(nil).
	BootstrapDialer Dialer
	// CAFile has the PEM certificates of the authorities to trust, instead of the system's.
	CAFile string
	// ServerName is what the certificate must be for, instead of the URL's host.
	ServerName string
	// Timeout is the time for looking up, connecting, asking and asking again. 0 is 2 s.
	Timeout time.Duration
	// Overtime is for how long beyond Timeout the answer to what was asked is waited for still. 0: not at all.
	Overtime time.Duration
	// Log is told what an owner may want to know of an upstream's habits, once. May be nil.
	Log *slog.Logger
}

const (
	defaultTimeout = 2 * time.Second
	// maxQuestions are in flight at one upstream; further ones wait. Each may be a socket.
	maxQuestions = 1024
)

// Upstream is one DNS server to ask. Its methods may be called concurrently.
type Upstream struct {
	name      string
	scheme    string
	endpoint  *endpoint
	located   *locator
	transport transport
	bound     time.Duration // of an Exchange
	life      *life
	slots     chan struct{}
}

// transport carries questions in one protocol. What it starts lives in the upstream's life.
type transport interface {
	exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error)
}

// Exchange asks and returns the answer: to exactly that question, under q's id, with names in q's
// spelling. q must have one question; it is not changed. Its EDNS options that are meant for one hop
// (cookie, keep-alive, padding) are not passed on. The answer has an OPT record only if q has one.
//
// A response code such as SERVFAIL is an answer. Errors are one line, name the upstream, and match
// context.DeadlineExceeded, context.Canceled, net.ErrClosed (after Close) or the cause in the network.
func (u *Upstream) Exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	if len(q.Question) != 1 || q.Opcode != dns.OpcodeQuery || q.Response {
		return nil, fmt.Errorf("asking upstream %q: the message is not a query with one question", u.name)
	}
	begun := time.Now()
	m, err := u.exchange(ctx, q)
	switch {
	case err == nil:
		return m, nil
	case u.life.ctx.Err() != nil:
		err = net.ErrClosed
	case errors.Is(err, context.DeadlineExceeded):
		err = &lateError{time.Since(begun).Round(10 * time.Millisecond), err}
	}
	return nil, fmt.Errorf("asking upstream %q for %s %s: %w", u.name, q.Question[0].Name, dns.Type(q.Question[0].Qtype), err)
}

func (u *Upstream) exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	if !u.life.begin() {
		return nil, net.ErrClosed
	}
	defer u.life.end()
	ctx, cancel := context.WithTimeout(ctx, u.bound)
	defer cancel()
	defer context.AfterFunc(u.life.ctx, cancel)()
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting behind %d other questions: %w", maxQuestions, ctx.Err())
	}
	return u.transport.exchange(ctx, q)
}

// lateError is a time-out in words.
type lateError struct {
	after time.Duration
	cause error
}

func (e *lateError) Error() string {
	where := e.cause.Error()
	for _, said := range []error{context.DeadlineExceeded, os.ErrDeadlineExceeded} {
		where = strings.TrimSuffix(where, said.Error())
	}
	return strings.TrimSuffix(fmt.Sprintf("no answer within %v: %s", e.after, where), ": ")
}

func (e *lateError) Unwrap() error { return e.cause }
func (e *lateError) Timeout() bool { return true }

// Name is what the configuration calls it.
func (u *Upstream) Name() string { return u.name }

// Host is what the URL names, and whether that is a name that must be looked up.
func (u *Upstream) Host() (host string, lookedUp bool) {
	return u.endpoint.host, u.located != nil
}

// Addresses are the upstream's own, as far as they are known now: a name that has not been looked up
// yet has none. Policy leaves them direct.
func (u *Upstream) Addresses() []netip.Addr {
	if u.located != nil {
		return u.located.known()
	}
	var list []netip.Addr
	for _, a := range u.endpoint.fixed {
		list = append(list, a.Addr())
	}
	return list
}

// String is the URL without the path, which may be a secret.
func (u *Upstream) String() string {
	return u.scheme + "://" + hostPort(u.endpoint.host, u.endpoint.port)
}

// Close ends all exchanges and connections, and waits until nothing of them is left.
func (u *Upstream) Close() error {
	u.life.close()
	return nil
}
