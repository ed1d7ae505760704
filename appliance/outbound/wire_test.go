package outbound

import (
	"bytes"
	"io"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// transcript is a server that says what it says, and hears what we say.
type transcript struct {
	reply *strings.Reader
	heard bytes.Buffer
}

func (t *transcript) Read(b []byte) (int, error)  { return t.reply.Read(b) }
func (t *transcript) Write(b []byte) (int, error) { return t.heard.Write(b) }

var targets = []struct {
	to    Destination
	socks string // type, address, port
	text  string
}{
	{Destination{Addr: netip.MustParseAddrPort("1.2.3.4:443")}, "\x01\x01\x02\x03\x04\x01\xbb", "1.2.3.4:443"},
	{Destination{Addr: netip.MustParseAddrPort("[::ffff:1.2.3.4]:443")}, "\x01\x01\x02\x03\x04\x01\xbb", "1.2.3.4:443"},
	{Destination{Addr: netip.MustParseAddrPort("[2001:db8::1]:80")}, "\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50", "[2001:db8::1]:80"},
	{Destination{Addr: netip.MustParseAddrPort("[fe80::1%eth0]:80")}, "\x04\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50", "[fe80::1]:80"},
	{Destination{Addr: netip.MustParseAddrPort("1.2.3.4:443"), Name: "a.example"}, "\x03\x09a.example\x01\xbb", "a.example:443"},
	{Destination{Addr: netip.AddrPortFrom(netip.Addr{}, 443), Name: "a.example"}, "\x03\x09a.example\x01\xbb", "a.example:443"},
	{Destination{Addr: netip.AddrPortFrom(netip.Addr{}, 443), Name: "4_-.XN--p1ai."}, "\x03\x0d4_-.XN--p1ai.\x01\xbb", "4_-.XN--p1ai.:443"},
	{Destination{Addr: netip.AddrPortFrom(netip.Addr{}, 443), Name: strings.Repeat("a", 255)}, "\x03\xff" + strings.Repeat("a", 255) + "\x01\xbb", strings.Repeat("a", 255) + ":443"},
}

// TestWire holds what is sent, byte by byte.
func TestWire(t *testing.T) {
	for _, row := range targets {
		to, err := row.to.wire()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			credentials       Credentials
			reply, hello, web string
		}{
			{Credentials{}, socksConnected, "\x05\x01\x00", ""},
			{Credentials{"me", "pass"}, socksPassword, "\x05\x02\x00\x02" + "\x01\x02me\x04pass", "Proxy-Authorization: Basic bWU6cGFzcw==\r\n"},
		} {
			server := transcript{reply: strings.NewReader(c.reply)}
			made, err := newSOCKS5(upstream{}, c.credentials, nil)
			if err != nil {
				t.Fatal(err)
			}
			s := made.(*socks5)
			if _, err := s.handshake(&server, commandConnect, appendDestination(nil, to)); err != nil {
				t.Error(err)
			}
			if got, want := server.heard.String(), c.hello+"\x05\x01\x00"+row.socks; got != want {
				t.Errorf("socks5 %s: sent %q, want %q", row.text, got, want)
			}

			web, err := newConnect(upstream{}, c.credentials)
			if err != nil {
				t.Fatal(err)
			}
			server = transcript{reply: strings.NewReader(httpConnected)}
			if err := web.handshake(&server, to); err != nil {
				t.Error(err)
			}
			if got, want := server.heard.String(), "CONNECT "+row.text+" HTTP/1.1\r\nHost: "+row.text+"\r\n"+c.web+"\r\n"; got != want {
				t.Errorf("http %s: sent %q, want %q", row.text, got, want)
			}
		}
	}
}

// TestBadDestinations holds what never reaches an upstream, whatever a client's first bytes said.
func TestBadDestinations(t *testing.T) {
	noLeaks(t)
	at := netip.MustParseAddrPort("1.2.3.4:443")
	server := freeAddress(t).String()
	for _, row := range []struct {
		to   Destination
		want string
	}{
		{Destination{Addr: at, Name: "a.example\r\nX: y"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a b"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a\x00b"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a/b"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a:1"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "bücher.example"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "127.0.0.1"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "::1"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "2130706433"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "0x7f000001"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "0x7F.1."}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a.089"}, "is not a DNS name"},
		{Destination{Addr: at, Name: "a.."}, "is not a DNS name"},
		{Destination{Addr: at, Name: "."}, "is not a DNS name"},
		{Destination{Addr: at, Name: strings.Repeat("a", 256)}, "256 bytes long"},
		{Destination{Addr: netip.MustParseAddrPort("1.2.3.4:0")}, "no port"},
		{Destination{}, "no port"},
		{Destination{Addr: netip.AddrPortFrom(netip.Addr{}, 443)}, "neither an address nor a name"},
	} {
		for _, scheme := range []string{"socks5", "http"} {
			_, err := mustNew(t, scheme+"://"+server, Credentials{}, Options{}).DialTCP(t.Context(), row.to)
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%s %q: %v; want %q", scheme, row.to, err, row.want)
			}
			noSecret(t, err) // one line
		}
	}
}

