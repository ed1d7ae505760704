package lab

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file makes traffic for measurements: many packets for each system call, and no copy that can be avoided, so that
// on a small machine most of the time is left to what is measured.

// Flood says which UDP packets to send: each of Sources sockets sends to each of To, which makes Sources × len(To)
// flows, sent in turn. Every payload begins with the packet's number in 8 bytes, big-endian.
type Flood struct {
	To      []netip.AddrPort // one family
	Sources int              // sockets, each with its own port; 0 means 1
	Port    uint16           // of the first socket, the others' follow, so that a later flood is of the same flows; 0: any
	Size    int              // bytes of payload, at least 8; 0 means 64
	Burst   int              // packets for each system call, which a flow gets in a train if To has one entry; 0 means 32
	Rate    int              // packets per second over all flows; 0 means as many as possible
	Packets int              // stop after so many; 0 means when ctx ends
}

// Flood sends until ctx ends or Packets are sent, and returns how many the kernel took. That ctx ended is no error.
func (h *Host) Flood(ctx context.Context, f Flood) (sent int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("flooding from %s: %w", h.name, err)
		}
	}()
	if len(f.To) == 0 {
		return 0, errors.New("no destination")
	}
	f.Sources, f.Burst = max(f.Sources, 1), cmp.Or(f.Burst, 32)
	f.Size = max(cmp.Or(f.Size, 64), 8)
	network := "udp4"
	if f.To[0].Addr().Is6() {
		network = "udp6"
	}
	sources := make([]syscall.RawConn, f.Sources)
	for i := range sources {
		port := 0
		if f.Port > 0 {
			port = int(f.Port) + i
		}
		c, err := h.ListenUDP(ctx, network, ":"+strconv.Itoa(port))
		if err != nil {
			return 0, err
		}
		defer c.Close()
		stop := context.AfterFunc(ctx, func() { c.SetWriteDeadline(time.Unix(1, 0)) })
		defer stop()
		if sources[i], err = c.SyscallConn(); err != nil {
			return 0, err
		}
		if len(f.To) == 1 { // connected: no route look-up for each packet
			if err := connect(sources[i], f.To[0]); err != nil {
				return 0, err
			}
		}
	}
	names := make([][]byte, 0, len(f.To))
	if len(f.To) > 1 {
		for _, to := range f.To {
			names = append(names, sockaddr(to))
		}
	}

	batch := newBatch(f.Burst, f.Size)
	start := time.Now()
	source, next := 0, 0 // next destination of the source
	for ctx.Err() == nil && (f.Packets == 0 || sent < f.Packets) {
		count := f.Burst
		if f.Packets > 0 {
			count = min(count, f.Packets-sent)
		}
		if len(names) > 0 {
			count = min(count, len(names)-next)
		}
		for i := range count {
			binary.BigEndian.PutUint64(batch.buffers[i*f.Size:], uint64(sent+i))
			if len(names) > 0 {
				batch.name(i, names[next+i])
			}
		}
		n, err := batch.send(sources[source], count)
		sent += n
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return sent, err
		}
		if next += count; next >= len(names) {
			source, next = (source+1)%f.Sources, 0
		}
		if f.Rate > 0 {
			ahead := time.Duration(sent)*time.Second/time.Duration(f.Rate) - time.Since(start)
			if ahead > time.Millisecond {
				sleep(ctx, ahead)
			}
		}
	}
	return sent, nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Sink counts UDP packets that arrive at a port.
type Sink struct {
	addr4, addr6   netip.AddrPort
	packets, bytes atomic.Uint64
}

