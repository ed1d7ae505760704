package datapath

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"sidegate/appliance/policy"
)

var laptop = policy.MAC{2, 0, 0, 0, 0, 0x10}

// from makes the packet the laptop's.
func from(mac policy.MAC, p packet) packet {
	p.mac = mac
	return p
}

func lessonOf(client, name, address string) Lesson {
	return Lesson{
		Client: netip.MustParseAddr(client), Names: []string{name},
		Addresses: []netip.Addr{netip.MustParseAddr(address)}, TTL: time.Minute,
	}
}

func learn(t testing.TB, d *Datapath, client, name, address string) {
	t.Helper()
	if err := d.Learn(t.Context(), lessonOf(client, name, address)); err != nil {
		t.Fatal(err)
	}
}

// verdictOf sends the flow's first packet, and forgets the flow.
func verdictOf(t testing.TB, d *Datapath, p packet) gatewayVerdict {
	t.Helper()
	d.run(t, p.bytes())
	f := policy.Flow{Source: p.src, Destination: p.dst}
	v, ok := d.flow(t, f, p.protocol)
	if !ok {
		t.Fatalf("no entry for %v → %v", p.src, p.dst)
	}
	key := gatewayFlowKey{
		Source: addressOf(p.src.Addr()), Destination: addressOf(p.dst.Addr()),
		SourcePort: bigEndian(p.src.Port()), DestinationPort: bigEndian(p.dst.Port()), Protocol: p.protocol,
	}
	for _, table := range d.state.flowTables() {
		_ = table.Delete(key) // it is in one of them
	}
	return gatewayVerdict(v.Verdict)
}

func namesPolicy(t testing.TB) *policy.Policy {
	return &policy.Policy{Default: "direct", Rules: []policy.Rule{
		rule(t, "bad", "block", "domain", "bad.test"),
		rule(t, "far", "hk", "domain_suffix", "far.test"),
	}}
}

// quicInitial looks like one to the programs.
func quicInitial(src, dst string) packet {
	p := udpPacket(src, dst)
	p.payload = quic(0xc0, 1, 1200)
	return p
}

// ask sends a question, so that its client's MAC is known. Of a fragment, for a whole one is assigned, which no test run can.
func ask(t testing.TB, d *Datapath, question packet) {
	t.Helper()
	question.fragment = &fragmentV{id: 7, more: true}
	if r := d.run(t, question.bytes()); r.mark != uint32(gatewayMarkMARK_PROXY) {
		t.Fatalf("the question of %v is not ours: code %d, mark %#x", question.src, r.code, r.mark)
	}
}

