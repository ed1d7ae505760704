package datapath

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// Cases of the proof; SIDEGATE_PROOF_CASES asks for more.
func proofCases(t *testing.T) int {
	text := os.Getenv("SIDEGATE_PROOF_CASES")
	if text == "" {
		return 100_000
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("SIDEGATE_PROOF_CASES: %v", err)
	}
	return n
}

// TestPolicyProof holds the three renderings of the policy equal: the specification, the tables, and the
// BPF program, the latter both asked directly (names and processes too) and by packets; and the packets' marks what
// the policy says of their return path.
func TestPolicyProof(t *testing.T) {
	d := opened(t)
	const flowsPerPolicy = 1000
	cases, v6 := 0, 0
	processes := map[string]int{} // cases that a rule on a process decided, by its fields
	packets := packetCases{marked: map[uint32]int{}}
	for seed := uint64(1); cases < proofCases(t); seed++ {
		r := rand.New(rand.NewPCG(seed, 1))
		p := policy.Random(r)
		sniff := []Sniff{SniffOff, SniffAmbiguous, SniffUnknown}[seed%3]
		apply(t, d, Desired{Policy: p, Sniff: sniff, ReturnPath: ReturnPath(seed % 2)})
		for range flowsPerPolicy {
			f := p.RandomFlow(r)
			if err := d.prove(t, p, f); err != nil {
				t.Fatalf("seed %d, case %d: %v\n%s", seed, cases, err, d.keep(t, policy.Case{Policy: p, Flow: f}, seed))
			}
			cases++
			if d := p.Match(f); d.Rule >= 0 {
				for _, c := range slices.Concat(p.Rules[d.Rule].Is, p.Rules[d.Rule].Not) {
					if _, ok := processHashes[c.Field.Dimension]; ok {
						processes[c.Field.Key]++
					}
				}
			}
			if f.Destination.Addr().Is6() {
				v6++
			}
			d.provePacket(t, p, f, sniff, &packets)
		}
	}
	t.Logf("%d cases (%d IPv6; decided by processes: %v), %d of them by packets as well (%d with names, %d of those from others; %d to be sniffed), 0 mismatches",
		cases, v6, processes, packets.all, packets.named, packets.others, packets.sniffed)
	if packets.all < cases/3 || packets.named < cases/20 || packets.others < cases/100 || packets.sniffed < cases/100 || len(packets.marked) != 2 || v6 < cases/10 {
		t.Errorf("the generator no longer reaches all: %+v, %d IPv6 of %d", packets, v6, cases)
	}
	for _, key := range []string{"process_name", "process_path", "unit"} {
		if processes[key] < cases/100 {
			t.Errorf("the generator no longer reaches all: %d of %d cases were decided by %s", processes[key], cases, key)
		}
	}
}

// corpus holds the cases in which renderings once differed, of this proof and of the policy's own.
const corpus = "../policy/testdata/corpus"

// keep shrinks a failure and adds it to the corpus.
func (d *Datapath) keep(t *testing.T, c policy.Case, seed uint64) string {
	t.Helper()
	small := policy.Shrink(c, func(c policy.Case) bool {
		err := d.Apply(t.Context(), Desired{Policy: c.Policy})
		return err == nil && d.prove(t, c.Policy, c.Flow) != nil
	})
	text, err := json.MarshalIndent(small, "", "  ")
	if err != nil {
		return err.Error()
	}
	file := filepath.Join(corpus, fmt.Sprintf("kernel-%d.json", seed))
	if err := os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("kept as %s:\n%s", file, text)
}

