package datapath

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// inNamespace gives the test a network namespace of its own. The test's goroutine stays on its thread; the
// thread ends with it, and the namespace with the thread. Subtests run elsewhere: tests loop over their cases.
func inNamespace(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes a network namespace and loads BPF programs")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("bringing lo up: %v", err)
	}
}

// veth adds a pair; the programs attach to the first.
func veth(t testing.TB, name string) Interface {
	t.Helper()
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatalf("adding %s: %v", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return Interface{Name: name, Index: l.Attrs().Index, Ethernet: true}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, dir string) *Datapath {
	t.Helper()
	d, err := Open(context.Background(), Options{StateDir: dir, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// opened is a datapath in its own namespace, removed with the test.
func opened(t testing.TB) *Datapath {
	t.Helper()
	inNamespace(t)
	d := open(t, t.TempDir()+"/state")
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return d
}

func apply(t testing.TB, d *Datapath, want Desired) {
	t.Helper()
	if err := d.Apply(context.Background(), want); err != nil {
		t.Fatal(err)
	}
}

// rule parses a rule as a configuration would: key, values, key, values; "!key" stands under not.
func rule(t testing.TB, name, outbound string, conditions ...string) policy.Rule {
	t.Helper()
	r := policy.Rule{Name: name, Outbound: outbound}
	for i := 0; i < len(conditions); i += 2 {
		key, not := conditions[i], false
		if key[0] == '!' {
			key, not = key[1:], true
		}
		f, ok := policy.LookupField(key)
		if !ok {
			t.Fatalf("no field %q", key)
		}
		c, err := f.Parse(conditions[i+1])
		if err != nil {
			t.Fatal(err)
		}
		if not {
			r.Not = append(r.Not, c)
		} else {
			r.Is = append(r.Is, c)
		}
	}
	return r
}

// programs are the loaded generation's, to be run on packets without a network.
func (d *Datapath) run(t testing.TB, packet []byte) result {
	t.Helper()
	return runProgram(t, d.generation.objects.LanEthernet, packet)
}

type result struct {
	code int32
	mark uint32
	data []byte
}

// runProgram passes a packet to a program as if it had arrived.
func runProgram(t testing.TB, p *ebpf.Program, packet []byte) result {
	t.Helper()
	return runMarked(t, p, packet, 0)
}

func runMarked(t testing.TB, p *ebpf.Program, packet []byte, mark uint32) result {
	t.Helper()
	var after skBuff
	out := make([]byte, len(packet)+256)
	o := ebpf.RunOptions{Data: packet, DataOut: out, Context: skBuff{Mark: mark}, ContextOut: &after}
	code, err := p.Run(&o)
	if err != nil {
		t.Fatalf("running the program: %v", err)
	}
	return result{int32(code), after.Mark, o.DataOut}
}

// skBuff is struct __sk_buff as far as the tests look at it, and as long as the kernel wants it.
type skBuff struct {
	Len, PktType, Mark uint32
	_                  [45]uint32
}

func (d *Datapath) drops(t testing.TB, reason gatewayReason) uint64 {
	t.Helper()
	n, err := perCPUSum(d.state.maps.Drops, uint32(reason))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// flow is the table's entry for the packet's flow.
func (d *Datapath) flow(t testing.TB, f policy.Flow, protocol uint8) (gatewayFlow, bool) {
	t.Helper()
	key := gatewayFlowKey{
		Source: addressOf(f.Source.Addr()), Destination: addressOf(f.Destination.Addr()),
		SourcePort: bigEndian(f.Source.Port()), DestinationPort: bigEndian(f.Destination.Port()),
		Protocol: protocol,
	}
	var v gatewayFlow
	for _, table := range d.state.flowTables() {
		if table.Lookup(key, &v) == nil {
			return v, true
		}
	}
	return v, false
}

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// rawSender brings both ends of a veth up and sends frames from its peer, addressed to it.
func rawSender(t testing.TB, name string) func([]byte) {
	t.Helper()
	var ends [2]netlink.Link
	for i, end := range []string{name, name + "-peer"} {
		l, err := netlink.LinkByName(end)
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = l
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	to := &unix.SockaddrLinklayer{Ifindex: ends[1].Attrs().Index}
	return func(frame []byte) {
		t.Helper()
		copy(frame, ends[0].Attrs().HardwareAddr)
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			t.Fatalf("sending a frame of %d bytes: %v", len(frame), err)
		}
	}
}