// TestNamesDecide: by client, then by anybody; and whoever asks over one family is known over the other.
func TestNamesDecide(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t), DNS: udpListener(t), Sniff: SniffAmbiguous})
	ask(t, d, from(laptop, udpPacket("192.168.0.3:5000", "8.8.8.8:53")))
	learn(t, d, "192.168.0.3", "www.far.test", "2001:db8::7")
	learn(t, d, "192.168.0.3", "www.far.test", "203.0.113.7")
	learn(t, d, "192.168.0.4", "near.test", "203.0.113.8")
	for what, c := range map[string]struct {
		packet packet
		want   gatewayVerdict
	}{
		"IPv4":                    {from(laptop, synPacket("192.168.0.3:5000", "203.0.113.7:443")), gatewayVerdictVERDICT_PROXY},
		"IPv6 of the same MAC":    {from(laptop, synPacket("[fd00::3]:5000", "[2001:db8::7]:443")), gatewayVerdictVERDICT_PROXY},
		"another client":          {from(policy.MAC{2, 1}, synPacket("192.168.0.9:5000", "203.0.113.7:443")), gatewayVerdictVERDICT_PROXY},
		"another address":         {from(laptop, synPacket("192.168.0.3:5000", "203.0.113.9:443")), gatewayVerdictVERDICT_DIRECT},
		"a name that no rule has": {from(laptop, synPacket("192.168.0.3:5000", "203.0.113.8:443")), gatewayVerdictVERDICT_DIRECT},
	} {
		if got := verdictOf(t, d, c.packet); got != c.want {
			t.Errorf("%s: verdict %d, want %d", what, got, c.want)
		}
	}
	learn(t, d, "192.168.0.9", "near.test", "203.0.113.7")
	alias := lessonOf("192.168.0.3", "www.far.test", "203.0.113.6")
	alias.Names = append(alias.Names, "edge.cdn.test")
	if err := d.Learn(t.Context(), alias); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		packet packet
		want   gatewayVerdict
	}{
		"its own name, whatever others know":    {from(laptop, synPacket("192.168.0.3:5000", "203.0.113.7:443")), gatewayVerdictVERDICT_PROXY},
		"a name with an alias that no rule has": {from(laptop, synPacket("192.168.0.3:5000", "203.0.113.6:443")), gatewayVerdictVERDICT_PROXY},
		"of two names of others":                {from(policy.MAC{2, 1}, synPacket("192.168.0.8:5000", "203.0.113.7:443")), gatewayVerdictVERDICT_SNIFF},
		"of two, in UDP that is no QUIC":        {from(policy.MAC{2, 1}, udpPacket("192.168.0.8:5000", "203.0.113.7:443")), gatewayVerdictVERDICT_PROXY},
		"of two, in what looks like QUIC":       {from(policy.MAC{2, 1}, quicInitial("192.168.0.8:5001", "203.0.113.7:443")), gatewayVerdictVERDICT_SNIFF},
		"of two, where an earlier rule is sure": {from(policy.MAC{2, 1}, synPacket("192.168.0.8:5000", "203.0.113.8:443")), gatewayVerdictVERDICT_DIRECT},
	} {
		if got := verdictOf(t, d, c.packet); got != c.want {
			t.Errorf("%s: verdict %d, want %d", what, got, c.want)
		}
	}
	if got := len(d.NamesOf(netip.MustParseAddr("192.168.0.3"), policy.MAC{}, netip.MustParseAddr("203.0.113.7"))); got != 1 {
		t.Errorf("the laptop has %d names for the address, want its own", got)
	}
	if got := len(d.NamesOf(netip.MustParseAddr("192.168.0.77"), policy.MAC{}, netip.MustParseAddr("203.0.113.7"))); got != 2 {
		t.Errorf("a stranger has %d names for the address, want those of all", got)
	}
}

// TestNamesOutliveTheDaemon: a client that does not ask again is decided by what it knew: while no daemon is there,
// after a restart, and by a policy that had no use for the name before.
func TestNamesOutliveTheDaemon(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir() + "/state"
	d := open(t, dir)
	apply(t, d, Desired{Policy: namesPolicy(t)})
	learn(t, d, "192.168.0.3", "www.far.test", "203.0.113.7")
	learn(t, d, "192.168.0.3", "later.test", "203.0.113.8")
	syn := synPacket("192.168.0.3:5000", "203.0.113.7:443")
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	defer d.Close()
	apply(t, d, Desired{Policy: namesPolicy(t)})
	if got := verdictOf(t, d, syn); got != gatewayVerdictVERDICT_PROXY {
		t.Errorf("after a restart: verdict %d", got)
	}
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(t, "later", "block", "domain", "later.test")}}})
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.8:443")); got != gatewayVerdictVERDICT_BLOCK {
		t.Errorf("after a reload: verdict %d", got)
	}
	if known := d.Names(); len(known) != 2 || known[0].Client != "192.168.0.3" {
		t.Errorf("known: %+v", known)
	}
}