// TestUDPHeader round-trips headers, and cuts them at every byte.
func TestUDPHeader(t *testing.T) {
	a := &Association{Connected: true}
	for text, want := range map[string]string{
		"1.2.3.4:443":          "\x00\x00\x00\x01\x01\x02\x03\x04\x01\xbb",
		"[::ffff:1.2.3.4]:443": "\x00\x00\x00\x01\x01\x02\x03\x04\x01\xbb",
		"[2001:db8::1]:80":     "\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50",
	} {
		to := netip.MustParseAddrPort(text)
		header := a.Header(to)
		if string(header) != want || len(header) > udpHeaderRoom {
			t.Errorf("the header of %s is %q, want %q", text, header, want)
		}
		for n := range header {
			if _, _, err := a.Parse(header[:n]); err != errUDPTruncated {
				t.Errorf("%s cut to %d bytes: %v", text, n, err)
			}
		}
		for _, payload := range []string{"", "x"} {
			from, offset, err := a.Parse(append(header, payload...))
			if err != nil || from != unmap(to) || offset != len(header) {
				t.Errorf("%s came back as %v, %d, %v", text, from, offset, err)
			}
		}
	}
	mapped := []byte("\x00\x00\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x01\x02\x03\x04\x01\xbb")
	if from, _, err := a.Parse(mapped); err != nil || from != destination.Addr {
		t.Errorf("an IPv4 sender as IPv6 is %v, %v", from, err)
	}
	for packet, want := range map[string]error{
		"\x00\x00\x01\x01\x01\x02\x03\x04\x01\xbbx": errUDPFragment,
		"\x00\x00\x80\x01\x01\x02\x03\x04\x01\xbbx": errUDPFragment,
		"\x00\x00\x00\x03\x01a\x01\xbbx":            errUDPName,
		"\x00\x00\x00\x02\x01\x02\x03\x04\x01\xbbx": errUDPAddress,
	} {
		if _, _, err := a.Parse([]byte(packet)); err != want {
			t.Errorf("%q: %v, want %v", packet, err, want)
		}
	}
	if header := new(Association).Header(destination.Addr); header != nil {
		t.Errorf("a direct header: %q", header)
	}
}

func TestParseDoesNotAllocate(t *testing.T) {
	a := &Association{Connected: true}
	good := append(a.Header(netip.MustParseAddrPort("[2001:db8::1]:80")), "payload"...)
	bad := []byte("\x00\x00\x01\x01")
	if n := testing.AllocsPerRun(100, func() {
		a.Parse(good)
		a.Parse(bad)
	}); n != 0 {
		t.Errorf("%v allocations per datagram", n)
	}
}

// TestNames round-trips socket addresses of both kinds of direct socket.
func TestNames(t *testing.T) {
	for _, row := range []struct {
		family uint16
		to     string
		length uint32
		back   string
	}{
		{unix.AF_INET6, "1.2.3.4:443", unix.SizeofSockaddrInet6, "1.2.3.4:443"},
		{unix.AF_INET6, "[::ffff:1.2.3.4]:443", unix.SizeofSockaddrInet6, "1.2.3.4:443"},
		{unix.AF_INET6, "[2001:db8::1]:80", unix.SizeofSockaddrInet6, "[2001:db8::1]:80"},
		{unix.AF_INET, "1.2.3.4:443", unix.SizeofSockaddrInet4, "1.2.3.4:443"},
		{unix.AF_INET, "[::ffff:1.2.3.4]:443", unix.SizeofSockaddrInet4, "1.2.3.4:443"},
		{unix.AF_INET, "[2001:db8::1]:80", 0, ""},
	} {
		a := &Association{family: row.family}
		name := unix.RawSockaddrInet6{Scope_id: 7, Flowinfo: 7}
		if length := a.PutName(&name, netip.MustParseAddrPort(row.to)); length != row.length {
			t.Errorf("%s: %d bytes, want %d", row.to, length, row.length)
		}
		if row.length == 0 {
			continue
		}
		if row.family == unix.AF_INET6 && (name.Scope_id != 0 || name.Flowinfo != 0) {
			t.Errorf("%s: left over: %+v", row.to, name)
		}
		if back := a.GetName(&name); back.String() != row.back {
			t.Errorf("%s came back as %s", row.to, back)
		}
	}
}

