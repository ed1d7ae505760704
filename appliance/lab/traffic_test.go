package lab

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestFlood sends known numbers of packets in known flows and finds each of them in a capture and at the sink.
func TestFlood(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	sink, err := l.Host(Server).StartSink(ctx, 9)
	if err != nil {
		t.Fatal(err)
	}
	ports := func(a netip.Addr, n int) (to []netip.AddrPort) {
		for i := range n {
			to = append(to, netip.AddrPortFrom(a, uint16(1000+i)))
		}
		return to
	}
	for _, test := range []struct {
		name         string
		flood        Flood
		flows, train int
	}{
		{"one flow", Flood{To: []netip.AddrPort{sink.Addr4()}, Packets: 1000}, 1, 1000},
		{"one flow, IPv6", Flood{To: []netip.AddrPort{sink.Addr6()}, Packets: 1000, Size: 1000}, 1, 1000},
		{"sources", Flood{To: []netip.AddrPort{sink.Addr4()}, Sources: 64, Burst: 1, Packets: 640}, 64, 10},
		{"destinations", Flood{To: ports(l.Host(Server).Addr4(), 700), Sources: 3, Packets: 4200}, 2100, 2},
		{"destinations, IPv6", Flood{To: ports(l.Host(Server).Addr6(), 700), Sources: 3, Packets: 2100}, 2100, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := l.Host(Server).Capture()
			if err != nil {
				t.Fatal(err)
			}
			before, beforeBytes := sink.Received()
			sent, err := l.Host(Laptop).Flood(ctx, test.flood)
			if err != nil || sent != test.flood.Packets {
				t.Fatalf("sent %d packets, %v, want %d", sent, err, test.flood.Packets)
			}
			size := max(test.flood.Size, 64)
			flows := make(map[[2]netip.AddrPort]uint64)
			header := 14 + 20 + 8
			if test.flood.To[0].Addr().Is6() {
				header += 20
			}
			for p, n := range c.All() {
				if p.Protocol != UDP || p.Out {
					continue
				}
				flows[[2]netip.AddrPort{p.Src, p.Dst}] += n.Packets
				if n.Largest != size+header || n.Bytes != n.Packets*uint64(size+header) {
					t.Fatalf("%s: %+v, want packets of %d bytes", p, n, size+header)
				}
			}
			if len(flows) != test.flows {
				t.Errorf("%d flows arrived, want %d", len(flows), test.flows)
			}
			for flow, n := range flows {
				if n != uint64(test.train) {
					t.Fatalf("flow %v has %d packets, want %d", flow, n, test.train)
				}
			}
			if sum, err := c.Close(); err != nil || sum.Packets < uint64(sent) {
				t.Errorf("the capture saw %d packets, %v", sum.Packets, err)
			}
			if len(test.flood.To) > 1 {
				return // not the sink's ports
			}
			err = Wait(ctx, "the sink to have all packets", func() error {
				packets, bytes := sink.Received()
				if packets-before != uint64(sent) || bytes-beforeBytes != uint64(sent*size) {
					return errors.New("some are missing")
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFloodRate keeps to a rate, and stops with its context.
func TestFloodRate(t *testing.T) {
	l := newLab(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	to := netip.AddrPortFrom(l.Host(Server).Addr4(), 9) // nobody listens: the refusals must not stop it
	const rate = 20000
	start := time.Now()
	sent, err := l.Host(Laptop).Flood(ctx, Flood{To: []netip.AddrPort{to}, Rate: rate})
	took := time.Since(start)
	// A busy machine may be late, but never early.
	if at := float64(sent) / took.Seconds(); err != nil || at > 1.01*rate || at < rate/4 {
		t.Errorf("sent %d packets in %v, %v: %.0f a second, want %d", sent, took, err, at, rate)
	}
}

// TestCaptureKeepsUp compares what a capture counts with what arrives, at the machine's full speed.
func TestCaptureKeepsUp(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	bulk, err := l.Host(Server).StartBulk(ctx, 5000)
	if err != nil {
		t.Fatal(err)
	}
	for name, transfer := range map[string]func(context.Context, *net.TCPConn) (int64, error){"download": Download, "upload": Upload} {
		t.Run(name, func(t *testing.T) {
			conn, err := l.Host(Laptop).Dial(ctx, "tcp", bulk.Addr4().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			c, err := l.Host(Laptop).Capture()
			if err != nil {
				t.Fatal(err)
			}
			received := bulk.Received()
			brief, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			n, err := transfer(brief, conn.(*net.TCPConn))
			if err != nil || n < 1<<20 {
				t.Fatalf("%d bytes, %v", n, err)
			}
			counted, err := c.Count(func(p Packet) bool { return p.Protocol == TCP && p.Out == (name == "upload") })
			if err != nil {
				t.Fatal(err)
			}
			// What is still in socket buffers has not passed, or has passed and was not read.
			const buffers = 16 << 20
			if d := int64(counted.Bytes) - n; d < -buffers || d > buffers+n/50 {
				t.Errorf("%d bytes counted, %d transferred", counted.Bytes, n)
			}
			t.Logf("%.1f Gb/s, %d bytes a packet", float64(n)*8/1e9, counted.Bytes/counted.Packets)
			if name == "upload" && bulk.Received()-received < uint64(n-buffers) {
				t.Errorf("the server received %d bytes of %d", bulk.Received()-received, n)
			}
		})
	}
	t.Run("small packets", func(t *testing.T) {
		c, err := l.Host(Laptop).Capture()
		if err != nil {
			t.Fatal(err)
		}
		brief, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		to := netip.AddrPortFrom(l.Host(Sidegate).Addr4(), 9)
		sent, err := l.Host(Laptop).Flood(brief, Flood{To: []netip.AddrPort{to}})
		if err != nil {
			t.Fatal(err)
		}
		counted, err := c.Count(To(to.Addr()))
		if err != nil || counted.Packets != uint64(sent) {
			t.Errorf("%d packets counted, %v, %d sent", counted.Packets, err, sent)
		}
		t.Logf("%d packets in a second", sent)
	})
}

// TestCaptureDrops keeps a capture from emptying its ring until packets are missed: counting must fail.
func TestCaptureDrops(t *testing.T) {
	l := newLab(t, Options{})
	c, err := l.Host(Laptop).Capture()
	if err != nil {
		t.Fatal(err)
	}
	const packets = slotCount + 5000
	to := netip.AddrPortFrom(l.Host(Sidegate).Addr4(), 9)
	c.mu.Lock()
	sent, err := l.Host(Laptop).Flood(brief(t), Flood{To: []netip.AddrPort{to}, Packets: packets})
	c.mu.Unlock()
	if err != nil || sent != packets {
		t.Fatalf("sent %d, %v", sent, err)
	}
	counted, err := c.Count(To(to.Addr()))
	drops, ok := errors.AsType[DropError](err)
	if !ok {
		t.Fatalf("counted %d of %d, and the error is %v", counted.Packets, sent, err)
	}
	if counted.Packets > slotCount || drops.Dropped < 5000 || drops.Where != "laptop/eth0" {
		t.Errorf("counted %d, error %+v", counted.Packets, drops)
	}
	if _, err := c.Close(); !errors.As(err, new(DropError)) {
		t.Errorf("Close says %v", err)
	}
}

// TestCaptureClose counts what passed right before the end.
func TestCaptureClose(t *testing.T) {
	l := newLab(t, Options{})
	to := netip.AddrPortFrom(l.Host(Sidegate).Addr4(), 9)
	for range 10 {
		c, err := l.Host(Laptop).Capture()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Host(Laptop).Flood(brief(t), Flood{To: []netip.AddrPort{to}, Packets: 100}); err != nil {
			t.Fatal(err)
		}
		sum, err := c.Close()
		again, errAgain := c.Count(To(to.Addr()))
		if err != nil || errAgain != nil || sum.Packets < 100 || again.Packets != 100 {
			t.Errorf("closed with %d packets, %v, then counted %d, %v, want 100", sum.Packets, err, again.Packets, errAgain)
		}
	}
}

func TestPingPong(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	echo, err := l.Host(Server).StartEcho(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Host(Laptop).Dial(ctx, "tcp", echo.Addr6().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	took, err := PingPong(ctx, conn, 100, 500)
	if err != nil || len(took) != 500 || took[0] <= 0 || took[0] > took[499] {
		t.Errorf("got %d durations, %v", len(took), err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := PingPong(ended, conn, 100, 500); err == nil {
		t.Error("a context that ended does not end it")
	}
}
