package policy

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// setting is a number from the environment, as in the datapath's proof: SIDEGATE_PROOF_CASES asks for more
// cases, SIDEGATE_PROOF_SEED for others.
func setting(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

const flowsPerPolicy = 100

// TestProof: Policy.Match and Tables.Match agree on random policies and flows at their boundaries.
func TestProof(t *testing.T) {
	const enough = 100_000
	var next, ran atomic.Uint64
	cases, firstSeed := setting(t, "SIDEGATE_PROOF_CASES", enough), setting(t, "SIDEGATE_PROOF_SEED", 1)
	policies := (cases + flowsPerPolicy - 1) / flowsPerPolicy
	var words [MaxRules/64 + 1]atomic.Uint64 // by the deciding rule's word, the default first
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for !t.Failed() {
				n := next.Add(1) - 1
				if n >= policies {
					return
				}
				seed := firstSeed + n
				if c := searchMismatch(seed, func(d Decision) { words[d.Rule/64+min(1, d.Rule+1)].Add(1) }); c != nil {
					reportMismatch(t, seed, *c)
				}
				ran.Add(flowsPerPolicy)
			}
		})
	}
	workers.Wait()
	t.Logf("%d cases over %d policies", ran.Load(), policies)
	if cases < enough || t.Failed() {
		return
	}
	for w := range words {
		if words[w].Load() == 0 {
			t.Errorf("no case was decided by a rule of word %d: the generator has lost its reach", w-1)
		}
	}
}

// searchMismatch tries the flows of one seed's policy.
func searchMismatch(seed uint64, decided func(Decision)) *Case {
	r := rand.New(rand.NewPCG(seed, 0))
	p := Random(r)
	tables, err := Compile(p)
	if err != nil {
		panic(fmt.Sprintf("seed %d: %v", seed, err))
	}
	for range flowsPerPolicy {
		f := blur(r, p.RandomFlow(r))
		want := p.Match(f)
		decided(want)
		if tables.Match(f) != want {
			return &Case{p, f}
		}
	}
	return nil
}

// blur makes flows that no packet has, but that Explain can be asked about: without addresses, with
// ports that the protocol lacks, with mapped addresses and spellings that mean the same.
func blur(r *rand.Rand, f Flow) Flow {
	addr := pick(r, []*netip.AddrPort{&f.Source, &f.Destination})
	switch r.IntN(40) {
	case 0:
		f.Source, f.Destination = netip.AddrPort{}, netip.AddrPort{}
	case 1:
		*addr = netip.AddrPortFrom(netip.Addr{}, addr.Port())
	case 2:
		*addr = netip.AddrPortFrom(netip.AddrFrom16(addr.Addr().As16()), addr.Port())
	case 3:
		f.Network = Network(r.IntN(256))
	case 4:
		f.Names = append([]string{"."}, f.Names...)
	case 5:
		*addr = netip.AddrPortFrom(addr.Addr(), 0)
	}
	return f
}

func disagree(c Case) bool {
	tables, err := Compile(c.Policy)
	return err == nil && tables.Match(c.Flow) != c.Policy.Match(c.Flow)
}

// reportMismatch shrinks the case and adds it to the corpus.
func reportMismatch(t *testing.T, seed uint64, c Case) {
	t.Helper()
	c = Shrink(c, disagree)
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	tables, _ := Compile(c.Policy)
	t.Errorf("SIDEGATE_PROOF_SEED=%d: Match says %+v, the tables say %+v for\n%s", seed, c.Policy.Match(c.Flow), tables.Match(c.Flow), text)
	sum := sha256.Sum256(text)
	keep(t, fmt.Sprintf("%.6x", sum[:]), c)
}

// keep adds a shrunk case to the corpus.
func keep(t *testing.T, name string, c Case) {
	t.Helper()
	text, err := json.MarshalIndent(c, "", " ")
	if err == nil {
		err = os.WriteFile(filepath.Join(corpus, name+".json"), append(text, '\n'), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

const corpus = "testdata/corpus"

// TestCorpus replays every case that ever failed.
func TestCorpus(t *testing.T) {
	files, err := filepath.Glob(corpus + "/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases in %s: %v", corpus, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var c Case
			if err := json.Unmarshal(text, &c); err != nil {
				t.Fatal(err)
			}
			tables, err := Compile(c.Policy)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := tables.Match(c.Flow), c.Policy.Match(c.Flow); got != want {
				t.Errorf("the tables say %+v, Match says %+v", got, want)
			}
		})
	}
}

// A random case survives its JSON, or the corpus would not replay what failed.
func TestCaseJSON(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		p := Random(r)
		c := Case{p, blur(r, p.RandomFlow(r))}
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var back Case
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(back)
		if err != nil || string(again) != string(text) {
			t.Fatalf("seed %d: %v\n%s\n%s", seed, err, text, again)
		}
		for range 20 {
			f := blur(r, p.RandomFlow(r))
			if got, want := back.Policy.Match(f), p.Match(f); got != want {
				t.Fatalf("seed %d: after JSON %+v, before %+v", seed, got, want)
			}
		}
	}
}

// Shrink leaves one condition and one fact of a case that needs no more.
func TestShrink(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 0))
	p := Random(r)
	for len(p.Rules) < 100 {
		p = Random(r)
	}
	f := p.RandomFlow(r)
	f.Process.Name = "curl"
	p.Rules[90].Is = append(p.Rules[90].Is, mustParse("process_name", "sshd", "curl"))
	fails := func(c Case) bool {
		return c.Flow.Process.Name == "curl" && slices.ContainsFunc(c.Policy.Rules, func(r Rule) bool {
			return slices.ContainsFunc(r.Is, func(c Condition) bool {
				return c.Field.Key == "process_name" && slices.Contains(c.Values, Value(text("curl")))
			})
		})
	}
	rules := len(p.Rules)
	c := Shrink(Case{p, f}, fails)
	if !fails(c) || len(c.Policy.Rules) != 1 || len(c.Policy.Rules[0].Not) != 0 || c.Policy.Rules[0].Is[0].String() != "process_name: curl" {
		t.Errorf("shrunk to %v", c.Policy.Rules)
	}
	if c.Flow.Names != nil || c.Flow.Interface != "" || c.Flow.Process != (Process{Name: "curl"}) {
		t.Errorf("shrunk to %+v", c.Flow)
	}
	if len(p.Rules) != rules {
		t.Error("the given policy was changed")
	}
}
