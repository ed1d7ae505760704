package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/admin"
	"sidegate/appliance/lab"
)

var perDatagram = Quantity{"the daemon's processor time for a proxied UDP packet of 64 bytes", "µs", "a relay of one packet per system call"}

// relaying measures what the daemon spends on a proxied UDP packet, and beside it the simplest of relays: one thread
// that receives a packet, adds the same header and sends it, for one flow.
func relaying(ctx context.Context, b *bench) (_ []*Figure, err error) {
	sink, err := b.upstream.StartSink(ctx, 0)
	if err != nil {
		return nil, err
	}
	upstream, err := startUpstream(ctx, b.upstream, sink.Addr4())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, upstream.close()) }()
	simple, err := startRelay(ctx, b.plain, sink.Addr4())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, simple.close()) }()
	to := netip.AddrPortFrom(b.abroad.Addr4(), 9)

	var figures []*Figure
	for _, row := range []struct {
		name           string
		sources, burst int
	}{
		{"1 flow", 1, 32},
		{"512 flows, in trains of 32", 512, 32},
		{"512 flows, interleaved", 512, 1},
	} {
		f := &Figure{Name: row.name, Quantity: perDatagram, Target: "< 12", Most: 1}
		// The same ports each time: the sessions at the upstream proxy are there after the first.
		flood := lab.Flood{To: []netip.AddrPort{to}, Sources: row.sources, Burst: row.burst, Port: 10000}
		if err := b.start(ctx, b.proxied("socks5://"+upstream.address.String())); err != nil {
			return nil, err
		}
		if err := b.beginFlows(ctx, flood); err != nil {
			return nil, err
		}
		daemon := func(ctx context.Context) (float64, error) {
			return b.perPacket(ctx, sink, flood, func() (time.Duration, error) { return processorTime(b.gateway.Pid()) })
		}
		beside := func(ctx context.Context) (float64, error) {
			return b.perPacket(ctx, sink, lab.Flood{To: []netip.AddrPort{simple.address}}, simple.used)
		}
		if err := f.alternate(ctx, b.pairs, b.through(b.sidegate, daemon), b.through(b.plain, beside)); err != nil {
			return nil, err
		}
		figures = append(figures, f)
	}
	return figures, nil
}

// beginFlows sends a little until the daemon relays every flow of the flood.
func (b *bench) beginFlows(ctx context.Context, f lab.Flood) error {
	if err := via(b.laptop, b.sidegate); err != nil {
		return err
	}
	client := admin.NewClient(b.gateway.Socket)
	f.Packets, f.Burst, f.Rate = f.Sources, 1, 2000
	return lab.Wait(ctx, fmt.Sprintf("%d flows to be relayed", f.Sources), func() error {
		if _, err := b.laptop.Flood(ctx, f); err != nil {
			return err
		}
		now, err := client.Status(ctx)
		if err == nil && now.Proxy.Flows < f.Sources {
			err = fmt.Errorf("%d are", now.Proxy.Flows)
		}
		return err
	})
}

// perPacket floods for a window and divides the time that was used by the packets that arrived, in µs.
func (b *bench) perPacket(ctx context.Context, sink *lab.Sink, f lab.Flood, used func() (time.Duration, error)) (float64, error) {
	var before time.Duration
	arrived, _, err := b.flood(ctx, f, sink, func() (err error) {
		before, err = used()
		return err
	})
	if err != nil {
		return 0, err
	}
	after, err := used()
	return float64((after - before).Nanoseconds()) / 1e3 / float64(arrived), err
}

// upstream is a SOCKS5 server (RFC 1928) that knows UDP ASSOCIATE only, and whose relay is a sink: it takes whatever
// comes, so that the daemon is what is measured and not dante, which handles one packet per system call too.
type upstream struct {
	address  netip.AddrPort
	listener *net.TCPListener
	tasks    sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  []net.Conn
}

