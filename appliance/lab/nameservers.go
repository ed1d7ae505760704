package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

// UnboundOptions configure StartUnbound.
type UnboundOptions struct {
	Port    uint16         // 0 means 53
	Records []string       // lines of a zone file, such as "www.test. 300 A 203.0.113.10"
	Forward netip.AddrPort // whom it asks for all other names; none: there are no other names
	Threads int            // 0 means 1

	// Secure adds DNS over TLS at port 853 and over HTTPS at port 443, with a certificate for the host's addresses
	// and these names.
	Secure bool
	Names  []string
}

// StartUnbound starts a recursive resolver that knows the records.
func (h *Host) StartUnbound(ctx context.Context, o UnboundOptions) (*Daemon, error) {
	binary, err := find("unbound", "unbound")
	if err != nil {
		return nil, err
	}
	o.Port = cmp.Or(o.Port, 53)
	config := []string{
		"server:",
		`chroot: ""`, `username: ""`, `pidfile: ""`, fmt.Sprintf("directory: %q", h.lab.Dir()),
		"use-syslog: no", `logfile: ""`, "do-daemonize: no",
		fmt.Sprintf("num-threads: %d", max(o.Threads, 1)), "so-rcvbuf: 4m",
		`module-config: "iterator"`, "do-not-query-localhost: no",
		"access-control: 0.0.0.0/0 allow", "access-control: ::/0 allow",
	}
	ports := []uint16{o.Port}
	if o.Secure {
		certificate, err := h.Certificate(o.Names...)
		if err != nil {
			return nil, err
		}
		ports = append(ports, 853, 443)
		config = append(config, "tls-port: 853", "https-port: 443",
			fmt.Sprintf("tls-service-pem: %q", certificate.File), fmt.Sprintf("tls-service-key: %q", certificate.Key))
	}
	// Each address by itself: answers of a socket that is bound to none leave from the address that was asked only where
	// interface-automatic is set, which knows one port.
	for _, port := range ports {
		config = append(config, fmt.Sprintf("interface: %s@%d", h.Addr4(), port), fmt.Sprintf("interface: %s@%d", h.Addr6(), port))
	}
	for _, r := range o.Records {
		config = append(config, fmt.Sprintf("local-data: '%s'", r))
	}
	if o.Forward.IsValid() {
		config = append(config, "forward-zone:", `name: "."`, fmt.Sprintf("forward-addr: %s@%d", o.Forward.Addr(), o.Forward.Port()))
	} else {
		config = append(config, `local-zone: "." static`)
	}
	path := h.lab.file("unbound", ".conf")
	if err := os.WriteFile(path, []byte(strings.Join(config, "\n")+"\n"), 0o644); err != nil {
		return nil, err
	}
	return h.startDaemon(h.Command(ctx, binary, "-d", "-p", "-c", path), o.Port)
}

// DnsmasqOptions configure StartDnsmasq.
type DnsmasqOptions struct {
	Port    uint16                  // 0 means 53
	Hosts   map[string][]netip.Addr // what names stand for
	Aliases map[string]string       // names that stand for one of Hosts (CNAME)
}

// StartDnsmasq starts dnsmasq, which knows the hosts and nothing else.
func (h *Host) StartDnsmasq(ctx context.Context, o DnsmasqOptions) (*Daemon, error) {
	binary, err := find("dnsmasq", "dnsmasq-base")
	if err != nil {
		return nil, err
	}
	o.Port = cmp.Or(o.Port, 53)
	args := []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--log-facility=-", "--user=root",
		"--no-resolv", "--no-hosts", "--local=/#/", "--local-ttl=300", "--bind-interfaces",
		"--listen-address=" + h.Addr4().String(), "--listen-address=" + h.Addr6().String(), "--port=" + strconv.Itoa(int(o.Port)),
	}
	for name, addresses := range o.Hosts {
		for _, a := range addresses {
			args = append(args, fmt.Sprintf("--host-record=%s,%s", name, a))
		}
	}
	for alias, name := range o.Aliases {
		args = append(args, fmt.Sprintf("--cname=%s,%s", alias, name))
	}
	return h.startDaemon(h.Command(ctx, binary, args...), o.Port)
}

