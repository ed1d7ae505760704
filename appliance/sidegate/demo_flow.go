package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"sidegate/appliance/lab"
)

// flow is what a step sent, and what came of it.
type flow struct {
	protocol       uint8 // lab.TCP or lab.UDP
	client, server netip.AddrPort
	asked, got     int64          // bytes of a file, datagrams, or addresses of a name
	whole          bool           // what came is what was asked for
	seenFrom       netip.AddrPort // who the client was for the server; invalid if the server saw nobody
	took           time.Duration
	err            error // why there was no connection

	verdict, rule string // what the flow table should say; the step knows
}

func (f flow) String() string {
	return fmt.Sprintf("%s %s → %s", map[uint8]string{lab.TCP: "tcp", lab.UDP: "udp"}[f.protocol], f.client, f.server)
}

// forth matches the client's packets of the flow as the client sent them, back the server's as the client gets them.
func (f flow) forth(p lab.Packet) bool {
	return p.Protocol == f.protocol && p.Src == f.client && p.Dst == f.server
}

func (f flow) back(p lab.Packet) bool {
	return p.Protocol == f.protocol && p.Src == f.server && p.Dst == f.client
}

// both matches either direction.
func (f flow) both(p lab.Packet) bool { return f.forth(p) || f.back(p) }

// An action makes the traffic of a step, from the laptop to an address of the host. What fails on the way is found by
// the step's claims; the error is for what the demonstration itself could not do.
type action func(ctx context.Context, s *stage, host string, to netip.Addr) (flow, error)

const fileSize = 32 << 20

// download fetches a file over HTTP, from an address.
func download(ctx context.Context, s *stage, host string, to netip.Addr) (flow, error) {
	server := netip.AddrPortFrom(to, filePort)
	return fetch(ctx, s, host, server, server.String())
}

// fetch downloads from a server of the host, which the client calls by name.
func fetch(ctx context.Context, s *stage, host string, server netip.AddrPort, name string) (flow, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	f := flow{protocol: lab.TCP, server: server, asked: fileSize}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			c, err := s.laptop.Dial(ctx, network, server.String())
			if err == nil {
				f.client = c.LocalAddr().(*net.TCPAddr).AddrPort()
			}
			return c, err
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/bytes/%d", name, fileSize), nil)
	if err != nil {
		return f, err
	}
	before := len(s.files[host].Requests())
	start := time.Now()
	response, err := client.Do(request)
	if err != nil {
		f.took, f.err = time.Since(start), err
		return f, nil
	}
	defer response.Body.Close()
	hash := sha256.New()
	f.got, f.err = io.Copy(hash, response.Body)
	f.took = time.Since(start)
	f.whole = hex.EncodeToString(hash.Sum(nil)) == lab.Digest(fileSize)
	// The server notes a request when it is done with it, which may be after the client is.
	noted, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	f.err = errors.Join(f.err, lab.Wait(noted, "the server to note the request", func() error {
		requests := s.files[host].Requests()
		if len(requests) <= before {
			return fmt.Errorf("%d requests", len(requests))
		}
		f.seenFrom = requests[before].From
		return nil
	}))
	return f, nil
}

const datagrams, datagramSize = 100, 512

// converse sends datagrams to an echo server, each when the one before it is back.
func converse(ctx context.Context, s *stage, host string, to netip.Addr) (flow, error) {
	f := flow{protocol: lab.UDP, server: netip.AddrPortFrom(to, echoPort), asked: datagrams}
	from := s.laptop.Addr4()
	if to.Is6() {
		from = s.laptop.Addr6()
	}
	// Unconnected: a connected socket would hide answers from a wrong address.
	c, err := s.laptop.ListenUDP(ctx, "udp", netip.AddrPortFrom(from, 0).String())
	if err != nil {
		return f, err
	}
	defer c.Close()
	f.client = c.LocalAddr().(*net.UDPAddr).AddrPort()
	start := time.Now()
	f.got, f.err = exchange(c, f.server)
	f.took = time.Since(start)
	f.whole = f.got == f.asked
	if senders := s.echoes[host].Senders(); len(senders) > 0 {
		f.seenFrom = senders[len(senders)-1]
	}
	return f, nil
}

func exchange(c *net.UDPConn, with netip.AddrPort) (answered int64, err error) {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, err
	}
	message, answer := make([]byte, datagramSize), make([]byte, 2*datagramSize)
	for i := range datagrams {
		message[0] = byte(i)
		if _, err := c.WriteToUDPAddrPort(message, with); err != nil {
			return answered, err
		}
		n, from, err := c.ReadFromUDPAddrPort(answer)
		if err != nil {
			return answered, err
		}
		if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); from != with {
			return answered, fmt.Errorf("%s answered in place of %s", from, with)
		}
		if n != datagramSize || answer[0] != byte(i) {
			return answered, errors.New("an answer is not what was sent")
		}
		answered++
	}
	return answered, nil
}

// patience is how long a client waits for a server that is silent: less than until it would send a second SYN.
const patience = 500 * time.Millisecond

// knock opens a connection and closes it. It chooses the client's port, outside the ephemeral range, because Go does not
// tell that of a connection that fails.
func knock(ctx context.Context, s *stage, _ string, to netip.Addr) (flow, error) {
	from := s.laptop.Addr4()
	if to.Is6() {
		from = s.laptop.Addr6()
	}
	s.knocks++
	f := flow{
		protocol: lab.TCP,
		client:   netip.AddrPortFrom(from, 20000+s.knocks),
		server:   netip.AddrPortFrom(to, filePort),
	}
	dialer := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(f.client)}
	start := time.Now()
	c, err := s.laptop.DialWith(ctx, dialer, "tcp", f.server.String())
	f.took = time.Since(start)
	if err != nil {
		f.err = err
		return f, nil
	}
	return f, c.Close()
}
