package exchange

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// resend are the parts of the timeout after which a question is sent again: loss is the rule on Wi-Fi,
// and the server's own time-outs are longer. The last ones are for overtime: a server that was away is back.
var resend = []float64{0.2, 0.5, 1, 2}

const (
	// maxRefused sendings may meet a refusal: anybody who guesses the port can send such an ICMP error, and a
	// server may be restarting.
	maxRefused = 2
	// maxWrong datagrams from the server's address that are no answer are dropped; after that many
	// somebody is guessing, and the question goes by TCP.
	maxWrong = 8
	// receiveSize is more than udpSize, for servers that do not heed it, in bytes.
	receiveSize = 4096
)

// udp asks by datagrams, each question from a new socket with a random port and id. An answer that is
// truncated, or that somebody else may have sent, is asked for again by TCP.
type udp struct {
	endpoint *endpoint
	tcp      *pool
	timeout  time.Duration
	folding
}

// heard is how asking by UDP ended: with an answer, or with a reason to ask by TCP.
type heard struct {
	reply  // of an answer that is whole
	byTCP  bool
	folded bool // the answer had the name in another case: a server's habit, or a forgery
}

func (u *udp) exchange(ctx context.Context, asked *dns.Msg) (*dns.Msg, error) {
	q, err := newQuestion(asked, shape{randomCase: !u.folds()})
	if err != nil {
		return nil, err
	}
	m, err := u.ask(ctx, q)
	if err == nil && m.knowsNoEDNS() {
		if q, err = newQuestion(asked, shape{randomCase: !u.folds(), bare: true}); err == nil {
			m, err = u.ask(ctx, q)
		}
	}
	return m.Msg, err
}

func (u *udp) ask(ctx context.Context, q *question) (reply, error) {
	h, err := u.reach(ctx, q)
	switch {
	case err != nil || !h.byTCP:
		return h.reply, err
	case h.folded && h.Msg != nil:
		return u.confirm(ctx, q, h.reply)
	}
	r, err := u.tcp.ask(ctx, q)
	if err != nil {
		return r, fmt.Errorf("asking again by tcp: %w", err)
	}
	return r, nil
}

func (u *udp) reach(ctx context.Context, q *question) (heard, error) {
	return reach(ctx, u.endpoint, func(ctx context.Context, to netip.AddrPort) (heard, error) {
		return u.send(ctx, to, q)
	}, func(heard) {})
}

// send asks one address until an answer comes or the context ends.
func (u *udp) send(ctx context.Context, to netip.AddrPort, q *question) (heard, error) {
	c, err := u.endpoint.dialer.Packets(ctx, to)
	if err != nil {
		return heard{}, err
	}
	defer c.Close()
	past := time.Unix(1, 0)
	defer context.AfterFunc(ctx, func() { c.SetDeadline(past) })()

	remote := net.UDPAddrFromAddrPort(to)
	id := randomID()
	packet := q.packet(0, id)
	buffer := make([]byte, receiveSize)
	begun := time.Now()
	wrong := 0
	for sent := 0; ; sent++ {
		if _, err := c.WriteTo(packet, remote); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			// A refusal is what the last datagram met.
			return heard{}, ended(ctx, err)
		}
		until := time.Time{}
		if sent < len(resend) {
			until = begun.Add(time.Duration(resend[sent] * float64(u.timeout)))
		}
		c.SetReadDeadline(until)
		for {
			if ctx.Err() != nil { // it may have ended before the deadline was set, and set its own
				return heard{}, ctx.Err()
			}
			n, from, err := c.ReadFrom(buffer)
			switch {
			case err == nil:
				if !sameAddress(from, remote) {
					continue
				}
				h, over := u.judge(q, buffer[:n], id, &wrong)
				if over {
					return h, nil
				}
				continue
			case ctx.Err() != nil:
				return heard{}, ctx.Err()
			case errors.Is(err, syscall.ECONNREFUSED) && sent < maxRefused:
				continue // the next sending may fare better
			case isTimeout(err):
			default:
				return heard{}, err
			}
			break
		}
	}
}

// judge says whether a datagram ends the asking.
func (u *udp) judge(q *question, datagram []byte, id uint16, wrong *int) (h heard, over bool) {
	r, err := q.read(datagram, id)
	switch {
	case err == nil:
		folded := !r.keepsCase && !u.folds()
		return heard{reply: r, byTCP: folded, folded: folded}, true
	case errors.Is(err, errTruncated):
		return heard{byTCP: true}, true
	}
	*wrong++
	return heard{byTCP: true}, *wrong > maxWrong
}

// ended prefers the context's end over what it did to a socket.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}
