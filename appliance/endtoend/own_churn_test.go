package endtoend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

// churnOrder is what a short-lived process does: as many connections by TCP and sockets of UDP, in turn to each of To. It says its
// word over each of them.
type churnOrder struct {
	Word  string
	To    []netip.AddrPort
	Count int
}

type churnResult struct {
	Failed []string
	Lost   int // answers by UDP that did not come
}

// runChurn is such a process. It leaves connections in all ways: closes first, lets the server close, resets, and the last ones when
// it ends.
func runChurn(text []byte) (any, error) {
	var o churnOrder
	if err := json.Unmarshal(text, &o); err != nil {
		return nil, err
	}
	var r churnResult
	for i := range o.Count {
		for network, speak := range map[string]func(churnOrder, int, netip.AddrPort) error{"tcp": churnTCP, "udp": churnUDP} {
			err := speak(o, i, o.To[i/2%len(o.To)])
			if timeout := net.Error(nil); network == "udp" && errors.As(err, &timeout) && timeout.Timeout() {
				r.Lost++
			} else if err != nil {
				r.Failed = append(r.Failed, fmt.Sprintf("%s %s %d: %v", o.Word, network, i, err))
			}
		}
	}
	return r, nil
}

func churnTCP(o churnOrder, i int, to netip.AddrPort) error {
	c, err := (&net.Dialer{Timeout: forAnswer, Control: fewPorts}).Dial("tcp", to.String())
	if err != nil {
		return err
	}
	word := o.Word
	if i%3 == 1 {
		word += " " + goodbye
	}
	if err := ask(c, word); err != nil || i == o.Count-1 {
		return err
	}
	switch i % 3 {
	case 1: // the server closes
		c.Read(make([]byte, 1))
	case 2:
		c.(*net.TCPConn).SetLinger(0)
	}
	return c.Close()
}

func churnUDP(o churnOrder, i int, to netip.AddrPort) error {
	if i%2 == 0 {
		c, err := (&net.Dialer{Control: fewPorts}).Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		return ask(c, o.Word)
	}
	l, err := (&net.ListenConfig{Control: fewPorts}).ListenPacket(context.Background(), "udp", ":0")
	if err != nil {
		return err
	}
	defer l.Close()
	c := l.(*net.UDPConn)
	if err := c.SetDeadline(time.Now().Add(forLost)); err != nil {
		return err
	}
	if _, err := c.WriteToUDPAddrPort([]byte(o.Word+"\n"), to); err != nil || i == o.Count-1 {
		return err // nobody waits for the last one's answer
	}
	for { // the answer to whoever had the port before may still come
		_, from, err := c.ReadFromUDPAddrPort(make([]byte, 100))
		if err != nil || netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) == to {
			return err
		}
	}
}

// fewPorts has the kernel choose a socket's port among few (IP_LOCAL_PORT_RANGE of ip(7)), within what all may have: fewer of UDP than of
// TCP, which keeps them for a minute. The daemon's own are others: it has as many connections to one upstream.
func fewPorts(network, _ string, c syscall.RawConn) error {
	const option = 51
	first, last := 20000, 20300
	if strings.HasPrefix(network, "tcp") {
		first, last = 21000, 27000
	}
	var set error
	err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_IP, option, last<<16|first) })
	return errors.Join(err, set)
}

func ask(c net.Conn, word string) error {
	patience := forAnswer
	if c.LocalAddr().Network() == "udp" {
		patience = forLost
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, word); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 100))
	return err
}

// census is what a witness hears: who says which word, by protocol.
type census struct {
	mu    sync.Mutex
	count map[string]int // "red tcp direct"
}

func (c *census) note(b *box) func(network, word string, from netip.Addr) {
	c.count = map[string]int{}
	return func(network, word string, from netip.Addr) {
		who := from.String()
		if is(b.sidegate(), from) {
			who = "direct"
		} else if is(b.upstream(), from) {
			who = "proxied"
		}
		word, _, _ = strings.Cut(word, " ")
		c.mu.Lock()
		defer c.mu.Unlock()
		c.count[strings.Join([]string{word, network, who}, " ")]++
	}
}

const (
	forLost          = 5 * time.Second // of UDP
	churnAtOnce      = 50
	churnConnections = 10 // by TCP, and as many by UDP, of each process
)