// TestNamesLearnedDuringReloads: what was learned at any moment of a reload is known to the generation before and
// to the one after.
func TestNamesLearnedDuringReloads(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t)})
	ctx, stop := context.WithCancel(t.Context())
	learned := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for ; ctx.Err() == nil; learned++ {
			address := netip.AddrFrom4([4]byte{203, byte(learned >> 16), byte(learned >> 8), byte(learned)})
			if err := d.Learn(ctx, lessonOf("192.168.0.3", "www.far.test", address.String())); err != nil {
				t.Errorf("learning: %v", err)
				return
			}
		}
	})
	for range 15 {
		apply(t, d, Desired{Policy: namesPolicy(t)})
	}
	stop()
	wg.Wait()
	if learned < 1000 {
		t.Fatalf("only %d were learned meanwhile", learned)
	}
	for i := max(0, learned-maxClientPages); i < learned; i++ { // those before were forgotten
		address := netip.AddrFrom4([4]byte{203, byte(i >> 16), byte(i >> 8), byte(i)})
		if got := verdictOf(t, d, synPacket("192.168.0.3:5000", netip.AddrPortFrom(address, 443).String())); got != gatewayVerdictVERDICT_PROXY {
			t.Fatalf("%d of %d: verdict %d", i, learned, got)
		}
	}
}

// TestQuestions: DNS from the LAN goes to its listener, and leaves no flow behind.
func TestQuestions(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "block"}
	dns := udpListener(t)
	own := netip.MustParseAddr("192.168.0.2")
	want := Desired{Policy: p, DNS: dns, OwnAddresses: []netip.Addr{own}, Resolvers: []netip.Addr{netip.MustParseAddr("192.168.0.5")}}
	apply(t, d, want)
	for what, c := range map[string]struct {
		packet packet
		mark   gatewayMark
	}{
		"a public resolver":          {udpPacket("192.168.0.3:5000", "8.8.8.8:53"), gatewayMarkMARK_PROXY},
		"by IPv6":                    {udpPacket("[fd00::3]:5000", "[2001:4860::8]:53"), gatewayMarkMARK_PROXY},
		"the gateway itself":         {udpPacket("192.168.0.3:5000", "192.168.0.2:53"), gatewayMarkMARK_PROXY},
		"what our own upstream asks": {udpPacket("192.168.0.5:5000", "8.8.8.8:53"), gatewayMarkMARK_DIRECT},
		"our own upstream, by TCP":   {synPacket("192.168.0.5:5000", "8.8.8.8:53"), gatewayMarkMARK_DIRECT},
	} {
		if c.mark == gatewayMarkMARK_PROXY {
			c.packet.fragment = &fragmentV{id: 7, more: true} // a whole one is assigned, which no test run can
		}
		if r := d.run(t, from(laptop, c.packet).bytes()); r.code != tcxNext || r.mark != uint32(c.mark) {
			t.Errorf("%s: code %d, mark %#x, want %#x", what, r.code, r.mark, c.mark)
		}
	}
	want.ReturnPath = Symmetric
	apply(t, d, want)
	if r := d.run(t, udpPacket("192.168.0.5:5001", "8.8.8.8:53").bytes()); r.code != tcxNext || r.mark != uint32(gatewayMarkMARK_TRANSLATED) {
		t.Errorf("what our own upstream asks, where direct is translated: code %d, mark %#x", r.code, r.mark)
	}
	if r := d.run(t, synPacket("192.168.0.3:5000", "8.8.8.8:53").bytes()); r.code != tcxDrop {
		t.Errorf("TCP, for which nobody listens: code %d", r.code)
	}
	if flows, err := d.Flows(); err != nil || len(flows) != 0 {
		t.Errorf("questions left %d flows, %v", len(flows), err)
	}
	if mac, index := d.Asker(netip.MustParseAddr("192.168.0.3")); mac != laptop || index == 0 {
		t.Errorf("192.168.0.3 is %v, by %d", mac, index)
	}
	if mac, _ := d.Asker(netip.MustParseAddr("fd00::3")); mac != laptop {
		t.Errorf("fd00::3 is %v", mac)
	}

	want.ClientAsks = 3
	apply(t, d, want)
	dropped := d.drops(t, gatewayReasonREASON_DNS_RATE)
	for range 20 {
		d.run(t, udpPacket("192.168.0.66:5000", "8.8.8.8:53").bytes())
	}
	// the clock's second may have turned once or twice on a slow machine
	if n := d.drops(t, gatewayReasonREASON_DNS_RATE) - dropped; n < 11 || n > 17 {
		t.Errorf("%d of 20 questions over a rate of 3 were dropped", n)
	}

	want.DNS = Sockets{}
	apply(t, d, want)
	if got := verdictOf(t, d, udpPacket("192.168.0.3:5000", "8.8.8.8:53")); got != gatewayVerdictVERDICT_BLOCK {
		t.Errorf("without a DNS server: verdict %d", got)
	}
}

