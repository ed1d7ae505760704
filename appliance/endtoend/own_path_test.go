package endtoend

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// TestOwnDirectIsNotTouched: a direct connection of the box meets the gateway's programs where it connects, and no more: of all that are
// attached none runs oftener for 64 MiB than for a byte, each way. What is proxied meets them with each packet, which shows that they are counted.
// One is not for the box's own connections and left out: no-redirects, in netfilter's output for IPv6, looks at each packet of the box
// whether its own connections are decided or not. The box has two arms: on the only arm of a box the LAN's program sees what arrives there, for whomever it is.
func TestOwnDirectIsNotTouched(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("needs curl: install the package curl")
	}
	b := newBox(t)
	secondArm("eth1", true)(t, b.world)
	files, err := b.server().StartFiles(t.Context(), 80)
	need(t, err)
	statistics, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	need(t, err)
	defer statistics.Close()
	b.start(t, fmt.Sprintf("interfaces: { lan: [eth1] }\ngateway: { local: true, cgroup: %s }\noutbounds: { hk: { url: \"socks5://%s\" } }\n%sdefault: block\n",
		b.cgroup, b.dante.Addr4, unitRules))
	programs := b.programs(t)
	if len(programs) < 9 { // 6 hooks, lo, the LAN, the look-up
		t.Fatalf("%d programs are attached: %v", len(programs), programs)
	}
	const (
		much       = 64 << 20 // some 1,500 packets at the least, with segmentation left to the device
		neighbours = 20       // packets that hosts send of themselves meanwhile
	)
	transfer := func(unit string, args ...string) map[string]uint64 {
		t.Helper()
		before := runs(t, programs)
		c := b.sidegate().Command(within(t, forAnswer), curl, append([]string{"-sS", "--fail", "-o", "/dev/null"}, args...)...)
		c.Cgroup = b.unit(t, unit)
		need(t, c.Run())
		after := runs(t, programs)
		for name := range after {
			after[name] -= before[name]
		}
		return after
	}
	for family, addr := range both(b.sidegate(), b.server()) {
		url := "http://" + netip.AddrPortFrom(addr[1], files.Addr4().Port()).String()
		download := func(unit string, n int) map[string]uint64 {
			return transfer(unit, fmt.Sprintf("%s/bytes/%d", url, n))
		}
		upload := func(unit string, n int) map[string]uint64 {
			return transfer(unit, "-T", zeros(t, n), url+"/upload")
		}
		for name, move := range map[string]func(string, int) map[string]uint64{"download": download, "upload": upload} {
			little, large, proxied := move("red.service", 1), move("red.service", much), move("blue.service", much)
			t.Logf("%s %s: %v", family, name, large)
			if little["own-connect"+family[1:]] != 1 || proxied["own-loopback"] < 100 {
				t.Errorf("%s %s: the programs are not counted: %v for a byte, %v for %d proxied", family, name, little, proxied, much)
			}
			for program, n := range large {
				if program != "no-redirects" && n > little[program]+neighbours {
					t.Errorf("%s %s: %s runs %d times for a byte, %d times for %d", family, name, program, little[program], n, much)
				}
			}
		}
	}
}

// programs are those that the gateway has attached, by the names of their links.
func (b *box) programs(t *testing.T) map[string]*ebpf.Program {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(b.gateway.State, "links", "*"))
	need(t, err)
	all := map[string]*ebpf.Program{}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		need(t, err)
		info, err := l.Info()
		need(t, err)
		p, err := ebpf.NewProgramFromID(info.Program)
		need(t, err)
		l.Close()
		t.Cleanup(func() { p.Close() })
		all[filepath.Base(pin)] = p
	}
	return all
}

// runs is how often each has run.
func runs(t *testing.T, programs map[string]*ebpf.Program) map[string]uint64 {
	t.Helper()
	counts := map[string]uint64{}
	for name, p := range programs {
		s, err := p.Stats()
		need(t, err)
		counts[name] = s.RunCount
	}
	return counts
}

// zeros is a file of so many bytes.
func zeros(t *testing.T, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "zeros")
	need(t, os.WriteFile(path, nil, 0o600))
	need(t, os.Truncate(path, int64(n)))
	return path
}
