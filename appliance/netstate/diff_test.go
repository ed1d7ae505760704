package netstate

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

// home is a side router's usual state.
func home() *Snapshot {
	return &Snapshot{
		Links: []Link{
			{Index: 1, Name: "lo", MTU: 65536, Up: true},
			{Index: 2, Name: "eth0", MAC: MAC{2, 0, 0, 0, 0, 2}, MTU: 1500, Up: true, Ethernet: true},
		},
		Addresses: []Address{
			{Prefix: prefix("127.0.0.1/8"), LinkIndex: 1},
			{Prefix: prefix("192.168.0.2/24"), LinkIndex: 2},
			{Prefix: prefix("fd00:c0a8::2/64"), LinkIndex: 2},
		},
		Defaults: []Route{
			{Gateway: addr("192.168.0.1"), LinkIndex: 2},
			{IPv6: true, Gateway: addr("fe80::1"), LinkIndex: 2, Metric: 1024},
		},
	}
}

func TestDiff(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Snapshot)
		want   []string
	}{
		"nothing": {func(*Snapshot) {}, nil},
		"link added": {
			func(s *Snapshot) { s.Links = append(s.Links, Link{Index: 3, Name: "wg0"}) },
			[]string{"link added on wg0"},
		},
		"link removed": {
			func(s *Snapshot) { s.Links, s.Addresses, s.Defaults = s.Links[:1], s.Addresses[:1], nil },
			[]string{
				"link removed on eth0",
				"address removed on eth0: 192.168.0.2/24", "address removed on eth0: fd00:c0a8::2/64",
				"default route changed on eth0: via 192.168.0.1 dev eth0 metric 0 → no IPv4 default",
				"default route changed on eth0: via fe80::1 dev eth0 metric 1024 → no IPv6 default",
			},
		},
		"link recreated": {
			func(s *Snapshot) {
				s.Links[1].Index = 7
				s.Links[1].MAC[5] = 9
				for i := range s.Addresses[1:] {
					s.Addresses[1+i].LinkIndex = 7
				}
				for i := range s.Defaults {
					s.Defaults[i].LinkIndex = 7
				}
			},
			[]string{"link recreated on eth0: index 2 → 7", "MAC address changed on eth0: 02:00:00:00:00:02 → 02:00:00:00:00:09"},
		},
		"index taken over by another link": {
			func(s *Snapshot) {
				s.Links[1].Index = 3
				s.Links = append(s.Links, Link{Index: 2, Name: "wlan0"})
				s.Addresses, s.Defaults = s.Addresses[:1], nil
			},
			[]string{
				"link recreated on eth0: index 2 → 3", "link added on wlan0",
				"address removed on eth0: 192.168.0.2/24", "address removed on eth0: fd00:c0a8::2/64",
				"default route changed on eth0: via 192.168.0.1 dev eth0 metric 0 → no IPv4 default",
				"default route changed on eth0: via fe80::1 dev eth0 metric 1024 → no IPv6 default",
			},
		},
		"link renamed": {
			func(s *Snapshot) { s.Links[1].Name = "lan" },
			[]string{
				"link renamed on lan: eth0 → lan",
				"address removed on eth0: 192.168.0.2/24", "address removed on eth0: fd00:c0a8::2/64",
				"address added on lan: 192.168.0.2/24", "address added on lan: fd00:c0a8::2/64",
				"default route changed on lan: via 192.168.0.1 dev eth0 metric 0 → via 192.168.0.1 dev lan metric 0",
				"default route changed on lan: via fe80::1 dev eth0 metric 1024 → via fe80::1 dev lan metric 1024",
			},
		},
		"down":   {func(s *Snapshot) { s.Links[1].Up = false }, []string{"link down on eth0"}},
		"type":   {func(s *Snapshot) { s.Links[1].Ethernet = false }, []string{"link type changed on eth0: Ethernet → other"}},
		"bridge": {func(s *Snapshot) { s.Links[1].MasterIndex = 5 }, []string{"master changed on eth0: index 0 → 5"}},
		"MTU":    {func(s *Snapshot) { s.Links[1].MTU = 1400 }, []string{"MTU changed on eth0: 1500 → 1400"}},
		"renumbered": {
			func(s *Snapshot) {
				s.Addresses[1].Prefix = prefix("10.0.0.2/24")
				s.Defaults[0].Gateway = addr("10.0.0.1")
			},
			[]string{
				"address added on eth0: 10.0.0.2/24", "address removed on eth0: 192.168.0.2/24",
				"default route changed on eth0: via 192.168.0.1 dev eth0 metric 0 → via 10.0.0.1 dev eth0 metric 0",
			},
		},
		"prefix length": {
			func(s *Snapshot) { s.Addresses[1].Prefix = prefix("192.168.0.2/16") },
			[]string{"address added on eth0: 192.168.0.2/16", "address removed on eth0: 192.168.0.2/24"},
		},
		"address moved to another link": {
			func(s *Snapshot) { s.Addresses[1].LinkIndex = 1 },
			[]string{"address removed on eth0: 192.168.0.2/24", "address added on lo: 192.168.0.2/24"},
		},
		"flags": {
			func(s *Snapshot) {
				s.Addresses[2].Tentative, s.Addresses[2].DADFailed = true, true
				s.Addresses[1].Deprecated = true
			},
			[]string{
				"address changed on eth0: 192.168.0.2/24: usable → deprecated",
				"address changed on eth0: fd00:c0a8::2/64: usable → tentative, duplicate",
			},
		},
		"temporary": {
			func(s *Snapshot) { s.Addresses[2].Temporary = true },
			[]string{"address changed on eth0: fd00:c0a8::2/64: usable → temporary"},
		},
		"second default": {
			func(s *Snapshot) {
				s.Defaults = slices.Insert(s.Defaults, 1, Route{LinkIndex: 1, Metric: 50})
			},
			[]string{"default route changed on eth0: via 192.168.0.1 dev eth0 metric 0 → via 192.168.0.1 dev eth0 metric 0, on link dev lo metric 50"},
		},
		"metric": {
			func(s *Snapshot) { s.Defaults[1].Metric = 5 },
			[]string{"default route changed on eth0: via fe80::1 dev eth0 metric 1024 → via fe80::1 dev eth0 metric 5"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			after := home()
			test.change(after)
			var got []string
			for _, r := range Diff(home(), after) {
				got = append(got, r.String())
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
			if home().Equal(after) != (test.want == nil) {
				t.Errorf("Equal is %v", home().Equal(after))
			}
		})
	}
}