// TestQuestionsWithoutDaemon: names that somebody else answers would not be learned, so nobody answers; unless the
// owner prefers that to no network.
func TestQuestionsWithoutDaemon(t *testing.T) {
	d := opened(t)
	for _, c := range []struct {
		onFailure policy.Verdict
		code      int32
	}{{policy.Block, tcxDrop}, {policy.Direct, tcxNext}} {
		listener, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		apply(t, d, Desired{
			Policy: &policy.Policy{Default: "direct"}, DNS: Sockets{UDP4: listener.(*net.UDPConn)}, OnFailure: c.onFailure,
		})
		listener.Close()
		for what, p := range map[string]packet{"udp": udpPacket("192.168.0.3:5000", "8.8.8.8:53"), "tcp": synPacket("192.168.0.3:5000", "8.8.8.8:53")} {
			if r := d.run(t, p.bytes()); r.code != c.code {
				t.Errorf("on failure %s, %s: code %d, want %d", c.onFailure, what, r.code, c.code)
			}
		}
	}
}

// TestDecide: a flow to be sniffed becomes what the policy says of its name.
func TestDecide(t *testing.T) {
	d := opened(t)
	want := Desired{Policy: namesPolicy(t), Sockets: udpListener(t), Sniff: SniffUnknown}
	marks := map[ReturnPath]gatewayMark{Asymmetric: gatewayMarkMARK_DIRECT, Symmetric: gatewayMarkMARK_TRANSLATED}
	for i, c := range []struct {
		network  policy.Network
		name     string
		outbound string
		verdict  gatewayVerdict
	}{
		{policy.TCP, "www.far.test", "hk", gatewayVerdictVERDICT_PROXY},
		{policy.UDP, "www.far.test", "hk", gatewayVerdictVERDICT_PROXY},
		{policy.TCP, "near.test", "direct", gatewayVerdictVERDICT_PROXY}, // it is accepted already
		{policy.UDP, "near.test", "direct", gatewayVerdictVERDICT_DIRECT},
		{policy.TCP, "bad.test", "block", gatewayVerdictVERDICT_BLOCK},
		{policy.UDP, "bad.test", "block", gatewayVerdictVERDICT_BLOCK},
		{policy.TCP, "", "direct", gatewayVerdictVERDICT_PROXY},
		{policy.UDP, "", "direct", gatewayVerdictVERDICT_DIRECT},
		{policy.TCP, "www.near.test", "direct", gatewayVerdictVERDICT_PROXY},
		{policy.UDP, "www.near.test", "direct", gatewayVerdictVERDICT_DIRECT},
		{policy.TCP, "", "direct", gatewayVerdictVERDICT_PROXY},
		{policy.UDP, "", "direct", gatewayVerdictVERDICT_DIRECT},
	} {
		want.ReturnPath = ReturnPath(i / 2 % 2)
		apply(t, d, want)
		destination := fmt.Sprintf("203.0.113.%d:443", i+1)
		p := from(laptop, quicInitial("192.168.0.3:5000", destination))
		if c.network == policy.TCP {
			p = from(laptop, synPacket("192.168.0.3:5000", destination))
		}
		d.run(t, p.bytes())
		a, ok := d.Assigned(c.network, p.src, p.dst)
		if !ok || !a.Sniff {
			t.Fatalf("%s %q: not to be sniffed: %+v, %t", c.network, c.name, a, ok)
		}
		outbound, mark, err := d.Decide(a, c.name)
		flow, _ := d.flow(t, a.Facts, uint8(c.network))
		if err != nil || outbound != c.outbound || gatewayVerdict(flow.Verdict) != c.verdict {
			t.Errorf("%s %q: outbound %s, verdict %d, %v; want %s, %d", c.network, c.name, outbound, flow.Verdict, err, c.outbound, c.verdict)
		}
		if flow.Outbound != policy.OutboundID(c.outbound) || flow.Generation != d.Generation() || flow.Packets != 1 {
			t.Errorf("%s %q: the entry is %+v", c.network, c.name, flow)
		}
		if c.outbound == policy.OutboundDirect && (mark != uint32(marks[want.ReturnPath]) || flow.Mark != mark) {
			t.Errorf("%s %q: mark %#x", c.network, c.name, mark)
		}
		if _, _, err := d.Decide(a, "www.far.test"); err != nil {
			t.Error(err)
		}
		if again, _ := d.flow(t, a.Facts, uint8(c.network)); again.Verdict != flow.Verdict || again.Outbound != flow.Outbound {
			t.Errorf("%s %q: it was settled twice", c.network, c.name)
		}
	}
}

