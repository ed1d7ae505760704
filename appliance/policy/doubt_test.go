package policy

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestDoubtIsSound: where Doubtful says no, no name of the flow, or any name if it has none, leads elsewhere. And
// it does not simply always doubt.
func TestDoubtIsSound(t *testing.T) {
	var doubted, exact, named, unnamed int
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := Random(r)
		tables, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			f := p.RandomFlow(r)
			answer := p.Match(f)
			doubt := tables.Doubtful(f)
			if f.NameSets() != nil {
				named++
				if answer.Ambiguous && !doubt {
					t.Fatalf("seed %d: the names lead to different outbounds, and nothing is in doubt: %+v", seed, f)
				}
				if doubt {
					doubted++
				}
				if answer.Ambiguous {
					exact++
				}
				continue
			}
			unnamed++
			for range 20 {
				g := f
				named := p.RandomFlow(r)
				g.Names, g.Aliases = named.Names, named.Aliases
				if len(g.Names) > 1 {
					g.Names = g.Names[:1]
				}
				if p.outcome(p.Match(g).Rule) != p.outcome(answer.Rule) && !doubt {
					t.Fatalf("seed %d: the name %v would change the outbound, and nothing is in doubt: %+v", seed, g.Names, f)
				}
			}
		}
	}
	if named < 1000 || unnamed < 1000 || exact == 0 {
		t.Fatalf("%d flows with names, %d without, %d ambiguous: the generator has lost its reach", named, unnamed, exact)
	}
	t.Logf("%d flows with names: %d in doubt, %d of them ambiguous", named, doubted, exact)
	if doubted > 2*exact {
		t.Errorf("%d flows are in doubt and %d are ambiguous: too careful to be useful", doubted, exact)
	}
}

// TestMatchingIsEveryRule compares with each rule asked alone.
func TestMatchingIsEveryRule(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 2))
		p := Random(r)
		tables, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			f := p.RandomFlow(r)
			var want []int
			for i := range p.Rules {
				for _, facts := range f.facts() {
					if p.matches(&p.Rules[i], &facts) {
						want = append(want, i)
						break
					}
				}
			}
			if got := slices.Collect(tables.Matching(f)); !slices.Equal(got, want) {
				t.Fatalf("seed %d: %v match, want %v: %+v", seed, got, want, f)
			}
		}
	}
}