// TestDiffComplete changes states at random: they are equal exactly if Diff has nothing to say.
func TestDiffComplete(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func() *Snapshot {
		s := home()
		for range r.IntN(3) {
			i := r.IntN(len(s.Links))
			switch l := &s.Links[i]; r.IntN(12) {
			case 0:
				l.Up = !l.Up
			case 1:
				l.Name += "x"
			case 2:
				l.MTU++
			case 3:
				l.MAC[0]++
			case 4:
				l.MasterIndex++
			case 5:
				l.Ethernet = !l.Ethernet
			case 6:
				s.Addresses[r.IntN(3)].Tentative = true
			case 7:
				s.Addresses[r.IntN(3)].Deprecated = true
			case 8:
				s.Defaults = s.Defaults[:r.IntN(len(s.Defaults)+1)]
			case 9:
				s.Addresses[r.IntN(3)].LinkIndex ^= 3
			case 10:
				l.Index += 2
			case 11:
				slices.Reverse(s.Defaults)
			}
			if len(s.Defaults) == 0 {
				break
			}
		}
		s.sort()
		return s
	}
	same := 0
	for range 20000 {
		a, b := random(), random()
		if a.Equal(b) {
			same++
		}
		if reasons := Diff(a, b); a.Equal(b) != (len(reasons) == 0) {
			t.Fatalf("Equal is %v, but Diff says %v\n%+v\n%+v", a.Equal(b), reasons, a, b)
		}
	}
	if same == 0 || same == 20000 {
		t.Errorf("%d pairs of 20000 were equal: this test shows nothing", same)
	}
}

func TestSnapshot(t *testing.T) {
	s := home()
	if l, ok := s.DefaultLink(); !ok || l.Name != "eth0" {
		t.Errorf("the default link is %v, %v", l, ok)
	}
	s.Defaults[1].LinkIndex = 1
	if r, ok := s.Default(true); !ok || r.Gateway != addr("fe80::1") {
		t.Errorf("the IPv6 default is %v, %v", r, ok)
	}
	s.Defaults = s.Defaults[1:]
	if l, ok := s.DefaultLink(); !ok || l.Name != "lo" {
		t.Errorf("without an IPv4 default the default link is %v, %v", l, ok)
	}
	s.Defaults = nil
	if l, ok := s.DefaultLink(); ok {
		t.Errorf("without a default route the default link is %v", l)
	}
	s.Addresses = append(s.Addresses, Address{Prefix: prefix("192.168.0.2/32"), LinkIndex: 1, Tentative: true})
	if got, want := s.OwnAddresses(), []netip.Addr{addr("127.0.0.1"), addr("192.168.0.2"), addr("fd00:c0a8::2")}; !slices.Equal(got, want) {
		t.Errorf("own addresses are %v, want %v", got, want)
	}
	if got := s.AddressesOf(2); len(got) != 2 {
		t.Errorf("eth0 has %v", got)
	}
	if _, ok := s.LinkByName("none"); ok {
		t.Error("a link that does not exist was found")
	}
}