// TestDecidedNextTime: where first bytes are trusted, what went direct is the kernel's the next time. All else is
// looked at again.
func TestDecidedNextTime(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t), Sockets: udpListener(t), Sniff: SniffUnknown})
	visit := func(address, name string) (sniffed bool) {
		t.Helper()
		p := from(laptop, synPacket("192.168.0.3:5000", address+":443"))
		d.run(t, p.bytes())
		if a, ok := d.Assigned(policy.TCP, p.src, p.dst); ok && a.Sniff {
			if _, _, err := d.Decide(a, name); err != nil {
				t.Fatal(err)
			}
			sniffed = true
		}
		if verdictOf(t, d, p); !sniffed { // forgets the flow
			return false
		}
		return true
	}
	for range 3 {
		if !visit("203.0.113.9", "near.test") {
			t.Error("a name that only a flow told decided another flow")
		}
	}
	apply(t, d, Desired{Policy: namesPolicy(t), Sockets: udpListener(t), Sniff: SniffUnknown, TrustSniffed: true})
	for _, c := range []struct {
		address, name string
		sniffed       bool
	}{
		{"203.0.113.9", "near.test", false}, // learned before
		{"203.0.113.1", "near.test", true},
		{"203.0.113.1", "near.test", false},
		{"203.0.113.2", "www.far.test", true},
		{"203.0.113.2", "near.test", true}, // the address has two names
		{"203.0.113.2", "near.test", true},
	} {
		if got := visit(c.address, c.name); got != c.sniffed {
			t.Errorf("%s as %s: sniffed %t, want %t", c.address, c.name, got, c.sniffed)
		}
	}
	stranger := from(policy.MAC{2, 9}, synPacket("192.168.0.9:5000", "203.0.113.1:443"))
	if got := verdictOf(t, d, stranger); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("what one client's flow told decides another's: verdict %d", got)
	}
	if known := d.Names(); len(known) != 4 || known[0].Source != FromSniffing || known[0].Client != laptop.String() {
		t.Errorf("known: %+v", known)
	}
}

