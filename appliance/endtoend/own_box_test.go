package endtoend

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// box is a world whose gateway decides for programs of the box itself too: for those in a cgroup that is the test's own. The
// gateway runs in it as well.
type box struct {
	world
	dante *lab.Daemon // outbound hk of every configuration
}

// newBox makes the world and a SOCKS5 server at its upstream. Where no cgroup v2 is mounted the test is skipped.
func newBox(t *testing.T) *box {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: builds network namespaces and loads BPF programs")
	}
	cgroup := newCgroup(t)
	b := &box{world: newWorld(t, lab.Options{})} // whose end comes before the cgroup's
	b.cgroup = cgroup
	var err error
	b.dante, err = b.upstream().StartDante(t.Context(), lab.DanteOptions{})
	need(t, err)
	return b
}

// newCgroup makes a directory of cgroup v2, which is removed when nobody is in it any more.
func newCgroup(t *testing.T) string {
	t.Helper()
	c, err := lab.NewCgroup("sidegate-test-")
	if errors.Is(err, lab.ErrNoCgroup) {
		t.Skip(err)
	}
	need(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return string(c)
}

// unit is the directory of a cgroup that is called like a unit of systemd.
func (b *box) unit(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(b.cgroup, name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return dir
}

// config is a whole configuration: the box's own programs are decided for, and hk leads by the upstream.
func (b *box) config(more ...string) string { return b.configOf("local: true", more...) }

// configOf is config with something else said of the box's own programs.
func (b *box) configOf(local string, more ...string) string {
	return fmt.Sprintf("interfaces: { lan: auto }\ngateway: { %s, cgroup: %s }\noutbounds: { hk: { url: %q } }\n%s\n",
		local, b.cgroup, b.dante.URL("socks5", lab.Credentials{}), strings.Join(more, "\n"))
}

// start runs the gateway in a unit of its own; its log is shown if the test fails.
func (b *box) start(t *testing.T, config string) {
	t.Helper()
	g, err := b.sidegate().StartGateway(t.Context(), lab.GatewayOptions{Binary: binary, Config: config, Cgroup: b.unit(t, "sidegate.service")})
	need(t, err)
	b.gateway = g
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the gateway's last words:\n%s", g.Tail(20))
		}
	})
}

// reload puts another configuration in force.
func (b *box) reload(t *testing.T, config string) {
	t.Helper()
	need(t, os.WriteFile(b.gateway.Config, []byte(config), 0o600))
	b.cli(t, "reload")
}

func (b *box) status(t *testing.T) (s admin.Status) {
	t.Helper()
	need(t, json.Unmarshal([]byte(b.cli(t, "status", "--json")), &s))
	return s
}

func (b *box) flows(t *testing.T) (flows []admin.Flow) {
	t.Helper()
	need(t, json.Unmarshal([]byte(b.cli(t, "flows", "--json")), &flows))
	return flows
}

// is reports whether an address is one of a host's.
func is(h *lab.Host, a netip.Addr) bool { return a == h.Addr4() || a == h.Addr6() }

// program gives an executable file another name, which is what a process is known by.
func program(t *testing.T, binary, path string) string {
	t.Helper()
	binary, err := filepath.EvalSymlinks(binary)
	need(t, err)
	need(t, os.MkdirAll(filepath.Dir(path), 0o755))
	from, err := os.Open(binary)
	need(t, err)
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	need(t, err)
	_, err = io.Copy(to, from)
	need(t, errors.Join(err, to.Close()))
	return path
}

// witness is a server that tells whoever speaks to it as whom it sees him: it answers each datagram and each line with the sender's
// address.
type witness struct {
	addr4, addr6           netip.AddrPort
	connections, datagrams atomic.Int64
	heard                  atomic.Pointer[func(network, word string, from netip.Addr)]
}

// hears has a function told of what the witness hears, from then on.
func (w *witness) hears(f func(network, word string, from netip.Addr)) { w.heard.Store(&f) }

// answer is what it says to whoever says something.
func (w *witness) answer(network, word string, from netip.AddrPort) []byte {
	if f := w.heard.Load(); f != nil {
		(*f)(network, strings.TrimSpace(word), from.Addr().Unmap())
	}
	return []byte(from.String() + "\n")
}

// goodbye ends a line after which the witness closes the connection.
const goodbye = "goodbye"

func (w *witness) addrs() []netip.AddrPort { return []netip.AddrPort{w.addr4, w.addr6} }

// met is how many TCP connections and UDP datagrams have come.
func (w *witness) met() int64 { return w.connections.Load() + w.datagrams.Load() }

func startWitness(t *testing.T, on *lab.Host, port uint16) *witness {
	t.Helper()
	w := &witness{addr4: netip.AddrPortFrom(on.Addr4(), port), addr6: netip.AddrPortFrom(on.Addr6(), port)}
	address := fmt.Sprintf(":%d", port)
	l, err := on.Listen(t.Context(), "tcp", address)
	need(t, err)
	u, err := on.ListenUDP(t.Context(), "udp", address)
	need(t, err)
	need(t, u.SetReadBuffer(1<<20))
	var tasks sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	tasks.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			w.connections.Add(1)
			mu.Lock()
			open[c] = true
			mu.Unlock()
			tasks.Go(func() {
				defer c.Close()
				defer func() { mu.Lock(); defer mu.Unlock(); delete(open, c) }()
				for lines := bufio.NewScanner(c); lines.Scan(); {
					c.Write(w.answer("tcp", lines.Text(), c.RemoteAddr().(*net.TCPAddr).AddrPort()))
					if strings.HasSuffix(lines.Text(), goodbye) {
						return
					}
				}
			})
		}
	})
	tasks.Go(func() {
		for buffer := make([]byte, 1<<16); ; {
			n, from, err := u.ReadFromUDPAddrPort(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // an ICMP error that an earlier answer caused
			}
			w.datagrams.Add(1)
			u.WriteToUDPAddrPort(w.answer("udp", string(buffer[:n]), from), from) // UDP may lose it, so may we
		}
	})
	t.Cleanup(func() {
		l.Close()
		u.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		tasks.Wait()
	})
	return w
}

