package endtoend

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sidegate/appliance/lab"
)

// TestEveryResolverIsUs: a question to any resolver, by UDP or TCP, IPv4 or IPv6, even to one that exists and to the
// gateway itself, is answered by the gateway: dig takes the answer, so it came from the address that was asked, and
// nothing of it reached the router. What breaks it is one that passes, or a reply from the gateway's own address.
func TestEveryResolverIsUs(t *testing.T) {
	w := newNamesWorld(t)
	w.serveNames(t, false, "www.test. 300 A 203.0.113.10", "www.test. 300 AAAA 2001:db8:113::10")
	other, err := w.server().StartNameserver(t.Context(), 53, func(*dns.Msg, lab.Question) *dns.Msg { return nil })
	need(t, err)
	w.startWith(t, "default: direct")
	atRouter := captureOn(t, w.router(), "lan")
	for _, resolver := range []netip.Addr{
		somewhere, netip.MustParseAddr("2001:4860:4860::8888"), other.Addr4.Addr(), other.Addr6.Addr(),
		w.sidegate().Addr4(), w.sidegate().Addr6(),
	} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			for kind, want := range map[string]string{"A": "203.0.113.10", "AAAA": "2001:db8:113::10"} {
				r, err := w.laptop().Dig(within(t, 10*time.Second), resolver, "www.test", kind, transport)
				needInstalled(t, err)
				if err != nil || r.Status != "NOERROR" || !slices.Equal(r.Data(kind), []string{want}) {
					t.Errorf("%s %s %s: %+v, %v, want %s", resolver, transport, kind, r, err, want)
				}
			}
		}
	}
	if n := len(other.Questions()); n != 0 {
		t.Errorf("a resolver behind the router was asked %d times", n)
	}
	never(t, atRouter, "a client's question left the gateway", func(p lab.Packet) bool {
		return p.Dst.Port() == 53 && (p.Src.Addr() == w.laptop().Addr4() || p.Src.Addr() == w.laptop().Addr6())
	})
	if packets(t, atRouter, func(p lab.Packet) bool { return p.Dst.Port() == 53 && p.Src.Addr() == w.sidegate().Addr4() }) == 0 {
		t.Error("the capture saw nothing of the gateway's own questions: it proves nothing")
	}
}

// TestUpstreams: the gateway asks unbound by UDP, TCP, TLS and HTTPS, and dnsmasq, directly and through a SOCKS5 server,
// as rules on the question say. What breaks it is an upstream that is not asked, or not that way.
func TestUpstreams(t *testing.T) {
	w := newNamesWorld(t)
	masq, err := w.AddServer(t.Context(), "masq")
	need(t, err)
	var records []string
	ways := map[string]string{
		"udp": "udp://" + w.resolver.Addr4().String(), "tcp": "tcp://" + w.resolver.Addr4().String(),
		"tls": "tls://dns.test", "https": "https://dns.test/dns-query", "masq": "udp://" + masq.Addr4().String(),
	}
	for way := range ways {
		if way != "masq" {
			records = append(records, "www."+way+".test. 300 A 203.0.113.10", "www."+way+"-detour.test. 300 A 203.0.113.10")
		}
	}
	w.serveNames(t, true, records...)
	_, err = masq.StartDnsmasq(t.Context(), lab.DnsmasqOptions{Hosts: map[string][]netip.Addr{
		"www.masq.test": {w.server().Addr4()}, "www.masq-detour.test": {w.server().Addr4()},
	}})
	need(t, err)
	dante, err := w.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	authority, err := w.Authority()
	need(t, err)

	var config strings.Builder
	fmt.Fprintf(&config, "interfaces: { lan: auto }\noutbounds: { hk: { url: %q } }\ndns:\n  upstreams:\n", dante.URL("socks5", lab.Credentials{}))
	for way, url := range ways {
		more := ""
		if strings.Contains(url, "dns.test") {
			more = fmt.Sprintf(", addresses: [%s], ca_file: %s", w.resolver.Addr4(), authority.File)
		}
		fmt.Fprintf(&config, "    %s: { url: %q%s }\n    %s-detour: { url: %q, detour: hk%s }\n", way, url, more, way, url, more)
	}
	config.WriteString("  default: udp\n  rules:\n")
	for way := range ways {
		fmt.Fprintf(&config, "    - { domain_suffix: %[1]s.test, upstream: %[1]s }\n    - { domain_suffix: %[1]s-detour.test, upstream: %[1]s-detour }\n", way)
	}
	config.WriteString("default: direct\n")
	w.start(t, config.String())

	ports := map[string]uint16{"udp": 53, "tcp": 53, "tls": 853, "https": 443, "masq": 53}
	for way := range ways {
		for _, detour := range []bool{false, true} {
			name, asker := "www."+way+".test", w.sidegate()
			if detour {
				name, asker = "www."+way+"-detour.test", w.upstream()
			}
			server := w.resolver
			if way == "masq" {
				server = masq
			}
			atServer := captureOn(t, server, server.Interface().Name)
			r, err := w.laptop().Dig(within(t, 10*time.Second), somewhere, name)
			needInstalled(t, err)
			if err != nil || !slices.Equal(r.Data("A"), []string{"203.0.113.10"}) {
				t.Errorf("%s: %+v, %v", name, r, err)
			}
			protocol := uint8(lab.TCP)
			if way == "udp" || way == "masq" {
				protocol = lab.UDP
			}
			if packets(t, atServer, func(p lab.Packet) bool {
				return p.Src.Addr() == asker.Addr4() && p.Dst.Port() == ports[way] && p.Protocol == protocol
			}) == 0 {
				t.Errorf("%s: %s did not ask at port %d", name, asker.Name(), ports[way])
			}
			if _, err := atServer.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
