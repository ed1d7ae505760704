package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// secretary is a SOCKS5 server that writes down where it was told to connect to, and refuses.
type secretary struct {
	outbound string // the configuration of "hk", which leads to it
	heard    chan string
}

func (w *world) secretary(t *testing.T) *secretary {
	t.Helper()
	at := netip.AddrPortFrom(w.Host(lab.Upstream).Addr4(), 1081)
	l, err := w.Host(lab.Upstream).Listen(t.Context(), "tcp", at.String())
	need(t, err)
	s := &secretary{outbound: fmt.Sprintf("outbounds: { hk: { url: \"socks5://%s\" } }\n", at), heard: make(chan string, 100)}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.hear(c)
			c.Close()
		}
	}()
	return s
}

func (s *secretary) hear(c net.Conn) {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	var b [512]byte
	read := func(n int) []byte {
		if _, err := io.ReadFull(c, b[:n]); err != nil {
			clear(b[:n])
		}
		return b[:n]
	}
	read(int(read(2)[1])) // RFC 1928 section 3
	c.Write([]byte{5, 0})
	host := ""
	switch read(4)[3] {
	case 1:
		host = netip.AddrFrom4([4]byte(read(4))).String()
	case 3:
		host = string(read(int(read(1)[0])))
	case 4:
		host = netip.AddrFrom16([16]byte(read(16))).String()
	}
	port := read(2)
	s.heard <- net.JoinHostPort(host, fmt.Sprint(int(port[0])<<8|int(port[1])))
	c.Write([]byte{5, 2, 0, 1, 0, 0, 0, 0, 0, 0})
}

// told is what the upstream is told when the laptop connects to an address; with a name, as a browser that visits it.
func (s *secretary) told(t *testing.T, w *world, to netip.AddrPort, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := w.laptop().Dial(ctx, "tcp", to.String())
	if !errors.Is(err, syscall.ECONNRESET) { // the upstream refuses, perhaps before Dial sees that the connection was open
		need(t, err)
		defer c.Close()
	}
	if name != "" && err == nil {
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", name)
	}
	select {
	case heard := <-s.heard:
		return heard
	case <-ctx.Done():
		return "nothing"
	}
}

// TestToldNames: what an upstream is told of a flow is the name that the client surely means, if it is to be told names.
func TestToldNames(t *testing.T) {
	w := newWorld(t)
	proxy := w.secretary(t)
	n := w.nameserver(t, w.server(), "one.test. 300 A 203.0.113.101", "ip.test. 300 A 203.0.113.102",
		"twin.test. 300 A 203.0.113.103", "twin-too.test. 300 A 203.0.113.103", "true.test. 300 A 203.0.113.104",
		"direct.test. 300 A 203.0.113.109")
	base := proxy.outbound + answeredBy(n) + "interfaces: { lan: auto }\nrules: [ { domain: direct.test, outbound: direct } ]\ndefault: hk\n"
	w.start(t, base)
	for _, c := range []struct {
		what, config string
		asked        []string // of DNS by the client
		host         string   // its connection's last byte of the address
		says         string   // in the first bytes
		want         string
	}{
		{"a name of DNS", "", []string{"one.test"}, "101", "", "one.test"},
		{"dial: ip", "dial: ip\n", []string{"ip.test"}, "102", "", "203.0.113.102"},
		{"two names", "sniff: off\n", []string{"twin.test", "twin-too.test"}, "103", "twin.test", "203.0.113.103"},
		{"a true name", "sniff: unknown\n", nil, "104", "true.test", "true.test"},
		{"a lie", "sniff: unknown\n", nil, "105", "true.test", "203.0.113.105"},
		{"no such name", "sniff: unknown\n", nil, "106", "unheard.test", "203.0.113.106"},
		{"trusted", "sniff: unknown\ntrust_sniffed: true\n", nil, "107", "true.test", "true.test"},
		{"trusted, dial: ip", "sniff: unknown\ntrust_sniffed: true\ndial: ip\n", nil, "108", "true.test", "203.0.113.108"},
	} {
		w.reload(t, base+c.config)
		for _, name := range c.asked {
			if got, err := w.lookUp(t.Context(), netip.Addr{}, n.Addr4.Addr(), name); err != nil || got != "203.0.113."+c.host {
				t.Fatalf("%s: %q, %v", name, got, err)
			}
		}
		if got := proxy.told(t, w, netip.MustParseAddrPort("203.0.113."+c.host+":80"), c.says); got != c.want+":80" {
			t.Errorf("%s: the upstream is told %s, want %s", c.what, got, c.want)
		}
	}
}

// TestMarkOfSniffed: a connection whose first bytes lead it to a direct rule with a mark goes the way of that mark, though
// it is the box that makes it.
func TestMarkOfSniffed(t *testing.T) {
	w := newWorld(t)
	files, err := w.server().StartFiles(t.Context(), 80)
	need(t, err)
	n := w.nameserver(t, w.server())
	w.start(t, "interfaces: { lan: auto }\nsniff: unknown\ndefault: block\n"+answeredBy(n)+`rules:
  - { name: plain, domain_suffix: plain.test, outbound: direct }
  - { name: marked, domain_suffix: marked.test, outbound: direct, mark: 0x100 }
`)
	visit := func(name string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := w.laptop().Dial(ctx, "tcp", files.Addr4().String())
		if err != nil {
			return "", err
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		fmt.Fprintf(c, "GET /whoami HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", name)
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		who, _, _ := strings.Cut(string(body), ":")
		return who, err
	}
	box := w.box().Addr4().String()
	for _, name := range []string{"www.plain.test", "www.marked.test"} {
		if who, err := visit(name); err != nil || who != box {
			t.Fatalf("%s: the server saw %q, %v; want the box", name, who, err)
		}
	}
	w.ip(t, w.box(), "rule add priority 100 fwmark 0x100/0x100 prohibit")
	if who, err := visit("www.plain.test"); err != nil || who != box {
		t.Errorf("without a mark: the server saw %q, %v; want the box", who, err)
	}
	if who, err := visit("www.marked.test"); err == nil {
		t.Errorf("the mark's way is closed, and the server saw %s", who)
	}
}
