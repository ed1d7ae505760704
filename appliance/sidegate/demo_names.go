package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
	"sidegate/appliance/policy"
)

// Names that the CDN serves at its one address.
const (
	films   = "www.films.example"   // reached through the upstream proxy
	tracker = "www.tracker.example" // blocked
	other   = "www.other.example"   // which no rule has
	edge    = "edge.cdn.example"    // what the CDN calls the address: the first two are its aliases
)

// resolver is whom the laptop asks: a public DNS server, to which nothing leads in this network.
var resolver = netip.MustParseAddr("9.9.9.9")

const dnsPort = 53

// hosted is what the DNS server of the internet knows.
func hosted(at *lab.Host) lab.DnsmasqOptions {
	return lab.DnsmasqOptions{
		Hosts:   map[string][]netip.Addr{edge: {at.Addr4(), at.Addr6()}},
		Aliases: map[string]string{films: edge, tracker: edge},
	}
}

// ask makes the laptop look a name up. The flow is its question.
func ask(name string) action {
	return func(ctx context.Context, s *stage, _ string, _ netip.Addr) (flow, error) {
		f, _ := lookUp(ctx, s, name)
		return f, nil
	}
}

// downloadFrom makes the laptop look a name up, and fetch a file from the address that it is told.
func downloadFrom(name string) action {
	return func(ctx context.Context, s *stage, _ string, _ netip.Addr) (flow, error) {
		f, found := lookUp(ctx, s, name)
		if f.err != nil {
			return f, nil
		}
		return fetch(ctx, s, cdn, netip.AddrPortFrom(found, filePort), name)
	}
}

func lookUp(ctx context.Context, s *stage, name string) (f flow, found netip.Addr) {
	f = flow{protocol: lab.UDP, server: netip.AddrPortFrom(resolver, dnsPort), asked: 1}
	// Connected, so that the laptop's kernel takes an answer from nobody else.
	c, err := s.laptop.Dial(ctx, "udp", f.server.String())
	if err != nil {
		f.err = err
		return f, found
	}
	defer c.Close()
	f.client = c.LocalAddr().(*net.UDPAddr).AddrPort()
	start := time.Now()
	addresses, err := resolve(c, name)
	f.took, f.err, f.got = time.Since(start), err, int64(len(addresses))
	if len(addresses) > 0 {
		found = addresses[0]
	}
	f.whole = f.got == 1 && found == s.Host(cdn).Addr4()
	return f, found
}

// resolve asks for the IPv4 addresses of a name, once (RFC 1035).
func resolve(c net.Conn, name string) (addresses []netip.Addr, err error) {
	absolute, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, err
	}
	question := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: absolute, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := question.Pack()
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	b = make([]byte, 512)
	n, err := c.Read(b)
	if err != nil {
		return nil, err
	}
	var answer dnsmessage.Message
	if err := answer.Unpack(b[:n]); err != nil {
		return nil, err
	}
	for _, r := range answer.Answers {
		if a, ok := r.Body.(*dnsmessage.AResource); ok {
			addresses = append(addresses, netip.AddrFrom4(a.A))
		}
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("no address of %s: %s", name, strings.TrimPrefix(answer.RCode.String(), "RCode"))
	}
	return addresses, nil
}

// What is claimed of questions.
var (
	answered = claim{"the answer comes from there, and is right", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		if f.err != nil {
			return "", false, f.err
		}
		back, err := s.atSidegate.Count(func(p lab.Packet) bool { return f.back(p) && p.Out })
		return fmt.Sprintf("%s from %s, after %s", counted(back), f.server, brief(f.took)), f.whole && back.Packets == 1, err
	}}

	ispIsAsked = asksISP("the side router asks dnsmasq, at the isp", lab.Sidegate)

	upstreamAsks = asksISP("the upstream proxy is told the name, and looks it up", lab.Upstream)
)

