package exchange

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestMain(m *testing.M) {
	// The runtime opens its poller with the first socket: before anybody counts descriptors.
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close()
	}
	os.Exit(m.Run())
}

// noLeaks fails the test if it leaves goroutines or descriptors behind.
func noLeaks(t *testing.T) {
	t.Helper()
	// The collector would close a forgotten socket for us.
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent) })
	goroutines, descriptors := runtime.NumGoroutine(), countDescriptors(t)
	t.Cleanup(func() {
		if !eventually(5*time.Second, func() bool {
			return runtime.NumGoroutine() <= goroutines && countDescriptors(t) <= descriptors
		}) {
			stacks := make([]byte, 1<<16)
			t.Errorf("left behind: goroutines %d, were %d; descriptors %d, were %d\n%s", runtime.NumGoroutine(), goroutines,
				countDescriptors(t), descriptors, stacks[:runtime.Stack(stacks, true)])
		}
	})
}

func countDescriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// eventually polls a condition that nothing announces, until it holds or the time is over.
func eventually(limit time.Duration, holds func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if holds() {
			return true
		}
	}
	return holds()
}

// upstream makes one that is closed when the test ends. What Close leaves behind, noLeaks finds.
func upstream(t *testing.T, url string, o Options) *Upstream {
	t.Helper()
	u, err := New("doh", url, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func query(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

// wantA asks for the address of a name and wants the one of the fake servers.
func wantA(t *testing.T, u *Upstream, name string) {
	t.Helper()
	if err := askA(t.Context(), u, name); err != nil {
		t.Error(err)
	}
}

func askA(ctx context.Context, u *Upstream, name string) error {
	q := query(name, dns.TypeA)
	m, err := u.Exchange(ctx, q)
	if err != nil {
		return err
	}
	if len(m.Answer) == 1 && m.Id == q.Id && m.Answer[0].String() == truth(name).String() {
		return nil
	}
	return &badAnswer{"got " + m.String()}
}

// truth is what every server of these tests says of a name.
func truth(name string) dns.RR {
	return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: net.IPv4(192, 0, 2, 1)}
}

// wantError asks and wants an error that says this, in one line, within a time.
func wantError(t *testing.T, u *Upstream, within time.Duration, texts ...string) error {
	t.Helper()
	begun := time.Now()
	m, err := u.Exchange(t.Context(), query("www.example.", dns.TypeA))
	if took := time.Since(begun); took > within {
		t.Errorf("took %v; want at most %v", took, within)
	}
	if err == nil {
		t.Fatalf("answered %v", m)
	}
	for _, text := range append(texts, `asking upstream "doh" for www.example. A: `) {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("the error has several lines: %q", err)
	}
	return err
}

// program runs a server until the test ends and returns when it accepts connections at address.
func program(t *testing.T, address, name string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	var output bytes.Buffer
	c := exec.Command(name, args...)
	c.Stdout, c.Stderr = &output, &output
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		c.Wait()
	}()
	t.Cleanup(func() {
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
		<-exited
		if t.Failed() {
			t.Logf("%s said:\n%s", name, output.String())
		}
	})
	up := eventually(20*time.Second, func() bool {
		select {
		case <-exited:
			return true
		default:
		}
		probe, err := net.Dial("tcp", address)
		if err == nil {
			probe.Close()
		}
		return err == nil
	})
	select {
	case <-exited:
		t.Fatalf("%s ended by itself", name)
	default:
	}
	if !up {
		t.Fatalf("%s does not listen at %s", name, address)
	}
}

// authority is a certificate for dns.example and the loopback addresses, which is its own authority.
type authority struct {
	certificate, key string // PEM files
	pair             tls.Certificate
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "dns.example"},
		DNSNames:              []string{"dns.example"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	a := authority{certificate: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	for path, block := range map[string]*pem.Block{a.certificate: {Type: "CERTIFICATE", Bytes: der}, a.key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if a.pair, err = tls.LoadX509KeyPair(a.certificate, a.key); err != nil {
		t.Fatal(err)
	}
	return a
}

// freePort is one where nothing listens, by TCP or UDP.
func freePort(t *testing.T) uint16 {
	t.Helper()
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		address := l.Addr().(*net.TCPAddr).AddrPort()
		if c, err := net.ListenPacket("udp", address.String()); err == nil {
			c.Close()
			return address.Port()
		}
	}
}

func loopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// udpSockets counts the sockets that are connected to an address.
func udpSockets(t *testing.T, to netip.AddrPort) int {
	t.Helper()
	table, err := os.ReadFile("/proc/net/udp")
	if err != nil {
		t.Fatal(err)
	}
	four := to.Addr().As4()
	slices.Reverse(four[:])
	remote, n := fmt.Sprintf("%X:%04X", four, to.Port()), 0
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == remote {
			n++
		}
	}
	return n
}

func mustURL(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