// FuzzUDPHeader holds that whatever parses is what would be sent, and nothing is read beyond the packet.
func FuzzUDPHeader(f *testing.F) {
	for _, row := range targets {
		f.Add([]byte("\x00\x00\x00" + row.socks + "payload"))
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		from, offset, err := parseUDPHeader(bytes.Clone(packet)[:len(packet):len(packet)])
		if err != nil {
			if offset != 0 || from.IsValid() {
				t.Errorf("an error with a result: %v, %d", from, offset)
			}
			return
		}
		if offset > len(packet) || !from.IsValid() || from.Addr().Is4In6() {
			t.Fatalf("%v at %d of %d", from, offset, len(packet))
		}
		header := appendUDPHeader(nil, from)
		again, n, err := parseUDPHeader(header)
		if err != nil || again != from || n != len(header) {
			t.Errorf("%v became %v, %d, %v", from, again, n, err)
		}
		mapped := packet[3] == addressIPv6 && from.Addr().Is4()
		if !mapped && !bytes.Equal(header[3:], packet[3:offset]) {
			t.Errorf("%v was read from %q, and is written as %q", from, packet[:offset], header)
		}
	})
}

// FuzzReply holds that a success consumes exactly the header, whatever follows, and that nothing
// makes it read more than the limit.
func FuzzReply(f *testing.F) {
	for _, seed := range []string{httpConnected, httpInterim, "HTTP/1.0 200\n\n", "HTTP/1.1 407 x\r\n", "HTTP/1.1 200 OK\r\nA"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, reply []byte) {
		r := bytes.NewReader(reply)
		status, err := readReply(r)
		used := len(reply) - r.Len()
		if used > maxReply {
			t.Errorf("%d bytes were read", used)
		}
		if err != nil {
			if status != 0 {
				t.Errorf("an error with a status: %d", status)
			}
			return
		}
		if status < 101 || status > 999 {
			t.Errorf("status %d", status)
		}
		head := reply[:used]
		if status < 300 && status >= 200 && !bytes.HasSuffix(head, []byte("\n\n")) && !bytes.HasSuffix(head, []byte("\n\r\n")) {
			t.Errorf("the header ends as %q", head)
		}
		for _, more := range []string{"", "tunnel\r\n\r\n"} {
			again := io.MultiReader(bytes.NewReader(head), strings.NewReader(more))
			if s, err := readReply(again); s != status || err != nil {
				t.Errorf("with %q after it: %d, %v", more, s, err)
			}
			if rest, _ := io.ReadAll(again); string(rest) != more {
				t.Errorf("of what follows, %q is left", rest)
			}
		}
		if s, err := readReply(bytes.NewReader(head[:used-1])); err == nil {
			t.Errorf("one byte less: %d", s)
		}
	})
}

// FuzzSOCKS5 holds that no server's answers make the handshake panic, or read what belongs to the flow.
func FuzzSOCKS5(f *testing.F) {
	for _, d := range dialogues {
		f.Add([]byte(d.reply))
	}
	f.Fuzz(func(t *testing.T, reply []byte) {
		for _, c := range []Credentials{{}, {"me", "pass"}} {
			server := transcript{reply: strings.NewReader(string(reply))}
			made, err := newSOCKS5(upstream{}, c, nil)
			if err != nil {
				t.Fatal(err)
			}
			s := made.(*socks5)
			bound, err := s.handshake(&server, commandConnect, nil)
			used := len(reply) - server.reply.Len()
			if used > 2+2+4+1+255+2 {
				t.Errorf("%d bytes were read", used)
			}
			if err != nil {
				continue
			}
			server = transcript{reply: strings.NewReader(string(reply[:used]))}
			if again, err := s.handshake(&server, commandConnect, nil); again != bound || err != nil {
				t.Errorf("exactly the reply: %v, %v", again, err)
			}
			server = transcript{reply: strings.NewReader(string(reply[:used-1]))}
			if _, err := s.handshake(&server, commandConnect, nil); err == nil {
				t.Error("one byte less succeeded")
			}
		}
	})
}