// TestProofCorpus replays what once failed.
func TestProofCorpus(t *testing.T) {
	d := opened(t)
	files, err := filepath.Glob(corpus + "/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases in %s: %v", corpus, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var c policy.Case
		if err := json.Unmarshal(text, &c); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		apply(t, d, Desired{Policy: c.Policy})
		if err := d.prove(t, c.Policy, c.Flow); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func (d *Datapath) prove(t *testing.T, p *policy.Policy, f policy.Flow) error {
	t.Helper()
	want, tables := p.Match(f), d.generation.tables.Match(f)
	kernel, err := d.Query(f)
	if err != nil {
		return fmt.Errorf("%w, on %+v", err, f)
	}
	kernel.Ambiguous = want.Ambiguous // the program's word for it is doubt
	if translated := want.Verdict == policy.Direct && p.Translated(want.Rule, d.applied.ReturnPath == Symmetric); kernel.Translated != translated {
		return fmt.Errorf("translated: policy %t, kernel %t, by rule %d, on %+v", translated, kernel.Translated, want.Rule, f)
	}
	if doubtful := d.generation.tables.Doubtful(f); want != tables || want != kernel.Decision || kernel.Doubtful != doubtful {
		return fmt.Errorf("specification %+v, tables %+v, kernel %+v, on %+v", want, tables, kernel, f)
	}
	return nil
}

// packetCases counts what packets have proved.
type packetCases struct {
	all, named, others, sniffed int
	marked                      map[uint32]int // direct packets, by the bits of the mark that are ours
}

// strangers is nobody's MAC.
var strangers = gatewayClientKey{W: [4]uint32{1, 2}}

// once is names as a client knows them: each once.
func once(sets [][]string) (names []string, aliases map[string][]string) {
	aliases = map[string][]string{}
	for _, set := range sets {
		if !slices.Contains(names, set[0]) {
			names = append(names, set[0])
			aliases[set[0]] = set[1:]
		}
	}
	return names, aliases
}

// provePacket sends the flow's first packet, where a packet can have these facts, after its client, or in every
// second case somebody else, has learned the names.
func (d *Datapath) provePacket(t *testing.T, p *policy.Policy, f policy.Flow, sniff Sniff, cases *packetCases) {
	t.Helper()
	routable := func(a byte, v6 bool) bool {
		return v6 && a != 0xff && a != 0xfe || !v6 && a != 0 && a < 224 && a != 169
	}
	first := func(ap policy.Flow, dst bool) (byte, bool) {
		a := ap.Source.Addr()
		if dst {
			a = ap.Destination.Addr()
		}
		return a.AsSlice()[0], a.Is6()
	}
	sb, sv6 := first(f, false)
	db, dv6 := first(f, true)
	if sv6 != dv6 || !routable(sb, sv6) || !routable(db, dv6) {
		return
	}
	family := unix.AF_INET
	if sv6 {
		family = unix.AF_INET6
	}
	if slices.ContainsFunc(ownPrefixes(family), func(own net.IPNet) bool { return own.Contains(f.Source.Addr().AsSlice()) }) {
		return // such packets of others are forged
	}
	f.Names, f.Aliases = once(f.NameSets())
	f.Process, f.Interface = policy.Process{}, "" // no packet carries them; a test run arrives by lo
	seen := f
	seen.Interface = "lo"
	want := p.Match(seen)
	pkt := packetOf(f)
	sniffable := f.Network == policy.TCP
	if f.Network == policy.UDP && cases.all%2 == 0 {
		pkt.payload, sniffable = quic(0xc3, 1, 1200), true
	}
	pupil := clientBy(addressOf(f.Source.Addr()), f.SourceMAC)
	if len(f.Names) > 0 && cases.named%2 == 0 {
		pupil = strangers
		cases.others++
	}
	taught := gatewayNameKey{Client: pupil, Address: addressOf(f.Destination.Addr())}
	for _, set := range f.NameSets() {
		err := d.learning.learn(taught, lesson{names: set, source: FromDNS, expires: 1 << 60})
		if err != nil {
			t.Fatal(err)
		}
	}
	r := d.run(t, pkt.bytes())
	verdict := gatewayVerdict(want.Verdict)
	known := seen
	if sniff == SniffUnknown && pupil == strangers {
		known.Names = nil // what others know does not speak for this client
	}
	doubtful := d.generation.tables.Doubtful(known) && (len(f.Names) > 0 || sniff == SniffUnknown)
	if doubtful && sniffable && sniff != SniffOff {
		verdict = gatewayVerdictVERDICT_SNIFF
		cases.sniffed++
	}
	if len(f.Names) > 0 {
		cases.named++
		d.learning.book.forget(d.learning.book.page(taught))
		if err := d.learning.publish(taught); err != nil {
			t.Fatal(err)
		}
	}
	cases.all++
	got, ok := d.flow(t, f, pkt.protocol)
	if !ok {
		t.Fatalf("no entry for the packet of %+v", f)
	}
	wantRule := want.Rule
	if wantRule < 0 {
		wantRule = ruleDefault
	}
	if int(got.Rule) != wantRule || gatewayVerdict(got.Verdict) != verdict || got.Outbound != policy.OutboundID(want.Outbound) {
		t.Fatalf("the packet of %+v: verdict %d by rule %d, want %d, %+v", seen, got.Verdict, got.Rule, verdict, want)
	}
	if mark := d.markOf(p, want.Rule); got.Mark != mark || verdict == gatewayVerdictVERDICT_DIRECT && r.mark != mark {
		t.Fatalf("the packet of %+v: the entry's mark is %#x, the packet's %#x; want %#x by %+v", seen, got.Mark, r.mark, mark, want)
	}
	if verdict == gatewayVerdictVERDICT_DIRECT {
		cases.marked[d.markOf(p, want.Rule)&uint32(gatewayMarkMARK_MASK)]++
	}
	d.forget(t, f, pkt.protocol)
}

// markOf is the mark of a direct packet as the rule has it, and the return path.
func (d *Datapath) markOf(p *policy.Policy, rule int) uint32 {
	translated, own := d.applied.ReturnPath == Symmetric, uint32(0)
	if rule >= 0 {
		own = p.Rules[rule].Mark
		if snat := p.Rules[rule].SNAT; snat != nil {
			translated = *snat
		}
	}
	if translated {
		return uint32(gatewayMarkMARK_TRANSLATED) | own
	}
	return uint32(gatewayMarkMARK_DIRECT) | own
}

func (d *Datapath) forget(t *testing.T, f policy.Flow, protocol uint8) {
	t.Helper()
	key := gatewayFlowKey{
		Source: addressOf(f.Source.Addr()), Destination: addressOf(f.Destination.Addr()),
		SourcePort: bigEndian(f.Source.Port()), DestinationPort: bigEndian(f.Destination.Port()),
		Protocol: protocol,
	}
	for _, table := range d.state.flowTables() {
		_ = table.Delete(key) // it is in one of them
	}
}

// TestProofFindsMutations breaks the kernel's tables one bit at a time: the proof must notice each kind.
func TestProofFindsMutations(t *testing.T) {
	d := opened(t)
	r := rand.New(rand.NewPCG(7, 7))
	p := &policy.Policy{Default: "direct", Rules: []policy.Rule{
		rule(t, "web", "hk", "port", "443"),
		rule(t, "office", "block", "ip_cidr", "198.51.100.0/24"),
		rule(t, "six", "hk", "ip_cidr", "2001:db8::/32", "!source_ip_cidr", "fd00::/64"),
		rule(t, "phone", "hk", "source_mac_address", "02:00:00:00:00:10"),
		rule(t, "curl", "block", "process_name", "curl", "port", "80"),
		rule(t, "torrent", "hk", "!process_path", "/usr/bin/curl", "!unit", "web.service"),
	}}
	flip := func(m func(*gatewayMaps) *ebpf.Map, class, bit int) func(*testing.T) {
		return func(t *testing.T) {
			table := m(&d.generation.objects.gatewayMaps)
			var row gatewayBits
			if err := table.Lookup(uint32(class), &row); err != nil {
				t.Fatal(err)
			}
			row.W[bit/64] ^= 1 << (bit % 64)
			if err := table.Put(uint32(class), row); err != nil {
				t.Fatal(err)
			}
		}
	}
	forget := func(m func(*gatewayMaps) *ebpf.Map, hash uint64) func(*testing.T) {
		return func(t *testing.T) {
			if err := m(&d.generation.objects.gatewayMaps).Delete(hash); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, mutate := range map[string]func(*testing.T){
		"a destination class permits a rule too many": flip(func(m *gatewayMaps) *ebpf.Map { return m.DestinationBits }, int(policy.ClassOther), 1),
		"a port class lacks its rule":                 flip(func(m *gatewayMaps) *ebpf.Map { return m.DestinationPortBits }, int(d.classOfPort(t, p, 443)), 0),
		"another address's class":                     flip(func(m *gatewayMaps) *ebpf.Map { return m.SourceBits }, int(policy.ClassOther), 2),
		"an unknown MAC matches":                      flip(func(m *gatewayMaps) *ebpf.Map { return m.MacBits }, int(policy.ClassOther), 3),
		"any process matches":                         flip(func(m *gatewayMaps) *ebpf.Map { return m.ProcessNameBits }, int(policy.ClassOther), 4),
		"a client's flow matches a path":              flip(func(m *gatewayMaps) *ebpf.Map { return m.ProcessPathBits }, int(policy.ClassUnknown), 5),
		"a unit is forgotten":                         forget(func(m *gatewayMaps) *ebpf.Map { return m.ProcessUnits }, hashText("web.service")),
		"a path is another":                           forget(func(m *gatewayMaps) *ebpf.Map { return m.ProcessPaths }, hashPath("/usr/bin/curl")),
	} {
		fresh := *p // another pointer: another generation
		apply(t, d, Desired{Policy: &fresh})
		mutate(t)
		if !d.mismatchWithin(t, &fresh, r, 20_000) {
			t.Errorf("%s: 20,000 random flows did not find it", name)
		}
	}
}

func (d *Datapath) mismatchWithin(t *testing.T, p *policy.Policy, r *rand.Rand, flows int) bool {
	t.Helper()
	for range flows {
		if d.prove(t, p, p.RandomFlow(r)) != nil {
			return true
		}
	}
	return false
}

func (d *Datapath) classOfPort(t *testing.T, p *policy.Policy, port int) uint16 {
	t.Helper()
	tables, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return tables.DestinationPort.Class[port]
}
