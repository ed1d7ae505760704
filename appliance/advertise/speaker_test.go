package advertise

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/ndp"
)

var (
	eth0 = Interface{Name: "eth0", Index: 2, MAC: [6]byte{2, 0, 0xc0, 0xa8, 0, 2}, Address: netip.MustParseAddr("fe80::c0ff:fea8:2"), DNS: true}
	main = netip.MustParseAddr("fe80::c0ff:fea8:1")
)

// TestAdvertisement: byte for byte, and as the library reads it.
func TestAdvertisement(t *testing.T) {
	for _, c := range []struct {
		lifetime time.Duration
		dns      bool
		says     consensus
		want     string // ICMPv6 header, flags and lifetime; options
	}{
		{Lifetime, true, consensus{}, "8600 0000 0008 0708 00000000 00000000 0101 0200c0a80002 1903 0000 00000708 fe80000000000000 0000c0fffea80002"},
		{Lifetime, false, consensus{true, true}, "8600 0000 00c8 0708 00000000 00000000 0101 0200c0a80002 1903 0000 00000000 fe80000000000000 0000c0fffea80002"},
		{0, true, consensus{}, "8600 0000 0000 0000 00000000 00000000 0101 0200c0a80002 1903 0000 00000000 fe80000000000000 0000c0fffea80002"},
	} {
		i := eth0
		i.DNS = c.dns
		got, err := i.advertisement(c.lifetime, c.says)
		if err != nil {
			t.Fatal(err)
		}
		if want, _ := hex.DecodeString(strings.ReplaceAll(c.want, " ", "")); !bytes.Equal(got, want) {
			t.Errorf("%+v:\n%x, want\n%x", c, got, want)
		}
		m, err := ndp.ParseMessage(got)
		if ra, ok := m.(*ndp.RouterAdvertisement); err != nil || !ok || ra.RouterLifetime != c.lifetime || (ra.RouterSelectionPreference == ndp.High) != (c.lifetime > 0) {
			t.Errorf("read back: %+v, %v", m, err)
		}
	}
}

// TestParse: what did not come from the LAN, or is not in order, is nothing.
func TestParse(t *testing.T) {
	solicitation, _ := ndp.MarshalMessage(&ndp.RouterSolicitation{})
	named, _ := ndp.MarshalMessage(&ndp.RouterSolicitation{Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: eth0.MAC[:]}}})
	advertisement, _ := eth0.advertisement(Lifetime, consensus{})
	code := bytes.Clone(solicitation)
	code[1] = 1
	global := netip.MustParseAddr("2001:db8::1")
	for _, c := range []struct {
		name    string
		message []byte
		from    netip.Addr
		limit   int
		ok      bool
	}{
		{"solicitation", solicitation, main, 255, true},
		{"solicitation without an address", solicitation, netip.IPv6Unspecified(), 255, true},
		{"solicitation without an address that names a MAC address", named, netip.IPv6Unspecified(), 255, false},
		{"forwarded", solicitation, main, 254, false},
		{"code", code, main, 255, false},
		{"short", solicitation[:7], main, 255, false},
		{"advertisement", advertisement, main, 255, true},
		{"advertisement of a global address", advertisement, global, 255, false},
		{"cut option", advertisement[:len(advertisement)-1], main, 255, false},
		{"empty", nil, main, 255, false},
	} {
		if got := parse(c.message, c.from, c.limit); (got != nil) != c.ok {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// fake is a wire in memory, which takes the time of a synctest bubble.
type fake struct {
	in   chan incomingBytes
	gone chan struct{}
	once sync.Once

	mu   sync.Mutex
	sent []sent
	fail error
}

type incomingBytes struct {
	message []byte
	from    netip.Addr
	limit   int
}

type sent struct {
	at      time.Time
	message ndp.Message
	to      netip.Addr
}

func newFake() *fake { return &fake{in: make(chan incomingBytes), gone: make(chan struct{})} }

func (f *fake) send(b []byte, to netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	m, err := ndp.ParseMessage(b)
	f.sent = append(f.sent, sent{time.Now(), m, to})
	return err
}

func (f *fake) receive(b []byte) (int, netip.Addr, int, error) {
	select {
	case m := <-f.in:
		return copy(b, m.message), m.from, m.limit, nil
	case <-f.gone:
		return 0, netip.Addr{}, 0, net.ErrClosed
	}
}

func (f *fake) Close() error {
	f.once.Do(func() { close(f.gone) })
	return nil
}

func (f *fake) hear(t *testing.T, m ndp.Message, from netip.Addr) {
	t.Helper()
	b, err := ndp.MarshalMessage(m)
	if err != nil {
		t.Fatal(err)
	}
	f.in <- incomingBytes{b, from, 255}
	synctest.Wait()
}

// advertisements are those that were sent since the last call.
func (f *fake) advertisements() (all []*ndp.RouterAdvertisement, at []time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sent {
		if ra, ok := s.message.(*ndp.RouterAdvertisement); ok && s.to == allNodes {
			all, at = append(all, ra), append(at, s.at)
		}
	}
	f.sent = nil
	return all, at
}

// stage runs an Advertiser on fake wires in a bubble of synctest.
type stage struct {
	*Advertiser
	wires    map[int]*fake
	mu       sync.Mutex
	problems map[string]string
	stop     func(cause error)
}

func newStage(t *testing.T) *stage {
	s := &stage{wires: map[int]*fake{}, problems: map[string]string{}}
	s.Advertiser = New(Options{Log: slog.New(slog.DiscardHandler), Report: func(name string, problem error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if problem == nil {
			delete(s.problems, name)
			return
		}
		s.problems[name] = problem.Error()
	}})
	s.open = func(i Interface) (wire, error) {
		s.wires[i.Index] = newFake()
		return s.wires[i.Index], nil
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan struct{})
	s.stop = func(cause error) {
		cancel(cause)
		<-ended
	}
	go func() {
		defer close(ended)
		s.Run(ctx)
	}()
	<-s.Ready()
	t.Cleanup(func() { s.stop(nil) })
	return s
}

func (s *stage) problem(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problems[name]
}

// TestSeries: three at once, three seconds apart, then one every 30 to 60 seconds, all to all nodes.
func TestSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.Set([]Interface{eth0})
		begun := time.Now()
		time.Sleep(10 * time.Minute)
		_, at := s.wires[2].advertisements()
		if len(at) < 12 || at[0].Sub(begun) != begin {
			t.Fatalf("%d in ten minutes, the first after %s", len(at), at[0].Sub(begun))
		}
		for i := 1; i < len(at); i++ {
			if gap := at[i].Sub(at[i-1]); i < initial && gap != least || i >= initial && (gap < shortest || gap > longest) {
				t.Errorf("number %d after %s", i+1, gap)
			}
		}
		if !s.Advertised(2) || s.Advertised(3) {
			t.Error("the status is wrong")
		}
	})
}

