package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"

	"sidegate/appliance/policy"
)

// flowKeys is how people write a flow: in the tests of a config, and to `sidegate explain`.
var flowKeys = map[string]func(f *policy.Flow, value string) error{
	"source_ip": func(f *policy.Flow, value string) error {
		return setAddress(&f.Source, value)
	},
	"ip": func(f *policy.Flow, value string) error {
		return setAddress(&f.Destination, value)
	},
	"source_port": func(f *policy.Flow, value string) error {
		return setPort(&f.Source, value)
	},
	"port": func(f *policy.Flow, value string) error {
		return setPort(&f.Destination, value)
	},
	"network": func(f *policy.Flow, value string) error {
		networks := map[string]policy.Network{"tcp": policy.TCP, "udp": policy.UDP, "other": 0}
		network, ok := networks[value]
		if !ok {
			return fmt.Errorf("unknown network %s (have: tcp, udp, other)", quote(value))
		}
		f.Network = network
		return nil
	},
	"source_mac": func(f *policy.Flow, value string) error {
		mac, err := net.ParseMAC(value)
		if err != nil || len(mac) != len(f.SourceMAC) {
			return fmt.Errorf("%s is not a MAC address; write it like 02:00:00:00:00:10", quote(value))
		}
		f.SourceMAC = policy.MAC(mac)
		return nil
	},
	"dscp": func(f *policy.Flow, value string) error {
		point, err := strconv.ParseUint(value, 10, 6)
		if err != nil {
			return fmt.Errorf("%s is not a number from 0 to 63", quote(value))
		}
		f.DSCP = uint8(point)
		return nil
	},
	"domain": func(f *policy.Flow, value string) error {
		f.Names = append(f.Names, value)
		return nil
	},
	"interface": func(f *policy.Flow, value string) error {
		f.Interface = value
		return nil
	},
	"process": func(f *policy.Flow, value string) error {
		f.Process.Name = value
		sentByTheBox(f)
		return nil
	},
	"process_path": func(f *policy.Flow, value string) error {
		if !path.IsAbs(value) {
			return fmt.Errorf("%s is not an absolute path; write one like /usr/bin/curl", quote(value))
		}
		f.Process.Path = value
		if f.Process.Name == "" { // as it is of the real process
			f.Process.Name = path.Base(value)
		}
		sentByTheBox(f)
		return nil
	},
	"unit": func(f *policy.Flow, value string) error {
		f.Process.Unit = value
		sentByTheBox(f)
		return nil
	},
}

// sentByTheBox gives a flow that has a process the interface of such flows, unless another one is given.
func sentByTheBox(f *policy.Flow) {
	if f.Interface == "" {
		f.Interface = "lo"
	}
}

// SetFlow sets one fact of a flow, as `sidegate explain` and the tests of a config write it:
// source_ip, source_port, source_mac, ip, port, network (tcp, udp or other), domain (again for
// another name), dscp, interface, process, process_path (with which process is known, too), unit. What is not set is
// unknown.
func SetFlow(f *policy.Flow, key, value string) error {
	set, ok := flowKeys[key]
	if !ok {
		return fmt.Errorf("unknown key %s%s", quote(key), didYouMean(key, slices.Collect(maps.Keys(flowKeys))))
	}
	if value == "" {
		return fmt.Errorf("%s has no value; write one or leave it out", key)
	}
	if err := set(f, value); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func setAddress(to *netip.AddrPort, value string) error {
	address, err := netip.ParseAddr(value)
	if err != nil {
		return fmt.Errorf("%s is not an address; write one like 192.0.2.1 or 2001:db8::1", quote(value))
	}
	*to = netip.AddrPortFrom(address.Unmap(), to.Port())
	return nil
}

func setPort(to *netip.AddrPort, value string) error {
	port, err := strconv.ParseUint(value, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("%s is not a port from 1 to 65535", quote(value))
	}
	*to = netip.AddrPortFrom(to.Addr(), uint16(port))
	return nil
}

// Test is a flow of which the configuration says where the policy sends it.
type Test struct {
	Flow     policy.Flow
	Expect   string // an outbound, direct or block
	Rule     string // the name of the rule that decides; empty: any
	Position Position
}

// Check runs the tests of the configuration against its policy. The error holds one *Error for each
// test that fails.
func (c *Config) Check() error {
	r := report{file: c.File}
	for i, t := range c.Tests {
		decided := c.Policy.Match(t.Flow)
		by, at := c.Policy.RuleLabel(decided.Rule), numbered("test", i)
		switch {
		case decided.Outbound != t.Expect:
			r.errorf(t.Position.Line, "%s: expected %s, but %s says %s", at, t.Expect, by, decided.Outbound)
		case t.Rule != "" && (decided.Rule < 0 || c.Policy.Rules[decided.Rule].Name != t.Rule):
			r.errorf(t.Position.Line, "%s: it is %s as expected, but by %s, not by rule %q", at, t.Expect, by, t.Rule)
		}
	}
	return r.err()
}

// expectation is a Test on the way.
type expectation struct {
	Test
	expect, rule reference
}

func (d *decoder) expectation(at string, n *yaml.Node) expectation {
	e := expectation{Test: Test{Position: Position{d.file, n.Line}}}
	entries := d.entries(at, n)
	d.require(at, n, entries, decode(d, at, entries, expectationKeys, nil, &e), "expect")
	if ported := e.Flow.Source.Port() != 0 || e.Flow.Destination.Port() != 0; ported && e.Flow.Network == 0 {
		d.errorf(n.Line, "%s: network is missing: a port is one of network: tcp or network: udp", at)
	}
	return e
}

var expectationKeys = func() keys[expectation] {
	table := keys[expectation]{
		"expect": func(d *decoder, at string, n *yaml.Node, e *expectation) {
			e.expect = d.reference(at, n)
			e.Expect = e.expect.name
		},
		"rule": func(d *decoder, at string, n *yaml.Node, e *expectation) {
			e.rule = d.reference(at, n)
			e.Rule = e.rule.name
		},
	}
	for key, set := range flowKeys {
		table[key] = func(d *decoder, at string, n *yaml.Node, e *expectation) {
			values, lines := d.texts(at, n)
			if key != "domain" && len(values) > 1 { // of one flow, only names can be several
				d.errorf(n.Line, "%s: a flow has one; write a test for each", at)
				return
			}
			for i, value := range values {
				if err := set(&e.Flow, value); err != nil {
					d.errorf(lines[i], "%s: %w", at, err)
				}
			}
		}
	}
	return table
}()

// linkTests resolves what the tests refer to.
func (d *decoder) linkTests(c *draft) {
	var names []string
	for _, r := range c.rules {
		if r.Name != "" {
			names = append(names, r.Name)
		}
	}
	for i, t := range c.tests {
		at := numbered("test", i)
		d.known(at, t.expect, c)
		if t.Rule != "" && !slices.Contains(names, t.Rule) {
			d.errorf(t.rule.line, "%s: unknown rule %s%s", at, quote(t.Rule), didYouMean(t.Rule, names))
		}
		c.Tests = append(c.Tests, t.Test)
	}
}
