package endtoend

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"sidegate/appliance/lab"
)

// socks is a small SOCKS5 server (RFC 1928, CONNECT only) inside this process, for more connections than real ones take:
// dante begins a process for every few.
type socks struct {
	named atomic.Int64 // requests with a name instead of an address
}

// startSocks starts it on the upstream; lookup says what a name stands for.
func startSocks(t *testing.T, on *lab.Host, lookup func(name string) (netip.Addr, bool)) (*socks, netip.AddrPort) {
	t.Helper()
	l, err := on.Listen(t.Context(), "tcp", ":1080")
	if err != nil {
		t.Fatal(err)
	}
	s := new(socks)
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			tasks.Go(func() { s.serve(t, on, c, lookup) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		tasks.Wait()
	})
	return s, netip.AddrPortFrom(on.Addr4(), 1080)
}

// serve ends both sides with a reset, as soon as one ends: ports must not wait.
func (s *socks) serve(t *testing.T, on *lab.Host, c *net.TCPConn, lookup func(string) (netip.Addr, bool)) {
	defer c.Close()
	c.SetLinger(0)
	to, err := s.greet(c, lookup)
	if err != nil {
		return // the client sees the end
	}
	up, err := on.Dial(t.Context(), "tcp", to.String())
	if err != nil {
		c.Write([]byte{5, 1, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	defer up.Close()
	up.(*net.TCPConn).SetLinger(0)
	if _, err := c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(up, c)
		up.Close()
	}()
	io.Copy(c, up)
	c.Close()
	<-done
}

func (s *socks) greet(c net.Conn, lookup func(string) (netip.Addr, bool)) (to netip.AddrPort, err error) {
	var b [262]byte
	read := func(n int) []byte {
		if err == nil {
			_, err = io.ReadFull(c, b[:n])
		}
		return b[:n]
	}
	methods := read(2)[1]
	read(int(methods))
	if err != nil {
		return to, err
	}
	if _, err := c.Write([]byte{5, 0}); err != nil {
		return to, err
	}
	var address netip.Addr
	switch kind := read(4)[3]; kind {
	case 1:
		address = netip.AddrFrom4([4]byte(read(4)))
	case 4:
		address = netip.AddrFrom16([16]byte(read(16)))
	case 3:
		name := string(read(int(read(1)[0])))
		found, ok := lookup(name)
		if !ok {
			return to, errors.New("no such name: " + strconv.Quote(name))
		}
		s.named.Add(1)
		address = found
	}
	port := read(2)
	return netip.AddrPortFrom(address, uint16(port[0])<<8|uint16(port[1])), err
}