// TestDecidedByOtherNames: a name that only a flow told says nothing of the address's others, whatever rule it has.
func TestDecidedByOtherNames(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "hk", Rules: []policy.Rule{rule(t, "near", "direct", "domain", "near.test")}}
	apply(t, d, Desired{Policy: p, Sockets: udpListener(t), Sniff: SniffUnknown})
	for range 3 {
		syn := from(laptop, synPacket("192.168.0.3:5000", "203.0.113.1:443"))
		d.run(t, syn.bytes())
		a, ok := d.Assigned(policy.TCP, syn.src, syn.dst)
		if !ok || !a.Sniff {
			t.Fatalf("not looked at: %+v, %t", a, ok)
		}
		if outbound, _, err := d.Decide(a, "near.test"); err != nil || outbound != policy.OutboundDirect {
			t.Fatalf("%s, %v", outbound, err)
		}
	}
}

// TestNamesOfOthers: with sniff: unknown, what others know of an address does not speak for who resolves elsewhere.
func TestNamesOfOthers(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t), Sniff: SniffUnknown})
	learn(t, d, "192.168.0.77", "near.test", "203.0.113.9")
	if got := verdictOf(t, d, from(laptop, synPacket("192.168.0.3:5000", "203.0.113.9:443"))); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("who has asked nothing: verdict %d", got)
	}
	if got := verdictOf(t, d, synPacket("192.168.0.77:5000", "203.0.113.9:443")); got != gatewayVerdictVERDICT_DIRECT {
		t.Errorf("who has asked: verdict %d", got)
	}
}

// TestNamesAndNot: a name that a rule excludes stays excluded behind its alias.
func TestNamesAndNot(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(t, "abroad", "hk", "!domain_suffix", "cn.test")}}
	apply(t, d, Desired{Policy: p, Sniff: SniffAmbiguous})
	l := lessonOf("192.168.0.3", "www.cn.test", "203.0.113.9")
	l.Names = append(l.Names, "edge.cdn.test")
	if err := d.Learn(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.9:443")); got != gatewayVerdictVERDICT_DIRECT {
		t.Errorf("verdict %d", got)
	}
}

// TestNamesAndMarks: a mark is another way, too.
func TestNamesAndMarks(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct", Rules: []policy.Rule{rule(t, "vpn", "direct", "domain", "vpn.test")}}
	p.Rules[0].Mark = 0x100
	apply(t, d, Desired{Policy: p, Sniff: SniffUnknown})
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.9:443")); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("without a name: verdict %d", got)
	}
	learn(t, d, "192.168.0.3", "vpn.test", "203.0.113.10")
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.10:443")); got != gatewayVerdictVERDICT_DIRECT {
		t.Errorf("by its name: verdict %d", got)
	}
	learn(t, d, "192.168.0.3", "near.test", "203.0.113.10")
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.10:443")); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("by two: verdict %d", got)
	}
}

// TestLearnAgain: what the kernel did not take is not claimed to be known when it is asked for again.
func TestLearnAgain(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: namesPolicy(t)})
	good := d.learning.durable
	bad, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	d.learning.durable = bad // as if the kernel had no memory for a moment
	if err := d.Learn(t.Context(), lessonOf("192.168.0.3", "bad.test", "203.0.113.9")); err == nil {
		t.Fatal("it was learned")
	}
	if err := d.Learn(t.Context(), lessonOf("192.168.0.3", "bad.test", "203.0.113.9")); err == nil {
		t.Fatal("it was learned the second time")
	}
	d.learning.durable = good
	learn(t, d, "192.168.0.3", "bad.test", "203.0.113.9")
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.9:443")); got != gatewayVerdictVERDICT_BLOCK {
		t.Errorf("verdict %d", got)
	}
}