// TestFlood: who asks is answered within half a second and the three between any two, and a hundred thousand questions
// have no more answers than that.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.Set([]Interface{eth0})
		time.Sleep(20 * time.Second) // between two of the ordinary ones
		w := s.wires[2]
		w.advertisements()
		asked := time.Now()
		w.hear(t, &ndp.RouterSolicitation{}, main)
		time.Sleep(mostDelay)
		if _, at := w.advertisements(); len(at) != 1 || at[0].Sub(asked) > mostDelay {
			t.Fatalf("answers: %v", at)
		}
		for range 100_000 {
			w.hear(t, &ndp.RouterSolicitation{}, main)
			time.Sleep(time.Millisecond)
		}
		_, at := w.advertisements()
		if len(at) < 25 || len(at) > 34 {
			t.Errorf("%d answers in 100 s", len(at))
		}
		for i := 1; i < len(at); i++ {
			if gap := at[i].Sub(at[i-1]); gap < least {
				t.Errorf("%s between two", gap)
			}
		}
	})
}

// TestWithdraw: on a stop, when an interface leaves and when its address changes, three times; not for a successor.
func TestWithdraw(t *testing.T) {
	lifetimes := func(w *fake) (out []time.Duration) {
		all, _ := w.advertisements()
		for _, ra := range all {
			out = append(out, ra.RouterLifetime)
		}
		return out
	}
	gone := []time.Duration{0, 0, 0}
	moved := eth0
	moved.Address = main
	for _, c := range []struct {
		name string
		do   func(*stage)
		want []time.Duration
	}{
		{"stop", func(s *stage) { s.stop(nil) }, gone},
		{"leave", func(s *stage) { s.stop(errors.New("a successor")) }, nil},
		{"leaves the set", func(s *stage) { s.Set(nil) }, gone},
		{"another address", func(s *stage) { s.Set([]Interface{moved}) }, gone},
		{"the same", func(s *stage) { s.Set([]Interface{eth0}) }, nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t)
			s.Set([]Interface{eth0})
			time.Sleep(20 * time.Second)
			w := s.wires[2]
			w.advertisements()
			c.do(s)
			synctest.Wait()
			if got := lifetimes(w); !slices.Equal(got, c.want) {
				t.Errorf("%s: %v, want %v", c.name, got, c.want)
			}
		})
	}
}

