package config

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// largeYAML is a policy of 900 rules and 100,000 prefixes, a fifth of them IPv6, as people build them
// of country lists: one rule has most.
func largeYAML() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	prefix := func() netip.Prefix {
		if r.IntN(5) == 0 {
			var a [16]byte
			a[0], a[1], a[2], a[3], a[4], a[5] = 0x20, 0x01, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())
			return netip.PrefixFrom(netip.AddrFrom16(a), 48)
		}
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(1 + r.IntN(223)), byte(r.Uint32()), byte(r.Uint32()), 0}), 24)
	}
	var b strings.Builder
	b.WriteString("default: direct\noutbounds: { hk: { url: 'socks5://10.0.0.7:1080' } }\nrules:\n  - name: country\n    outbound: hk\n    ip_cidr:\n")
	for range 100_000 - 899*10 {
		fmt.Fprintf(&b, "      - %s\n", prefix())
	}
	for i := range 899 {
		fmt.Fprintf(&b, "  - name: rule %d\n    port: [%d, %d-%d]\n    outbound: block\n    ip_cidr:\n", i, i+1, i+1000, i+2000)
		for range 10 {
			fmt.Fprintf(&b, "      - %s\n", prefix())
		}
	}
	return []byte(b.String())
}

// TestLarge loads the large policy in a process of its own, the only way to know its greatest memory.
func TestLarge(t *testing.T) {
	const child = "SIDEGATE_CONFIG_LARGE"
	if name := os.Getenv(child); name != "" {
		before := peak(t)
		begin, busy := time.Now(), processor(t)
		c, err := Load(name)
		took := time.Since(begin)
		busy = processor(t) - busy
		if err != nil {
			t.Fatal(err)
		}
		if n := len(c.Policy.Rules); n != 900 {
			t.Fatalf("%d rules", n)
		}
		fmt.Printf("large: %d %d %d\n", took.Milliseconds(), busy.Milliseconds(), peak(t)-before)
		return
	}
	if info, _ := debug.ReadBuildInfo(); info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("the race detector multiplies time and memory, which this test is about")
	}
	name := filepath.Join(t.TempDir(), "large.yaml")
	write(t, name, string(largeYAML()), 0o644)
	command := exec.Command(os.Args[0], "-test.run=^TestLarge$", "-test.v")
	command.Env = append(os.Environ(), child+"="+name)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, figures, _ := strings.Cut(string(out), "large: ")
	var took, busy, kilobytes int
	if _, err := fmt.Sscan(figures, &took, &busy, &kilobytes); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	t.Logf("900 rules and 100,000 prefixes: %d ms (%d ms of processor time), and %d MiB more memory at the peak", took, busy, kilobytes>>10)
	if kilobytes > 60<<10 {
		t.Errorf("it needs %d MiB, not under 60", kilobytes>>10)
	}
}

// peak is the greatest resident memory of this process so far, in KiB.
func peak(t *testing.T) int {
	file, err := os.Open("/proc/self/status")
	if err != nil {
		t.Skip("needs /proc: ", err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("/proc/self/status has no VmHWM")
	return 0
}

// processor is the time that all threads of this process have run so far.
func processor(t *testing.T) time.Duration {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func BenchmarkLoad(b *testing.B) {
	data := largeYAML()
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse("large.yaml", data, YAML); err != nil {
			b.Fatal(err)
		}
	}
}
