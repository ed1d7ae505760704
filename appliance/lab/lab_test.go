package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// newLab builds a lab that ends with the test.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the lab creates network namespaces")
	}
	l, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// brief bounds a test's waits.
func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestPaths sends through plain forwarding and counts at sidegate's interface: requests pass it, replies do not.
func TestPaths(t *testing.T) {
	l := newLab(t, Options{})
	ctx := brief(t)
	files, err := l.Host(Server).StartFiles(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	phone, err := l.AddClient(ctx, "phone")
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := l.AddServer(ctx, "mirror")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := mirror.StartFiles(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	for _, client := range []*Host{l.Host(Laptop), phone} {
		for _, to := range []netip.AddrPort{files.Addr4(), files.Addr6(), elsewhere.Addr4(), elsewhere.Addr6()} {
			t.Run(fmt.Sprintf("%s to %s", client.Name(), to), func(t *testing.T) {
				own := client.Addr4()
				if to.Addr().Is6() {
					own = client.Addr6()
				}
				atSidegate, err := l.Host(Sidegate).Capture()
				if err != nil {
					t.Fatal(err)
				}
				atClient, err := client.Capture()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := client.Exec(ctx, "curl", "-sSgo", "/dev/null", "http://"+to.String()+"/bytes/5000000"); err != nil {
					t.Fatal(err)
				}
				count := func(c *Capture, match func(Packet) bool) uint64 {
					t.Helper()
					n, err := c.Count(match)
					if err != nil {
						t.Fatal(err)
					}
					return n.Packets
				}
				request := func(out bool) func(Packet) bool {
					return func(p Packet) bool { return p.Out == out && p.Src.Addr() == own && p.Dst == to }
				}
				// The last packets may still be on their way when curl has ended.
				err = Wait(ctx, "sidegate to have forwarded all of the request", func() error {
					if in, out := count(atSidegate, request(false)), count(atSidegate, request(true)); in < 5 || in != out {
						return fmt.Errorf("it received %d packets and sent %d", in, out)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				// By address, TCP only: sidegate itself may tell the client its MAC.
				if n := count(atSidegate, func(p Packet) bool { return p.Dst.Addr() == own && p.Protocol == TCP }); n != 0 {
					t.Errorf("%d reply packets crossed sidegate, want 0", n)
				}
				if n := count(atClient, From(to.Addr())); n < 10 {
					t.Errorf("the client's capture saw %d reply packets: it cannot tell", n)
				}
				// One hop less behind sidegate, and sidegate's MAC in place of the client's.
				for p := range atSidegate.All() {
					if p.Dst == to && (p.TTL == 64 == p.Out || p.SrcMAC == MAC(client.MAC()) == p.Out) {
						t.Errorf("unexpected at sidegate: %s", p)
					}
				}
				if _, err := atSidegate.Close(); err != nil {
					t.Error(err)
				}
				sum, err := atClient.Close()
				if err != nil || sum.Bytes < 5_000_000 {
					t.Errorf("the client's capture counted %d bytes of 5000000, %v", sum.Bytes, err)
				}
			})
		}
	}
	if n := len(files.Requests()) + len(elsewhere.Requests()); n != 8 {
		t.Errorf("the servers saw %d requests, want 8", n)
	}
	for _, counter := range [][2]string{{"Icmp", "OutRedirects"}, {"", "Icmp6OutRedirects"}} {
		if n, err := l.Host(Sidegate).Counter(counter[0], counter[1]); n != 0 || err != nil {
			t.Errorf("sidegate's %s is %d, %v, want 0", counter[1], n, err)
		}
	}
}

// TestRedirects shows that the lab notices a gateway that sends redirects: IPv4 ones if the sysctl is set under the
// interface only, IPv6 ones if gateways are known by link-local addresses, against which there is no sysctl.
func TestRedirects(t *testing.T) {
	l := newLab(t, Options{LinkLocalGateways: true})
	ctx := brief(t)
	side := l.Host(Sidegate)
	if err := side.SetSysctl("net.ipv4.conf.eth0.send_redirects", "1"); err != nil {
		t.Fatal(err)
	}
	for to, counter := range map[netip.Addr][2]string{
		l.Host(Upstream).Addr4(): {"Icmp", "OutRedirects"},
		l.Host(Upstream).Addr6(): {"", "Icmp6OutRedirects"},
	} {
		if _, err := l.Host(Laptop).Ping(ctx, to); err != nil {
			t.Fatal(err)
		}
		if n, err := side.Counter(counter[0], counter[1]); n == 0 || err != nil {
			t.Errorf("%s is %d, %v after a ping to %s, want more than 0", counter[1], n, err, to)
		}
		// The laptop believes it and goes around sidegate.
		c, err := side.Capture()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Host(Laptop).Ping(ctx, to); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Count(To(to)); n.Packets != 0 || err != nil {
			t.Errorf("%d packets to %s passed sidegate after the redirect, %v", n.Packets, to, err)
		}
	}
}

// TestMTU sends what fits and what does not: the router must answer with an ICMP error.
func TestMTU(t *testing.T) {
	l := newLab(t, Options{MTU: 9000, InternetMTU: 1400})
	ctx := brief(t)
	if got := l.Host(Laptop).Interface().MTU; got != 9000 {
		t.Errorf("the laptop's MTU is %d, want 9000", got)
	}
	for to, header := range map[netip.Addr]int{l.Host(Server).Addr4(): 28, l.Host(Server).Addr6(): 48} {
		ping := func(size int) (string, error) {
			return l.Host(Laptop).Exec(ctx, "ping", "-c1", "-W2", "-Mdo", "-s", fmt.Sprint(size-header), to.String())
		}
		c, err := l.Host(Laptop).Capture()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ping(1400); err != nil {
			t.Errorf("1400 bytes to %s: %v", to, err)
		}
		if out, err := ping(1401); err == nil {
			t.Errorf("1401 bytes to %s passed: %s", to, out)
		}
		tooBig, err := c.Count(func(p Packet) bool {
			return !p.Out && (p.Protocol == ICMP && p.ICMPType == 3 && p.ICMPCode == 4 || p.Protocol == ICMPv6 && p.ICMPType == 2)
		})
		if tooBig.Packets != 1 || err != nil {
			t.Errorf("%d ICMP errors arrived, %v, want 1", tooBig.Packets, err)
		}
	}
	if _, err := New(ctx, Options{MTU: 1000}); err == nil || !strings.Contains(err.Error(), "1280") {
		t.Errorf("MTU 1000 gives %v, want an error that says what IPv6 needs", err)
	}
}

func TestNames(t *testing.T) {
	l := newLab(t, Options{})
	for _, name := range []string{"", "Laptop", "far-too-long-a-name", "../x", Laptop, switchName} {
		if _, err := l.AddClient(brief(t), name); err == nil {
			t.Errorf("a host %q was added", name)
		}
	}
	if _, err := l.Host(Laptop).Dial(brief(t), "tcp", "example.com:80"); err == nil || !strings.Contains(err.Error(), "resolves no names") {
		t.Errorf("dialing a name: %v", err)
	}
}

func TestDescribe(t *testing.T) {
	l := newLab(t, Options{})
	text := l.Describe()
	for _, h := range l.Hosts() {
		for _, i := range h.Interfaces() {
			if !strings.Contains(text, i.Addr4.Addr().String()) || !strings.Contains(text, i.Addr6.Addr().String()) {
				t.Errorf("%s's addresses are missing in:\n%s", h.Name(), text)
			}
		}
	}
	// What it tells the reader to type must work.
	_, command, _ := strings.Cut(strings.SplitN(text, "\n", 2)[0], "with: ")
	out, err := exec.CommandContext(brief(t), "sh", "-c", command).CombinedOutput()
	if err != nil || !strings.Contains(string(out), l.Host(Laptop).Addr4().String()) {
		t.Errorf("%s: %v: %s", command, err, out)
	}
}

func TestWait(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := Wait(ctx, "the cows", func() error { return net.ErrClosed })
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "the cows") {
		t.Errorf("got %v", err)
	}
	tries := 0
	err = Wait(t.Context(), "the third try", func() error {
		if tries++; tries < 3 {
			return net.ErrClosed
		}
		return nil
	})
	if err != nil || tries != 3 {
		t.Errorf("got %v after %d tries", err, tries)
	}
}