// asksISP claims that a host has sent questions to the DNS server.
func asksISP(text, host string) claim {
	return claim{text, func(_ context.Context, s *stage, _ flow) (string, bool, error) {
		from, to := s.Host(host).Addr4(), netip.AddrPortFrom(s.Host(isp).Addr4(), dnsPort)
		asked, err := s.atISP.Count(func(p lab.Packet) bool { return p.Src.Addr() == from && p.Dst == to })
		return fmt.Sprintf("%s from %s to %s", counted(asked), from, to), asked.Packets > 0, err
	}}
}

// learned claims that the gateway knows what the laptop calls the CDN's address.
func learned(name string) claim {
	return claim{"the kernel knows what the laptop calls the address", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		names, err := s.admin.Names(ctx)
		if err != nil {
			return "", false, err
		}
		for _, n := range names {
			if n.Client == s.laptop.MAC().String() && n.Address == s.Host(cdn).Addr4() && n.Source == "dns" {
				return n.Names[0], n.Names[0] == name, nil
			}
		}
		return "nothing", false, nil
	}}
}

// What is claimed of an address that several names share.
var (
	otherwiseDirect = claim{"by another name, its address would be direct", func(ctx context.Context, s *stage, f flow) (string, bool, error) {
		a, err := s.explain(ctx, append(s.atShared(), "domain="+other))
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%s: %s", f.server.Addr(), sentence(*a.Kernel)), a.Kernel.Verdict == policy.Direct && a.Kernel.Same(a.Policy.Answer), nil
	}}

	sameAddress = claim{"the laptop is told the same address", func(_ context.Context, s *stage, f flow) (string, bool, error) {
		return f.server.Addr().String(), f.server.Addr() == s.Host(cdn).Addr4(), nil
	}}

	cutOff = claim{"the connection ends when it has said its name", func(_ context.Context, _ *stage, f flow) (string, bool, error) {
		return fmt.Sprintf("%s after %s", outcome(f.err), brief(f.took)), errors.Is(f.err, syscall.ECONNRESET), nil
	}}

	nobodyIsCalled = claim{"the side router opens no connection for it", func(_ context.Context, s *stage, _ flow) (string, bool, error) {
		const syn = 2
		opened, err := s.atRouter.Count(func(p lab.Packet) bool { return p.Protocol == lab.TCP && p.TCPFlags&syn != 0 })
		return fmt.Sprintf("%s with SYN at the router", counted(opened)), opened.Packets == 0, err
	}}

	namesAreTold = claim{"from DNS, and from first bytes", func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		a, err := s.explain(ctx, s.atShared())
		if err != nil {
			return "", false, err
		}
		from := map[string]int{}
		for _, n := range a.Policy.Sources.Names {
			from[n.Source]++
		}
		ok := from["dns"] == 2 && from["sniffed"] > 0 && a.Policy.Ambiguous && a.Kernel.Same(a.Policy.Answer)
		return fmt.Sprintf("%d and %d", from["dns"], from["sniffed"]), ok, nil
	}}
)

// sniffed claims how many connections' first bytes were looked at so far.
func sniffed(n uint64) claim {
	text := "the name is read from its first bytes"
	if n == 0 {
		text = "DNS has told it: no first bytes are read"
	}
	return claim{text, func(ctx context.Context, s *stage, _ flow) (string, bool, error) {
		status, err := s.admin.Status(ctx)
		if err != nil {
			return "", false, err
		}
		c := status.Sniff
		all := c.TLS + c.HTTP + c.QUIC + c.Nothing + c.Timeout
		return fmt.Sprintf("%d read so far, %d with HTTP's Host", all, c.HTTP), c.HTTP == n && all == n, nil
	}}
}

// atShared are the facts of a flow from the laptop to the address that has several names.
func (s *stage) atShared() []string {
	return []string{
		"source_ip=" + s.laptop.Addr4().String(),
		"ip=" + s.Host(cdn).Addr4().String(),
		"port=80",
		"network=tcp",
	}
}

// explain asks the gateway to decide a flow.
func (s *stage) explain(ctx context.Context, facts []string) (admin.LiveExplanation, error) {
	question, err := parseFacts(facts)
	if err != nil {
		return admin.LiveExplanation{}, err
	}
	return s.admin.Explain(ctx, question)
}
