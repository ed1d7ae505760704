package outbound

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// PacketConn makes an association a net.PacketConn, for who sends few datagrams and wants deadlines:
// DNS and QUIC through a proxy. It owns the association then, and closes it, also when it fails.
// When the association ends, reading and writing fail with net.ErrClosed.
//
// Addresses are *net.UDPAddr, the peer's as the upstream names it. LocalAddr is the socket's, not what
// the peer sees. A datagram that does not fit is cut off, as everywhere.
func PacketConn(a *Association) (net.PacketConn, error) {
	c, err := pollable(a.FD)
	if err != nil {
		a.Close()
		return nil, fmt.Errorf("opening a packet connection: %w", err)
	}
	p := &packetConn{socket: c, association: a, watching: make(chan struct{})}
	go func() {
		defer close(p.watching)
		<-a.Done()
		c.Close()
	}()
	return p, nil
}

// pollable is a second descriptor of a socket, which the Go runtime's poller knows. The association
// keeps its own, since an os.File would close that.
func pollable(fd int) (*net.UDPConn, error) {
	second, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(second), "udp association")
	defer f.Close()
	c, err := net.FilePacketConn(f) // a third, its own
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// packetConn puts the association's prefix before what it sends, and takes it off what it receives.
type packetConn struct {
	socket      *net.UDPConn // not embedded: whoever found its other methods would pass the prefix by
	association *Association
	watching    chan struct{} // closed when the association's end has been seen

	reading  sync.Mutex // guards received
	received []byte
}

// ReadFrom passes over what is no datagram of the association's protocol.
func (p *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	if !p.association.Connected {
		n, from, err := p.socket.ReadFromUDPAddrPort(b)
		if err != nil {
			return n, nil, err
		}
		return n, net.UDPAddrFromAddrPort(unmap(from)), nil
	}
	p.reading.Lock()
	defer p.reading.Unlock()
	if room := len(b) + p.association.HeaderRoom; len(p.received) < room {
		p.received = make([]byte, room)
	}
	for {
		n, err := p.socket.Read(p.received)
		if err != nil {
			return 0, nil, err
		}
		if from, offset, err := p.association.Parse(p.received[:n]); err == nil {
			return copy(b, p.received[offset:n]), net.UDPAddrFromAddrPort(from), nil
		}
	}
}

// WriteTo wants a *net.UDPAddr.
func (p *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	u, ok := to.(*net.UDPAddr)
	if !ok {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: p.LocalAddr(), Addr: to, Err: errors.New("the address is not one of UDP")}
	}
	destination := unmap(u.AddrPort())
	if !destination.IsValid() || destination.Port() == 0 {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: p.LocalAddr(), Addr: to, Err: errors.New("an address and a port are needed")}
	}
	if !p.association.Connected {
		return p.socket.WriteToUDPAddrPort(b, destination)
	}
	header := p.association.Header(destination)
	n, err := p.socket.Write(append(header, b...))
	return max(n-len(header), 0), err
}

func (p *packetConn) LocalAddr() net.Addr                { return p.socket.LocalAddr() }
func (p *packetConn) SetDeadline(t time.Time) error      { return p.socket.SetDeadline(t) }
func (p *packetConn) SetReadDeadline(t time.Time) error  { return p.socket.SetReadDeadline(t) }
func (p *packetConn) SetWriteDeadline(t time.Time) error { return p.socket.SetWriteDeadline(t) }

// Close ends the association too, and waits until nothing of both is left.
func (p *packetConn) Close() error {
	err := p.association.Close()
	<-p.watching
	return err
}