// TestSniffedWithoutDaemon: what was blocked but for its first bytes stays so when nobody can read them.
func TestSniffedWithoutDaemon(t *testing.T) {
	d := opened(t)
	listener, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	apply(t, d, Desired{
		Policy: namesPolicy(t), Sockets: Sockets{UDP4: listener.(*net.UDPConn)}, Sniff: SniffAmbiguous, OnFailure: policy.Direct,
	})
	for address, names := range map[string][]string{"203.0.113.8": {"near.test", "www.far.test"}, "203.0.113.9": {"bad.test", "near.test"}} {
		for _, name := range names {
			learn(t, d, "192.168.0.3", name, address)
		}
		d.run(t, quicInitial("192.168.0.3:5000", address+":443").bytes())
	}
	listener.Close()
	for address, want := range map[string]int32{"203.0.113.8": tcxNext, "203.0.113.9": tcxDrop} {
		for range 2 {
			if r := d.run(t, quicInitial("192.168.0.3:5000", address+":443").bytes()); r.code != want {
				t.Errorf("%s: code %d, want %d", address, r.code, want)
			}
		}
	}
}

// TestQuestionsOnLink: a resolver may be told by a link-local address (RFC 8106): who asks there is known too, and
// nothing else on the link is touched.
func TestQuestionsOnLink(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "block"}, DNS: udpListener(t)})
	if r := d.run(t, from(laptop, udpPacket("[fe80::3]:5000", "[fe80::1]:53")).bytes()); r.code != tcxDrop {
		t.Errorf("it was not given to the listener, which a test run refuses: code %d", r.code)
	}
	if n := d.drops(t, gatewayReasonREASON_ASSIGN_FAILED); n != 1 {
		t.Errorf("%d packets were given to the listener", n)
	}
	if r := d.run(t, from(laptop, udpPacket("[fe80::3]:5000", "[fe80::1]:5353")).bytes()); r.code != tcxNext || r.mark != 0 {
		t.Errorf("another port: code %d, mark %#x", r.code, r.mark)
	}
}

// TestNameClassesOverflow: where names have more effects than there is room for, each flow is looked at.
func TestNameClassesOverflow(t *testing.T) {
	d := opened(t)
	p := &policy.Policy{Default: "direct"}
	for i := range 14 {
		p.Rules = append(p.Rules, rule(t, fmt.Sprintf("r%d", i), "hk", "domain", fmt.Sprintf("n%d.test", i)))
	}
	apply(t, d, Desired{Policy: p, Sniff: SniffAmbiguous})
	for set := range 1 << 14 {
		var k knowledge
		for i := range 14 {
			if set>>i&1 == 1 {
				k.sets = append(k.sets, []string{fmt.Sprintf("n%d.test", i)})
			}
		}
		_, ok, err := d.generation.names.of(k)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
	}
	if _, ok, _ := d.generation.names.of(knowledge{sets: [][]string{{"n0.test"}, {"n1.test"}}}); !ok {
		t.Error("what has a class lost it")
	}
	full := knowledge{sets: [][]string{{"n13.test"}, {"n12.test"}, {"n11.test"}}}
	if _, ok, _ := d.generation.names.of(full); ok {
		t.Fatal("there is room still: the test is too small")
	}
	address := netip.MustParseAddr("203.0.113.1")
	if err := d.generation.setName(gatewayNameKey{Address: addressOf(address)}, full); err != nil {
		t.Fatal(err)
	}
	if got := verdictOf(t, d, synPacket("192.168.0.3:5000", "203.0.113.1:443")); got != gatewayVerdictVERDICT_SNIFF {
		t.Errorf("verdict %d", got)
	}
}

// TestQuotedQuestions: a client's ICMP error about our answer stays here, though the answer seemed to come from
// somebody else.
func TestQuotedQuestions(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: "direct"}, DNS: udpListener(t)})
	for _, p := range []packet{udpPacket("192.168.0.3:5000", "8.8.8.8:53"), udpPacket("[fd00::3]:5000", "[2001:4860::8]:53")} {
		if r := d.run(t, icmpErrorAbout(p, udpPacket(p.dst.String(), p.src.String()))); r.mark != uint32(gatewayMarkMARK_PROXY) {
			t.Errorf("about an answer of %v: mark %#x", p.dst, r.mark)
		}
	}
}