// agent is a process of the box that does as it is told: this test binary, under a name and in a unit.
type agent struct {
	*lab.Process
	in  *json.Encoder
	out *json.Decoder
}

// order is what an agent is told to do. Conn is the number of one of its sockets.
type order struct {
	Do      string // open, say, close
	Conn    int
	Network string
	To      netip.AddrPort // say: where a datagram goes, of a socket that is not connected
	Local   netip.AddrPort
	Timeout time.Duration
}

// sight is who is who, as the program and the server see it.
type sight struct {
	Seen        netip.AddrPort // the client, by the server
	Local, Peer netip.AddrPort // what getsockname and getpeername say
	Error       string         `json:",omitempty"`
}

func (b *box) agent(t *testing.T, executable, unit string) *agent {
	t.Helper()
	stdin, in, err := os.Pipe()
	need(t, err)
	out, stdout, err := os.Pipe()
	need(t, err)
	t.Cleanup(func() { in.Close(); out.Close() })
	c := b.sidegate().Command(t.Context(), executable)
	c.Env, c.Cgroup, c.Stdin, c.Stdout = []string{modeVariable + "=agent"}, unit, stdin, stdout
	p, err := c.Start()
	need(t, errors.Join(err, stdin.Close(), stdout.Close()))
	return &agent{Process: p, in: json.NewEncoder(in), out: json.NewDecoder(out)}
}

// tell has the agent do something and says what came of it.
func (a *agent) tell(t *testing.T, o order) (s sight) {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = forAnswer
	}
	need(t, a.in.Encode(o))
	if err := a.out.Decode(&s); err != nil {
		t.Fatalf("the agent is gone: %v\n%s", err, a.Tail(10))
	}
	return s
}

// visit opens a connection, or a connected socket of UDP, asks over it, and leaves it open under the number.
func (a *agent) visit(t *testing.T, number int, network string, to netip.AddrPort) sight {
	t.Helper()
	if s := a.tell(t, order{Do: "open", Conn: number, Network: network, To: to}); s.Error != "" {
		return s
	}
	return a.tell(t, order{Do: "say", Conn: number})
}

// runAgent is the agent's own part.
func runAgent(in *json.Decoder, out *json.Encoder) error {
	conns := map[int]net.Conn{}
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		s, err := o.obey(conns)
		if err != nil {
			s.Error = err.Error()
		}
		if err := out.Encode(s); err != nil {
			return err
		}
	}
}

func (o order) obey(conns map[int]net.Conn) (s sight, err error) {
	switch c := conns[o.Conn]; o.Do {
	case "open":
		if c, err = o.open(); err != nil {
			return s, err
		}
		conns[o.Conn] = c
		return o.describe(c)
	case "say":
		return o.say(c)
	case "close":
		delete(conns, o.Conn)
		return s, c.Close()
	}
	return s, fmt.Errorf("an agent cannot %q", o.Do)
}

func (o order) open() (net.Conn, error) {
	if !o.To.IsValid() { // not connected
		return net.ListenUDP(o.Network, net.UDPAddrFromAddrPort(o.Local))
	}
	d := net.Dialer{Timeout: o.Timeout}
	if o.Local.IsValid() && strings.HasPrefix(o.Network, "udp") {
		d.LocalAddr = net.UDPAddrFromAddrPort(o.Local)
	} else if o.Local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(o.Local)
	}
	return d.Dial(o.Network, o.To.String())
}

func (o order) describe(c net.Conn) (s sight, err error) {
	for a, into := range map[net.Addr]*netip.AddrPort{c.LocalAddr(): &s.Local, c.RemoteAddr(): &s.Peer} {
		if a == nil {
			continue
		}
		if *into, err = netip.ParseAddrPort(a.String()); err != nil {
			return s, err
		}
	}
	return s, nil
}

// say asks the witness.
func (o order) say(c net.Conn) (s sight, err error) {
	if s, err = o.describe(c); err != nil {
		return s, err
	}
	if err := c.SetDeadline(time.Now().Add(o.Timeout)); err != nil {
		return s, err
	}
	buffer := make([]byte, 100)
	var n int
	if u, ok := c.(*net.UDPConn); ok && o.To.IsValid() {
		if _, err := u.WriteToUDPAddrPort([]byte("who?\n"), o.To); err != nil {
			return s, err
		}
		n, s.Peer, err = u.ReadFromUDPAddrPort(buffer)
	} else {
		if _, err := c.Write([]byte("who?\n")); err != nil {
			return s, err
		}
		n, err = c.Read(buffer)
	}
	if err != nil {
		return s, err
	}
	s.Seen, err = netip.ParseAddrPort(strings.TrimSpace(string(buffer[:n])))
	return s.plain(), err
}

// plain has no IPv4 address in IPv6's clothes.
func (s sight) plain() sight {
	for _, a := range []*netip.AddrPort{&s.Seen, &s.Local, &s.Peer} {
		*a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return s
}