// TestOwnShortLived: 1,000 processes, 50 at a time, of two units with opposite rules, open 10,000 connections by TCP and as many sockets
// of UDP, and end. They share few ports, so that each unit gets those that the other one just had: the server hears each of them
// by the way of its own unit, and all of TCP. When they are gone, nothing of a direct connection is left, in the
// list of sockets neither, and all that is left of proxied ones is closing.
func TestOwnShortLived(t *testing.T) {
	b := newBox(t)
	var heard census
	w := startWitness(t, b.server(), 7)
	w.hears(heard.note(b))
	need(t, b.sidegate().SetSysctl("net.ipv4.ip_local_port_range", "20000 60999"))
	client := program(t, "/proc/self/exe", filepath.Join(t.TempDir(), "churn"))
	b.start(t, b.config(`per_client: { flows: 100000, connections: 100000, udp_sessions: 10000, udp_flows: 10000 }
rules:
  - { name: red, unit: [red.service], outbound: direct }
  - { name: blue, unit: [blue.service], outbound: hk }
default: block`))
	var lost atomic.Int64
	processes := 1000
	if testing.Short() {
		processes = 100
	}
	units := map[string]string{"red": b.unit(t, "red.service"), "blue": b.unit(t, "blue.service")}
	words := make(chan string)
	var running sync.WaitGroup
	for range churnAtOnce {
		running.Go(func() {
			for word := range words {
				lost.Add(b.churn(t, client, units[word], churnOrder{Word: word, To: w.addrs(), Count: churnConnections}))
			}
		})
	}
	begun := time.Now()
	for i := range processes {
		words <- []string{"red", "blue"}[i%2]
	}
	close(words)
	running.Wait()
	t.Logf("%d processes in %v; %d answers by UDP were lost", processes, time.Since(begun).Round(time.Second), lost.Load())
	if most := int64(processes * churnConnections / 1000); lost.Load() > most { // UDP may lose some
		t.Errorf("%d answers by UDP were lost, at most %d may be", lost.Load(), most)
	}

	each := processes / 2 * churnConnections
	err := lab.Wait(within(t, forAnswer), "everybody to be heard", func() error {
		heard.mu.Lock()
		defer heard.mu.Unlock()
		for of, n := range heard.count {
			if !slices.Contains([]string{"red tcp direct", "blue tcp proxied", "red udp direct", "blue udp proxied"}, of) {
				t.Fatalf("heard %q %d times", of, n)
			}
		}
		for of, least := range map[string]int{ // UDP may lose some
			"red tcp direct": each, "blue tcp proxied": each, "red udp direct": each - each/1000, "blue udp proxied": each - each/1000,
		} {
			if heard.count[of] < least {
				return fmt.Errorf("%v, want %d %q", heard.count, least, of)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if t.Failed() {
		s := b.status(t)
		t.Logf("drops %v, proxy %+v, heard %v", s.Drops, s.Proxy, heard.count)
	}
	for _, f := range b.flows(t) {
		switch {
		case f.Process == nil:
			t.Errorf("nobody knows whose flow it is: %+v", f)
		case f.Network == "tcp" && (f.Verdict != "proxy" || f.State != "closing"):
			t.Errorf("it is over, and listed as open: %+v of %+v", f, *f.Process)
		}
	}
}

// TestOwnClosedIsNotListed: a connection that its program has closed is nobody's, while the kernel still tries to end it.
func TestOwnClosedIsNotListed(t *testing.T) {
	b := newBox(t)
	w := startWitness(t, b.server(), 7)
	to := w.addrs()[0]
	b.start(t, b.config("default: direct"))
	client := b.agent(t, "/proc/self/exe", b.unit(t, "client.service"))
	listed := func() bool {
		return slices.ContainsFunc(b.flows(t), func(f admin.Flow) bool { return f.Destination == to })
	}
	if s := client.visit(t, 1, "tcp", to); s.Error != "" {
		t.Fatal(s.Error)
	}
	if !listed() {
		t.Error("an open connection is not listed")
	}
	run(t, b.sidegate(), "ip route add blackhole "+to.Addr().String()) // what ends it does not arrive
	if s := client.tell(t, order{Do: "close", Conn: 1}); s.Error != "" {
		t.Fatal(s.Error)
	}
	run(t, b.sidegate(), "grep ' 04 ' /proc/net/tcp") // FIN-WAIT-1
	if listed() {
		t.Error("a connection that is closed is listed")
	}
}

// churn runs a process and says how many answers it lost.
func (b *box) churn(t *testing.T, client, unit string, o churnOrder) (lost int64) {
	text, err := json.Marshal(o)
	if err != nil {
		t.Error(err)
		return 0
	}
	c := b.sidegate().Command(t.Context(), client)
	c.Env, c.Cgroup, c.Stdin = []string{modeVariable + "=churn"}, unit, strings.NewReader(string(text))
	out, err := c.Output()
	var r churnResult
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	if err != nil {
		t.Error(err)
	}
	for _, f := range r.Failed {
		t.Error(f)
	}
	return int64(r.Lost)
}
