package proxy

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"sidegate/appliance/outbound"
)

// Serve leaves no descriptor and no goroutine behind.
func TestServeLeavesNothing(t *testing.T) {
	r := newNetwork(t)
	up := map[string]outbound.Outbound{"up": r.dante()}
	address := r.tcpServer(netip.AddrPortFrom(server4, 0), func(c *net.TCPConn) { c.Read(make([]byte, 1)) })
	server := r.udpServer(netip.AddrPortFrom(server4, 0), echo)
	round := func() {
		r.serve(Options{}, up)
		c := r.dial(address)
		defer c.Close()
		u := r.udpClient(client4, 0)
		defer u.Close()
		if err := u.exchange(server, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the connection is open", func() bool { return r.server.Stats().Outbounds["up"].Connections == 1 })
		r.stop()
		if s := r.server.Stats(); s.Connections+s.Sessions+s.Flows != 0 || r.server.descriptors.used.Load() != 0 {
			t.Errorf("left: %+v, %d descriptors", s, r.server.descriptors.used.Load())
		}
	}
	round() // the runtime opens what it keeps
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	for range 3 {
		round()
	}
	eventually(t, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range list {
		// The runtime's own poller may appear between two looks.
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && !strings.Contains(target, "/proc/") {
			n++
		}
	}
	return n
}

func TestCloseWithoutServe(t *testing.T) {
	newNetwork(t)
	files := openFiles(t)
	s, err := Listen(Options{Verdicts: &verdicts{}, Outbounds: &outbounds{}})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if n := openFiles(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve after Close succeeded")
	}
}
