package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What servers say, whole. Each is sent at once, before our side has asked: only the reading matters.
const (
	socksConnected  = "\x05\x00" + "\x05\x00\x00\x01\x0a\x00\x00\x07\x12\x34"
	socksConnected6 = "\x05\x00" + "\x05\x00\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x12\x34"
	socksNamed      = "\x05\x00" + "\x05\x00\x00\x03\x02hk\x12\x34"
	socksPassword   = "\x05\x02" + "\x01\x00" + "\x05\x00\x00\x01\x0a\x00\x00\x07\x12\x34"
	httpConnected   = "HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"
	httpInterim     = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + httpConnected
)

var (
	secret      = Credentials{user, password}
	destination = Destination{Addr: netip.MustParseAddrPort("1.2.3.4:443")}
)

// dialogue is one handshake that can go wrong.
type dialogue struct {
	name        string
	scheme      string
	credentials Credentials
	associate   bool
	reply       string
}

var dialogues = []dialogue{
	{"socks5", "socks5", Credentials{}, false, socksConnected},
	{"socks5 v6", "socks5", Credentials{}, false, socksConnected6},
	{"socks5 name", "socks5", Credentials{}, false, socksNamed},
	{"socks5 password", "socks5", secret, false, socksPassword},
	{"socks5 udp", "socks5", secret, true, socksPassword},
	{"http", "http", secret, false, httpConnected},
	{"http interim", "http", secret, false, httpInterim},
	{"https", "https", secret, false, "\x16\x03\x03\x00"},
}

// begin does what the dialogue is about and closes what came of it.
func (d dialogue) begin(t *testing.T, ctx context.Context, server netip.AddrPort, o Options) error {
	t.Helper()
	made := mustNew(t, d.scheme+"://"+server.String(), d.credentials, o)
	var opened io.Closer
	var err error
	if d.associate {
		opened, err = made.AssociateUDP(ctx)
	} else {
		opened, err = made.DialTCP(ctx, destination)
	}
	if err == nil {
		opened.Close()
		return nil
	}
	noSecret(t, err)
	for _, text := range []string{`through "hk"`, server.String()} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	return err
}

// TestBrokenOff ends each handshake after each byte, in each way that a server can.
func TestBrokenOff(t *testing.T) {
	ways := []struct {
		name    string
		end     func(c *net.TCPConn)
		timeout time.Duration
		want    []string
	}{
		// Only a server that hangs should ever meet the timeout.
		{"half-closes", func(c *net.TCPConn) { c.CloseWrite(); io.Copy(io.Discard, c) }, time.Minute, []string{"closed the connection during the handshake"}},
		{"resets", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, time.Minute, []string{"connection reset by peer", "broken pipe"}},
		{"hangs", func(c *net.TCPConn) { io.Copy(io.Discard, c) }, 500 * time.Millisecond, []string{"did not finish the handshake in time"}},
	}
	for _, d := range dialogues {
		for _, way := range ways {
			t.Run(d.name+" "+way.name, func(t *testing.T) {
				noLeaks(t)
				var all sync.WaitGroup
				for n := range len(d.reply) {
					server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
						c.Read(make([]byte, 1)) // the handshake has begun
						io.WriteString(c, d.reply[:n])
						way.end(c)
					})
					all.Go(func() {
						begun := time.Now()
						err := d.begin(t, t.Context(), server, Options{Timeout: way.timeout})
						switch {
						case err == nil:
							t.Errorf("after %d bytes: succeeded", n)
						case errors.Is(err, ErrRefused), !slices.ContainsFunc(way.want, func(text string) bool { return strings.Contains(err.Error(), text) }):
							t.Errorf("after %d bytes: %v; want %q", n, err, way.want)
						}
						if took := time.Since(begun); took > 5*time.Second {
							t.Errorf("after %d bytes: took %v", n, took)
						}
					})
				}
				all.Wait()
			})
		}
	}
}