// StartSink starts counting on a UDP port of the host, both families. The lab stops it on Close.
func (h *Host) StartSink(ctx context.Context, port uint16) (*Sink, error) {
	c, err := h.ListenUDP(ctx, "udp", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, fmt.Errorf("starting a sink on %s: %w", h.name, err)
	}
	raw, err := c.SyscallConn()
	if err == nil {
		// The usual limit, rmem_max, loses packets whenever this process is not running; root may exceed it.
		raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting a sink on %s: %w", h.name, err), c.Close())
	}
	port = uint16(c.LocalAddr().(*net.UDPAddr).Port)
	s := &Sink{addr4: netip.AddrPortFrom(h.Addr4(), port), addr6: netip.AddrPortFrom(h.Addr6(), port)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		batch := newBatch(64, 2048)
		for {
			packets, bytes, err := batch.receive(raw)
			s.packets.Add(uint64(packets))
			s.bytes.Add(uint64(bytes))
			if errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	stop := func() error {
		err := c.Close()
		<-done
		return err
	}
	if _, ok := h.lab.onClose(stop); !ok {
		return nil, errors.Join(errClosed, stop())
	}
	return s, nil
}

// Addr4 is where the sink listens.
func (s *Sink) Addr4() netip.AddrPort { return s.addr4 }

// Addr6 is the same in IPv6.
func (s *Sink) Addr6() netip.AddrPort { return s.addr6 }

// Received returns how many packets and bytes of payload have arrived.
func (s *Sink) Received() (packets, bytes uint64) { return s.packets.Load(), s.bytes.Load() }

// Bulk is a TCP server that sends or takes bytes without end, as the client's first byte says.
type Bulk struct {
	addr4, addr6 netip.AddrPort
	received     atomic.Uint64

	mu     sync.Mutex
	closed bool
	conns  map[*net.TCPConn]bool
}

const (
	askDownload = 'd'
	askUpload   = 'u'
)

// StartBulk starts a bulk server on a port of the host, both families. The lab stops it on Close.
func (h *Host) StartBulk(ctx context.Context, port uint16) (*Bulk, error) {
	l, err := h.Listen(ctx, "tcp", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, fmt.Errorf("starting a bulk server on %s: %w", h.name, err)
	}
	port = uint16(l.Addr().(*net.TCPAddr).Port)
	b := &Bulk{
		addr4: netip.AddrPortFrom(h.Addr4(), port),
		addr6: netip.AddrPortFrom(h.Addr6(), port),
		conns: make(map[*net.TCPConn]bool),
	}
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			if !b.track(c, true) {
				return
			}
			tasks.Go(func() {
				defer b.track(c, false)
				b.serve(c)
			})
		}
	})
	stop := func() error {
		err := l.Close()
		b.mu.Lock()
		b.closed = true
		for c := range b.conns {
			c.Close()
		}
		b.mu.Unlock()
		tasks.Wait()
		return err
	}
	if _, ok := h.lab.onClose(stop); !ok {
		return nil, errors.Join(errClosed, stop())
	}
	return b, nil
}

// track remembers a connection for the end, or closes and forgets it.
func (b *Bulk) track(c *net.TCPConn, begin bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if begin && !b.closed {
		b.conns[c] = true
		return true
	}
	delete(b.conns, c)
	c.Close()
	return false
}

func (b *Bulk) serve(c *net.TCPConn) {
	var ask [1]byte
	if _, err := c.Read(ask[:]); err != nil {
		return
	}
	switch ask[0] {
	case askDownload:
		push(c)
	case askUpload:
		discard(c, func(n int) { b.received.Add(uint64(n)) })
	}
}

// Addr4 is where the server listens.
func (b *Bulk) Addr4() netip.AddrPort { return b.addr4 }

// Addr6 is the same in IPv6.
func (b *Bulk) Addr6() netip.AddrPort { return b.addr6 }

// Received is how many bytes all uploads have brought.
func (b *Bulk) Received() uint64 { return b.received.Load() }

// Download receives from a Bulk server over c until ctx ends, and returns the bytes that arrived.
func Download(ctx context.Context, c *net.TCPConn) (received int64, err error) {
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := c.Write([]byte{askDownload}); err != nil {
		return 0, err
	}
	err = discard(c, func(n int) { received += int64(n) })
	if ctx.Err() != nil {
		err = nil
	}
	return received, err
}

// Upload sends to a Bulk server over c until ctx ends, and returns the bytes that the kernel took.
func Upload(ctx context.Context, c *net.TCPConn) (sent int64, err error) {
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := c.Write([]byte{askUpload}); err != nil {
		return 0, err
	}
	sent, err = push(c)
	if ctx.Err() != nil {
		err = nil
	}
	return sent, err
}

