package datapath

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// TestBypass: to packets of the probe's mark the programs are not there, whatever they are and whatever the policy says; any other
// mark makes no difference.
func TestBypass(t *testing.T) {
	d := opened(t)
	apply(t, d, Desired{Policy: &policy.Policy{Default: policy.OutboundBlock}})
	for i, p := range []*ebpf.Program{d.generation.objects.LanEthernet, d.generation.objects.LanIp} {
		syn := synPacket(fmt.Sprint("192.168.0.9:", 40000+i), "203.0.113.10:443")
		data := syn.bytes()
		for _, c := range []struct {
			mark uint32
			code int32
		}{
			{MarkBypass, tcxNext},
			{0, tcxDrop},
			{MarkBypass | 1, tcxDrop},
			{uint32(gatewayMarkMARK_DIRECT), tcxDrop},
		} {
			before := d.drops(t, gatewayReasonREASON_RULE_BLOCK)
			r := runMarked(t, p, data, c.mark)
			dropped := d.drops(t, gatewayReasonREASON_RULE_BLOCK) - before
			if r.code != c.code || r.code == tcxNext && (r.mark != c.mark || dropped != 0 || !slices.Equal(r.data, data)) {
				t.Errorf("%v, mark %#x: code %d, mark %#x, %d dropped by rule, want code %d", p, c.mark, r.code, r.mark, dropped, c.code)
			}
			if _, known := d.flow(t, policy.Flow{Source: syn.src, Destination: syn.dst}, unix.IPPROTO_TCP); known && c.code == tcxNext {
				t.Errorf("%v: what passes by is recorded as a flow", p)
			}
		}
	}
}