// TestWrongAnswers has servers that answer, but not as they should.
func TestWrongAnswers(t *testing.T) {
	long := strings.Repeat("x", maxReply)
	rows := []struct {
		dialogue
		want    string
		refused bool
	}{
		{dialogue{"an http server", "socks5", Credentials{}, false, "HTTP/1.1 400 Bad Request\r\n\r\n"}, "replied with socks version 72 instead of 5", false},
		{dialogue{"version 4", "socks5", Credentials{}, false, "\x04\x00"}, "replied with socks version 4 instead of 5", false},
		{dialogue{"wants credentials", "socks5", Credentials{}, false, "\x05\xff"}, "refused: it wants credentials and none are configured", true},
		{dialogue{"takes no method", "socks5", secret, false, "\x05\xff"}, "refused: it takes neither a username and password nor no authentication", true},
		{dialogue{"gssapi", "socks5", secret, false, "\x05\x01"}, "chose the authentication method 1, which was not offered", false},
		{dialogue{"password unasked", "socks5", Credentials{}, false, "\x05\x02"}, "chose the authentication method 2, which was not offered", false},
		{dialogue{"authentication version", "socks5", secret, false, "\x05\x02\x05\x00"}, "replied with authentication version 5 instead of 1", false},
		{dialogue{"wrong password", "socks5", secret, false, "\x05\x02\x01\x01"}, "refused: it did not accept the username and password", true},
		{dialogue{"reply version", "socks5", Credentials{}, false, "\x05\x00\x00\x00\x00\x01"}, "replied with socks version 0 instead of 5", false},
		{dialogue{"ruleset", "socks5", Credentials{}, false, "\x05\x00\x05\x02\x00\x01"}, "refused: connection not allowed by ruleset (2)", true},
		{dialogue{"unknown reply", "socks5", Credentials{}, false, "\x05\x00\x05\xc8\x00\x01"}, "refused: unknown reply (200)", true},
		{dialogue{"address type", "socks5", Credentials{}, false, "\x05\x00\x05\x00\x00\x07"}, "replied with an address of unknown type 7", false},
		{dialogue{"relay by name", "socks5", Credentials{}, true, socksNamed}, "named its udp relay by a domain: only an address is supported", false},
		{dialogue{"relay without port", "socks5", Credentials{}, true, "\x05\x00\x05\x00\x00\x01\x0a\x00\x00\x07\x00\x00"}, "named no port for its udp relay", false},
		{dialogue{"relay everywhere", "socks5", Credentials{}, true, "\x05\x00\x05\x00\x00\x01\xff\xff\xff\xff\x12\x34"}, "named 255.255.255.255 as its udp relay, which is not the address of a server", false},

		{dialogue{"a socks server", "http", Credentials{}, false, "\x05\xff\n"}, "did not answer in HTTP/1.x", false},
		{dialogue{"http/2", "http", Credentials{}, false, "HTTP/2 200\r\n\r\n"}, "did not answer in HTTP/1.x", false},
		{dialogue{"no number", "http", Credentials{}, false, "HTTP/1.1 2x0 OK\r\n\r\n"}, "did not answer in HTTP/1.x", false},
		{dialogue{"long number", "http", Credentials{}, false, "HTTP/1.1 2000 OK\r\n\r\n"}, "did not answer in HTTP/1.x", false},
		{dialogue{"early number", "http", Credentials{}, false, "HTTP/1.1 099 OK\r\n\r\n"}, "did not answer in HTTP/1.x", false},
		{dialogue{"endless line", "http", Credentials{}, false, long}, "sent a reply header of more than 16384 bytes", false},
		{dialogue{"endless field", "http", Credentials{}, false, "HTTP/1.1 200 OK\r\nA: " + long}, "sent a reply header of more than 16384 bytes", false},
		{dialogue{"endless interim", "http", Credentials{}, false, strings.Repeat("HTTP/1.1 100\r\n\r\n", maxReply/16+1)}, "sent a reply header of more than 16384 bytes", false},
		{dialogue{"forbidden", "http", Credentials{}, false, "HTTP/1.1 403 hunter2-canary\r\n"}, "refused: 403 Forbidden", true},
		{dialogue{"switching", "http", Credentials{}, false, "HTTP/1.1 101 x\r\n"}, "refused: 101 Switching Protocols", true},
		{dialogue{"redirect", "http", Credentials{}, false, "HTTP/1.1 302 x\r\n"}, "refused: 302 Found", true},
		{dialogue{"unknown status", "http", Credentials{}, false, "HTTP/1.1 799 \r\n"}, "refused: 799", true},
		{dialogue{"password unset", "http", Credentials{}, false, "HTTP/1.1 407 x\r\n"}, "refused: 407 Proxy Authentication Required (none is configured)", true},
		{dialogue{"password unknown", "http", secret, false, "HTTP/1.1 407 x\r\n"}, "refused: 407 Proxy Authentication Required (it did not accept the username and password)", true},

		{dialogue{"plain http", "https", secret, false, httpConnected}, "failed the tls handshake: ", false},
	}
	for _, row := range rows {
		t.Run(row.scheme+" "+row.name, func(t *testing.T) {
			noLeaks(t)
			server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
				io.WriteString(c, row.reply)
				io.Copy(io.Discard, c)
			})
			err := row.begin(t, t.Context(), server, Options{Timeout: 10 * time.Second})
			if err == nil {
				t.Fatal("succeeded")
			}
			if !strings.Contains(err.Error(), row.want) || errors.Is(err, ErrRefused) != row.refused {
				t.Errorf("%v: want %q, ErrRefused %v", err, row.want, row.refused)
			}
		})
	}
}

