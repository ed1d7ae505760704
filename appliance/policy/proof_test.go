package policy

import (
	"math/rand/v2"
	"testing"
)

func TestQuick(t *testing.T) {
	hit := map[int]int{}
	bad := 0
	for seed := range uint64(1000) {
		r := rand.New(rand.NewPCG(seed, 0))
		p := Random(r)
		tb, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			f := p.RandomFlow(r)
			a, b := p.Match(f), tb.Match(f)
			hit[a.Rule/64]++
			if a != b && bad < 3 {
				bad++
				t.Errorf("%v %v %v", f, a, b)
			}
		}
	}
	t.Log(hit)
}