func startUpstream(ctx context.Context, h *lab.Host, relay netip.AddrPort) (*upstream, error) {
	l, err := h.Listen(ctx, "tcp", ":0")
	if err != nil {
		return nil, err
	}
	u := &upstream{
		address:  netip.AddrPortFrom(h.Addr4(), uint16(l.Addr().(*net.TCPAddr).Port)),
		listener: l,
	}
	u.tasks.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil || !u.keep(c) {
				return
			}
			u.tasks.Go(func() { associate(c, relay) })
		}
	})
	return u, nil
}

func (u *upstream) keep(c net.Conn) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		c.Close()
		return false
	}
	u.conns = append(u.conns, c)
	return true
}

func (u *upstream) close() error {
	u.mu.Lock()
	u.closed = true
	for _, c := range u.conns {
		c.Close()
	}
	u.mu.Unlock()
	err := u.listener.Close()
	u.tasks.Wait()
	return err
}

// associate answers the greeting and one request, then holds the association until the client goes.
func associate(c net.Conn, relay netip.AddrPort) {
	const version, ipv4 = 5, 1
	defer c.Close()
	buffer := make([]byte, 512)
	answers := [][]byte{
		{version, 0}, // no authentication
		append(append([]byte{version, 0, 0, ipv4}, relay.Addr().AsSlice()...), byte(relay.Port()>>8), byte(relay.Port())),
	}
	for _, answer := range answers {
		if _, err := c.Read(buffer); err != nil {
			return
		}
		if _, err := c.Write(answer); err != nil {
			return
		}
	}
	c.Read(buffer)
}

// relay is the simplest there can be.
type relay struct {
	address netip.AddrPort
	in, out int
	done    chan struct{}
	thread  chan int // its id, then nothing
	id      int
}

const socksHeader = 10 // bytes before each packet, for an IPv4 destination

func startRelay(ctx context.Context, h *lab.Host, to netip.AddrPort) (_ *relay, err error) {
	r := &relay{done: make(chan struct{}), thread: make(chan int, 1)}
	err = h.Do(func() error {
		if r.in, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if r.out, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(r.in, &unix.SockaddrInet4{Addr: h.Addr4().As4()}),
			unix.SetsockoptInt(r.in, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
			unix.Connect(r.out, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}),
		)
	})
	if err != nil {
		return nil, err
	}
	name, err := unix.Getsockname(r.in)
	if err != nil {
		return nil, err
	}
	r.address = netip.AddrPortFrom(h.Addr4(), uint16(name.(*unix.SockaddrInet4).Port))
	go r.serve()
	r.id = <-r.thread
	return r, nil
}

// serve owns a thread, whose processor time is the relay's.
func (r *relay) serve() {
	defer close(r.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r.thread <- unix.Gettid()
	packet := make([]byte, 2048)
	for {
		n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(r.in), uintptr(unsafe.Pointer(&packet[socksHeader])), uintptr(len(packet)-socksHeader))
		if errno != 0 || n == 0 { // 0: it was shut down
			return
		}
		unix.Syscall(unix.SYS_WRITE, uintptr(r.out), uintptr(unsafe.Pointer(&packet[0])), n+socksHeader)
	}
}

// used is the processor time of the relay's thread.
func (r *relay) used() (time.Duration, error) {
	const scheduler, perThread = 2, 4 // CPUCLOCK_SCHED, CPUCLOCK_PERTHREAD_MASK
	var t unix.Timespec
	err := unix.ClockGettime(int32(^r.id)<<3|scheduler|perThread, &t)
	return time.Duration(t.Nano()), err
}

// close wakes the thread by a shutdown, which even an unconnected UDP socket obeys, and waits for it.
func (r *relay) close() error {
	unix.Shutdown(r.in, unix.SHUT_RD)
	<-r.done
	return errors.Join(unix.Close(r.in), unix.Close(r.out))
}