// TestRefusalsAsErrno holds that a refusal by a SOCKS5 server looks like that of an own connection.
func TestRefusalsAsErrno(t *testing.T) {
	for code, want := range map[byte]error{3: syscall.ENETUNREACH, 4: syscall.EHOSTUNREACH, 5: syscall.ECONNREFUSED} {
		s := &socks5{}
		_, err := s.handshake(&transcript{reply: strings.NewReader("\x05\x00\x05" + string(rune(code)))}, commandConnect, nil)
		if errors.Is(err, want) {
			t.Errorf("reply %d was taken without its reserved and type bytes", code)
		}
		_, err = s.handshake(&transcript{reply: strings.NewReader("\x05\x00\x05" + string(rune(code)) + "\x00\x01")}, commandConnect, nil)
		if !errors.Is(err, want) || !errors.Is(err, ErrRefused) {
			t.Errorf("reply %d is %v; want %v", code, err, want)
		}
	}
}

// TestEarlyData has servers whose first bytes of the flow stand in the same segment as the reply, and
// others that send each byte of it alone. Nothing may be lost.
func TestEarlyData(t *testing.T) {
	const early = "220 mail.example ready\r\n\r\n"
	replies := []dialogue{
		{"socks5", "socks5", Credentials{}, false, socksConnected},
		{"socks5 v6", "socks5", Credentials{}, false, socksConnected6},
		{"socks5 name", "socks5", Credentials{}, false, socksNamed},
		{"socks5 empty name", "socks5", Credentials{}, false, "\x05\x00\x05\x00\x00\x03\x00\x12\x34"},
		{"socks5 password", "socks5", secret, false, socksPassword},
		{"socks5 password not needed", "socks5", secret, false, socksConnected},
		{"http", "http", secret, false, httpConnected},
		{"http interim", "http", secret, false, httpInterim},
		{"http with a length", "http", secret, false, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"},
		{"http chunked", "http", secret, false, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"http/1.0", "http", secret, false, "HTTP/1.0 200\r\n\r\n"},
		{"http 204", "http", secret, false, "HTTP/1.1 204 No Content\r\n\r\n"},
		{"http line feeds", "http", secret, false, "HTTP/1.1 200 OK\nVia: x\n\n"},
	}
	for _, d := range replies {
		for _, step := range []int{1, 1 << 20} {
			t.Run(fmt.Sprintf("%s by %d", d.name, step), func(t *testing.T) {
				noLeaks(t)
				server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
					writeBy(c, d.reply+early, step)
					c.CloseWrite()
					io.Copy(io.Discard, c)
				})
				c, err := mustNew(t, d.scheme+"://"+server.String(), d.credentials, Options{}).DialTCP(t.Context(), destination)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if got, err := io.ReadAll(c); string(got) != early || err != nil {
					t.Errorf("read %q, %v; want %q", got, err, early)
				}
			})
		}
	}
	t.Run("https", func(t *testing.T) {
		noLeaks(t)
		authority, key := certificate(t)
		pair, err := tls.LoadX509KeyPair(authority, key)
		if err != nil {
			t.Fatal(err)
		}
		server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}})
			io.WriteString(s, httpConnected+early)
			s.CloseWrite()
			io.Copy(io.Discard, s)
		})
		url := "https://" + server.String() + "?server_name=proxy.example&ca_file=" + authority
		c, err := mustNew(t, url, secret, Options{}).DialTCP(t.Context(), destination)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, err := io.ReadAll(c); string(got) != early || err != nil {
			t.Errorf("read %q, %v; want %q", got, err, early)
		}
	})
}