// PingPong sends size bytes over c, which leads to an Echo server, waits until they are back, and does so times times.
// It returns the durations in ascending order.
func PingPong(ctx context.Context, c net.Conn, size, times int) ([]time.Duration, error) {
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	message, answer := make([]byte, size), make([]byte, size)
	took := make([]time.Duration, 0, times)
	for i := range times {
		start := time.Now()
		if _, err := c.Write(message); err != nil {
			return nil, fmt.Errorf("round trip %d: %w", i+1, err)
		}
		for n := 0; n < size; {
			got, err := c.Read(answer[n:])
			if err != nil {
				return nil, fmt.Errorf("round trip %d: %w", i+1, err)
			}
			n += got
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took, nil
}

func push(c *net.TCPConn) (sent int64, err error) {
	block := make([]byte, 256<<10)
	for {
		n, err := c.Write(block)
		sent += int64(n)
		if err != nil {
			return sent, err
		}
	}
}

// discard takes bytes off a connection without copying them, which MSG_TRUNC does for TCP (tcp(7)), until it ends.
func discard(c *net.TCPConn, count func(int)) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var n uintptr
		var errno syscall.Errno
		err := raw.Read(func(fd uintptr) bool {
			n, _, errno = unix.Syscall6(unix.SYS_RECVFROM, fd, 0, 1<<20, unix.MSG_TRUNC|unix.MSG_DONTWAIT, 0, 0)
			return errno != unix.EAGAIN
		})
		switch {
		case err != nil:
			return err
		case errno == unix.EINTR:
		case errno != 0:
			return errno
		case n == 0:
			return nil
		default:
			count(int(n))
		}
	}
}

func connect(c syscall.RawConn, to netip.AddrPort) error {
	name := sockaddr(to)
	var errno syscall.Errno
	err := c.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&name[0])), uintptr(len(name)))
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// sockaddr is the address as the kernel takes it, without a zone.
func sockaddr(a netip.AddrPort) []byte {
	if a.Addr().Is4() {
		s := &unix.RawSockaddrInet4{Family: unix.AF_INET, Port: htons(a.Port()), Addr: a.Addr().As4()}
		return unsafe.Slice((*byte)(unsafe.Pointer(s)), unix.SizeofSockaddrInet4)
	}
	s := &unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: htons(a.Port()), Addr: a.Addr().As16()}
	return unsafe.Slice((*byte)(unsafe.Pointer(s)), unix.SizeofSockaddrInet6)
}

// batch is a vector of messages for sendmmsg(2) and recvmmsg(2), one buffer each.
type batch struct {
	messages []mmsghdr
	vectors  []unix.Iovec
	buffers  []byte
}

type mmsghdr struct {
	header unix.Msghdr
	length uint32
}

func newBatch(count, size int) *batch {
	b := &batch{
		messages: make([]mmsghdr, count),
		vectors:  make([]unix.Iovec, count),
		buffers:  make([]byte, count*size),
	}
	for i := range count {
		b.vectors[i].Base = &b.buffers[i*size]
		b.vectors[i].SetLen(size)
		b.messages[i].header.Iov = &b.vectors[i]
		b.messages[i].header.SetIovlen(1)
	}
	return b
}

func (b *batch) name(i int, sockaddr []byte) {
	b.messages[i].header.Name = &sockaddr[0]
	b.messages[i].header.Namelen = uint32(len(sockaddr))
}

// send sends the first count messages and returns how many the kernel took. That the other side refuses packets is
// not an error of the sender.
func (b *batch) send(c syscall.RawConn, count int) (sent int, err error) {
	for sent < count {
		n, err := b.call(c.Write, unix.SYS_SENDMMSG, b.messages[sent:count])
		if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

func (b *batch) receive(c syscall.RawConn) (packets, bytes int, err error) {
	n, err := b.call(c.Read, unix.SYS_RECVMMSG, b.messages)
	for _, m := range b.messages[:n] {
		bytes += int(m.length)
	}
	return n, bytes, err
}

func (b *batch) call(ready func(func(uintptr) bool) error, number uintptr, messages []mmsghdr) (int, error) {
	var n uintptr
	var errno syscall.Errno
	err := ready(func(fd uintptr) bool {
		n, _, errno = unix.Syscall6(number, fd, uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)),
			unix.MSG_DONTWAIT, 0, 0)
		return errno != unix.EAGAIN
	})
	runtime.KeepAlive(b)
	if err != nil {
		return 0, err
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