// TestTwo: each LAN has its own, and one that leaves costs the other nothing.
func TestTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		eth1 := Interface{Name: "eth1", Index: 3, MAC: [6]byte{2, 0, 0, 0, 0, 3}, Address: netip.MustParseAddr("fe80::3")}
		s.Set([]Interface{eth0, eth1})
		time.Sleep(20 * time.Second)
		s.wires[2].advertisements()
		s.wires[3].advertisements()
		s.Set([]Interface{eth1})
		if all, _ := s.wires[2].advertisements(); len(all) != 3 || all[0].RouterLifetime != 0 {
			t.Errorf("the one that left: %v", all)
		}
		time.Sleep(longest)
		if all, _ := s.wires[3].advertisements(); len(all) == 0 || all[0].RouterLifetime != Lifetime {
			t.Errorf("the one that stayed: %v", all)
		}
		if s.Advertised(2) || !s.Advertised(3) {
			t.Error("the status is wrong")
		}
	})
}

// TestChange: another MAC address, or no DNS any more, is told at once.
func TestChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.Set([]Interface{eth0})
		time.Sleep(20 * time.Second)
		w := s.wires[2]
		w.advertisements()
		next := eth0
		next.MAC[5], next.DNS = 9, false
		s.Set([]Interface{next})
		time.Sleep(time.Millisecond)
		all, _ := w.advertisements()
		if len(all) != 1 {
			t.Fatalf("%d advertisements", len(all))
		}
		want := []ndp.Option{
			&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: net.HardwareAddr(next.MAC[:])},
			&ndp.RecursiveDNSServer{Servers: []netip.Addr{eth0.Address}},
		}
		if !reflect.DeepEqual(all[0].Options, want) {
			t.Errorf("%v", all[0].Options)
		}
	})
}

// TestRouters: the main router's flags are repeated, its high preference is a problem until it ends, and invented
// routers are bounded.
func TestRouters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.Set([]Interface{eth0})
		time.Sleep(20 * time.Second)
		w := s.wires[2]
		w.advertisements()
		w.hear(t, &ndp.RouterAdvertisement{ManagedConfiguration: true, RouterLifetime: time.Minute, RouterSelectionPreference: ndp.High}, main)
		time.Sleep(time.Millisecond)
		if all, _ := w.advertisements(); len(all) != 1 || !all[0].ManagedConfiguration {
			t.Errorf("the flags are not repeated: %v", all)
		}
		if p := s.problem("eth0"); !strings.Contains(p, "the router fe80::c0ff:fea8:1 advertises itself with preference high") {
			t.Errorf("problem: %q", p)
		}
		time.Sleep(3 * time.Minute)
		if p := s.problem("eth0"); p != "" {
			t.Errorf("after its lifetime: %q", p)
		}
		for i := range 1000 {
			w.hear(t, &ndp.RouterAdvertisement{RouterLifetime: time.Hour, RouterSelectionPreference: ndp.High}, netip.MustParseAddr(fmt.Sprintf("fe80::%x", i+1)))
		}
		if n := strings.Count(s.problem("eth0"), "\n") + 1; n != maxRouters {
			t.Errorf("%d routers are remembered", n)
		}
	})
}

// TestFailures: what cannot be sent is told and tried again, and a wire that fails is replaced by the next Set.
func TestFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.Set([]Interface{eth0})
		w := s.wires[2]
		w.mu.Lock()
		w.fail = errors.New("no room")
		w.mu.Unlock()
		time.Sleep(2 * time.Second)
		if p := s.problem("eth0"); !strings.Contains(p, "eth0: sending a router advertisement: no room") || s.Advertised(2) {
			t.Errorf("problem: %q", p)
		}
		w.mu.Lock()
		w.fail = nil
		w.mu.Unlock()
		time.Sleep(least)
		if p := s.problem("eth0"); p != "" || !s.Advertised(2) {
			t.Errorf("problem: %q", p)
		}
		s.open = func(Interface) (wire, error) { return nil, errors.New("no socket") }
		s.Set(nil)
		s.Set([]Interface{eth0})
		if p := s.problem("eth0"); !strings.Contains(p, "no socket") {
			t.Errorf("problem: %q", p)
		}
		s.Set(nil)
		if p := s.problem("eth0"); p != "" {
			t.Errorf("problem of an interface that is none of ours any more: %q", p)
		}
	})
}