func writeBy(w io.Writer, text string, step int) {
	for len(text) > 0 {
		n := min(step, len(text))
		io.WriteString(w, text[:n])
		text = text[n:]
	}
}

// TestOutlivesTimeout holds that the handshake's deadline ends with the handshake.
func TestOutlivesTimeout(t *testing.T) {
	const timeout = 200 * time.Millisecond
	for _, d := range []dialogue{{"", "socks5", Credentials{}, false, socksConnected}, {"", "http", Credentials{}, false, httpConnected}} {
		server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
			io.WriteString(c, d.reply)
			<-time.After(3 * timeout / 2) // the passing of time is what is tested
			io.WriteString(c, "late")
			c.CloseWrite()
			io.Copy(io.Discard, c)
		})
		ctx, cancel := context.WithCancel(t.Context())
		c, err := mustNew(t, d.scheme+"://"+server.String(), d.credentials, Options{Timeout: timeout}).DialTCP(ctx, destination)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if got, err := io.ReadAll(c); string(got) != "late" || err != nil {
			t.Errorf("%s: read %q, %v", d.scheme, got, err)
		}
		c.Close()
	}
}

// TestCancelled cancels a handshake while the server is silent.
func TestCancelled(t *testing.T) {
	for _, d := range dialogues {
		t.Run(d.name, func(t *testing.T) {
			noLeaks(t)
			ctx, cancel := context.WithCancel(t.Context())
			server := serve(t, "127.0.0.1:0", func(c *net.TCPConn) {
				c.Read(make([]byte, 1)) // the handshake has begun
				cancel()
				io.Copy(io.Discard, c)
			})
			if err := d.begin(t, ctx, server, Options{}); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled in the handshake: %v", err)
			}
			if err := d.begin(t, ctx, server, Options{}); err == nil || !strings.Contains(err.Error(), "cannot be reached: operation was canceled") {
				t.Errorf("cancelled before: %v", err)
			}
		})
	}
}

// TestUnreachable has upstreams that do not even accept.
func TestUnreachable(t *testing.T) {
	limits := Options{DialTimeout: 300 * time.Millisecond}
	for _, d := range dialogues {
		if d.credentials == (Credentials{}) {
			continue // nothing is said before the connection is there: one of each kind is enough
		}
		t.Run(d.name, func(t *testing.T) {
			noLeaks(t)
			closed := freeAddress(t)
			if err := d.begin(t, t.Context(), closed, limits); !errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, ErrRefused) {
				t.Errorf("refused: %v", err)
			}
			begun := time.Now()
			err := d.begin(t, t.Context(), fullListener(t), limits)
			if err == nil || !strings.Contains(err.Error(), "cannot be reached: i/o timeout") {
				t.Errorf("silent: %v", err)
			}
			if took := time.Since(begun); took > 3*time.Second {
				t.Errorf("silent: took %v", took)
			}
		})
	}
}

func freeAddress(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// fullListener is an address that drops SYNs, since its backlog is full: as an upstream behind a
// firewall does.
func fullListener(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
	for range 10 {
		c, err := net.DialTimeout("tcp", address.String(), 200*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the backlog does not fill")
	return address
}
