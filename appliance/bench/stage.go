package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// stage is the network in which everything is measured. Beside the side router stands a second box of the same make,
// "plain", which only forwards: the laptop's default route chooses between them.
type stage struct {
	*lab.Lab
	binary                           string
	laptop, sidegate, plain          *lab.Host
	router, server, abroad, upstream *lab.Host

	gateway *lab.Gateway // running, or nil
}

func newStage(ctx context.Context, binary string) (_ *stage, err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	s := &stage{
		Lab: l, binary: binary,
		laptop: l.Host(lab.Laptop), sidegate: l.Host(lab.Sidegate),
		router: l.Host(lab.Router), server: l.Host(lab.Server), upstream: l.Host(lab.Upstream),
	}
	if s.plain, err = l.AddClient(ctx, "plain"); err != nil {
		return nil, err
	}
	if s.abroad, err = l.AddServer(ctx, "abroad"); err != nil {
		return nil, err
	}
	if err := s.forwardPlainly(); err != nil {
		return nil, err
	}
	// What is sent to nowhere ends here, without ICMP errors that would be measured too.
	if err := s.router.Do(func() error { return netlink.RouteReplace(route(nil, unix.RTN_BLACKHOLE)) }); err != nil {
		return nil, fmt.Errorf("making the router swallow what has no destination: %w", err)
	}
	for _, h := range []*lab.Host{s.laptop, s.sidegate, s.plain, s.upstream} {
		if err := manyPorts(h); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// manyPorts: thousands of connections a second leave as many ports waiting.
func manyPorts(h *lab.Host) error {
	return errors.Join(
		h.SetSysctl("net.ipv4.ip_local_port_range", "1024 65535"),
		h.SetSysctl("net.ipv4.tcp_tw_reuse", "1"),
	)
}

// forwardPlainly makes plain what the side router is without sidegate.
func (s *stage) forwardPlainly() error {
	for _, setting := range []string{"conf.all.send_redirects", "conf.default.send_redirects", "conf.eth0.send_redirects"} {
		if err := s.plain.SetSysctl("net.ipv4."+setting, "0"); err != nil {
			return err
		}
	}
	if err := s.plain.SetSysctl("net.ipv4.ip_forward", "1"); err != nil {
		return err
	}
	return via(s.plain, s.router)
}

// via sets the default gateway of a host.
func via(h, gateway *lab.Host) error {
	err := h.Do(func() error { return netlink.RouteReplace(route(gateway.Addr4().AsSlice(), unix.RTN_UNICAST)) })
	if err != nil {
		return fmt.Errorf("setting the default gateway of %s to %s: %w", h.Name(), gateway.Name(), err)
	}
	return nil
}

func route(gateway net.IP, kind int) *netlink.Route {
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	return &netlink.Route{Dst: everything, Gw: gateway, Type: kind}
}

// through is a measurement with the laptop's traffic going through one of the two boxes.
func (s *stage) through(box *lab.Host, m measurement) measurement {
	return func(ctx context.Context) (float64, error) {
		if err := via(s.laptop, box); err != nil {
			return 0, err
		}
		if _, err := s.laptop.Ping(ctx, s.server.Addr4()); err != nil { // the path is warm
			return 0, err
		}
		return m(ctx)
	}
}

// start runs the gateway with a configuration, in place of the one that runs.
func (s *stage) start(ctx context.Context, config string) error {
	if err := s.stop(); err != nil {
		return err
	}
	g, err := s.sidegate.StartGateway(ctx, lab.GatewayOptions{Binary: s.binary, Config: config})
	if err != nil {
		return err
	}
	s.gateway = g
	return nil
}

func (s *stage) stop() error {
	if s.gateway == nil {
		return nil
	}
	g := s.gateway
	s.gateway = nil
	if err := g.Stop(); err != nil {
		return err
	}
	return g.Wait() // that it ended well, too
}

// proxied is a configuration in which abroad is reached through a SOCKS5 server and all else directly. The shares are
// those of a client that is many.
func (s *stage) proxied(socks5 string) string {
	return fmt.Sprintf(`interfaces: { lan: eth0 }
per_client: { flows: 100000, connections: 100000, udp_sessions: 4096, udp_flows: 4096 }
outbounds: { upstream: { url: %q } }
rules: [ { name: abroad, ip_cidr: %s, outbound: upstream } ]
default: direct
`, socks5, s.abroad.Addr4())
}