// Nameserver is a DNS server inside this process that says what a function tells it to, so that it can know 100,000 names,
// be slow, or lie.
type Nameserver struct {
	Addr4, Addr6 netip.AddrPort

	mu        sync.Mutex
	questions []Question
}

// Question is one that a Nameserver was asked.
type Question struct {
	From netip.AddrPort
	dns.Question
	Network string // udp or tcp
	ID      uint16
}

// Answer is what becomes of a question; nil: silence. It is called from many goroutines.
type Answer func(q *dns.Msg, asked Question) *dns.Msg

// StartNameserver starts a server on a port of the host, UDP and TCP, both families. The lab stops it on Close.
func (h *Host) StartNameserver(ctx context.Context, port uint16, answer Answer) (_ *Nameserver, err error) {
	n := &Nameserver{Addr4: netip.AddrPortFrom(h.Addr4(), port), Addr6: netip.AddrPortFrom(h.Addr6(), port)}
	var servers []*dns.Server
	var tasks sync.WaitGroup
	stop := func() error {
		var errs []error
		for _, s := range servers {
			errs = append(errs, s.Shutdown())
		}
		tasks.Wait()
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting the name server on %s: %w", h.name, errors.Join(err, stop()))
		}
	}()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked := n.note(w, q)
		if m := answer(q, asked); m != nil {
			w.WriteMsg(m) // UDP may lose it, so may we
		}
	})
	for _, at := range []netip.AddrPort{n.Addr4, n.Addr6} {
		udp, err := h.ListenUDP(ctx, "udp", at.String())
		if err != nil {
			return nil, err
		}
		err = udp.SetReadBuffer(4 << 20)
		servers = append(servers, &dns.Server{PacketConn: udp, Handler: handler})
		if err != nil {
			udp.Close()
			return nil, err
		}
		tcp, err := h.Listen(ctx, "tcp", at.String())
		if err != nil {
			udp.Close()
			return nil, err
		}
		servers = append(servers, &dns.Server{Listener: tcp, Handler: handler})
	}
	for _, s := range servers {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		tasks.Go(func() { s.ActivateAndServe() })
		<-started // Shutdown knows only servers that have started
	}
	if _, ok := h.lab.onClose(stop); !ok {
		return nil, errClosed
	}
	return n, nil
}

func (n *Nameserver) note(w dns.ResponseWriter, q *dns.Msg) Question {
	from, _ := netip.ParseAddrPort(w.RemoteAddr().String())
	asked := Question{From: from, Network: w.RemoteAddr().Network(), ID: q.Id}
	if len(q.Question) > 0 {
		asked.Question = q.Question[0]
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.questions = append(n.questions, asked)
	return asked
}

// Questions returns what was asked so far.
func (n *Nameserver) Questions() []Question {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]Question(nil), n.questions...)
}

// Zone answers with the records, which are lines of a zone file, and with NXDOMAIN for names that have none. It follows
// aliases (CNAME).
func Zone(records ...string) (Answer, error) {
	zone := make(map[string][]dns.RR)
	for _, line := range records {
		r, err := dns.NewRR(line)
		if err != nil {
			return nil, fmt.Errorf("reading the record %q: %w", line, err)
		}
		name := dns.CanonicalName(r.Header().Name)
		zone[name] = append(zone[name], r)
	}
	return func(q *dns.Msg, asked Question) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Authoritative = true
		name := dns.CanonicalName(asked.Name)
		if zone[name] == nil {
			m.Rcode = dns.RcodeNameError
		}
		for range len(records) { // bounds a circle of aliases
			alias := ""
			for _, r := range zone[name] {
				c, isAlias := r.(*dns.CNAME)
				if isAlias {
					alias = dns.CanonicalName(c.Target)
				}
				if isAlias || r.Header().Rrtype == asked.Qtype {
					m.Answer = append(m.Answer, r)
				}
			}
			if alias == "" {
				break
			}
			name = alias
		}
		return m
	}, nil
}
