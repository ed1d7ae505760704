package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Echo is a server inside this process that sends everything back, over UDP and TCP on one port, and remembers who
// spoke. A TCP connection whose client half-closes gets the rest of its bytes back, then the other half is closed.
type Echo struct {
	// UDP is the server's socket, for sending what nobody asked for.
	UDP *net.UDPConn

	addr4, addr6 netip.AddrPort
	tcp          *net.TCPListener
	tasks        sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	conns   map[net.Conn]bool
	seen    map[netip.AddrPort]bool
	senders []netip.AddrPort
	packets uint64
}

// StartEcho starts an echo server on a port of the host, both families. The lab stops it on Close.
func (h *Host) StartEcho(ctx context.Context, port uint16) (_ *Echo, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting the echo server on %s: %w", h.name, err)
		}
	}()
	e := &Echo{conns: make(map[net.Conn]bool), seen: make(map[netip.AddrPort]bool)}
	if e.tcp, err = h.Listen(ctx, "tcp", ":"+strconv.Itoa(int(port))); err != nil {
		return nil, err
	}
	port = uint16(e.tcp.Addr().(*net.TCPAddr).Port)
	if e.UDP, err = h.ListenUDP(ctx, "udp", ":"+strconv.Itoa(int(port))); err != nil {
		e.tcp.Close()
		return nil, err
	}
	// A burst of many clients must not be lost here; beyond rmem_max the kernel gives what it may.
	if err := e.UDP.SetReadBuffer(4 << 20); err != nil {
		return nil, errors.Join(err, e.close())
	}
	e.addr4, e.addr6 = netip.AddrPortFrom(h.Addr4(), port), netip.AddrPortFrom(h.Addr6(), port)
	e.tasks.Go(e.echoUDP)
	e.tasks.Go(e.accept)
	if _, ok := h.lab.onClose(e.close); !ok {
		return nil, errors.Join(errClosed, e.close())
	}
	return e, nil
}

// Addr4 is where the server listens.
func (e *Echo) Addr4() netip.AddrPort { return e.addr4 }

// Addr6 is the same in IPv6.
func (e *Echo) Addr6() netip.AddrPort { return e.addr6 }

// Senders returns the distinct addresses of UDP datagrams and TCP connections in the order in which they appeared.
func (e *Echo) Senders() []netip.AddrPort {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]netip.AddrPort(nil), e.senders...)
}

// Datagrams is how many UDP datagrams arrived.
func (e *Echo) Datagrams() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.packets
}

func (e *Echo) saw(from netip.AddrPort) {
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if !e.seen[from] {
		e.seen[from] = true
		e.senders = append(e.senders, from)
	}
}

func (e *Echo) echoUDP() {
	buffer := make([]byte, 65535)
	for {
		n, from, err := e.UDP.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error that an earlier answer caused
		}
		e.mu.Lock()
		e.packets++
		e.saw(from)
		e.mu.Unlock()
		e.UDP.WriteToUDPAddrPort(buffer[:n], from) // UDP may lose it, so may we
	}
}

func (e *Echo) accept() {
	for {
		c, err := e.tcp.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Millisecond) // out of descriptors: others must close first
			continue
		}
		e.mu.Lock()
		if e.closed {
			e.mu.Unlock()
			c.Close()
			return
		}
		e.conns[c] = true
		e.saw(c.RemoteAddr().(*net.TCPAddr).AddrPort())
		e.mu.Unlock()
		e.tasks.Go(func() {
			io.Copy(c, c)
			c.Close()
			e.mu.Lock()
			delete(e.conns, c)
			e.mu.Unlock()
		})
	}
}

func (e *Echo) close() error {
	e.mu.Lock()
	e.closed = true
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	err := errors.Join(e.tcp.Close(), e.UDP.Close())
	e.tasks.Wait()
	return err
}
