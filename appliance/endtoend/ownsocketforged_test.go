package endtoend

import (
	bytes "encoding/binary" // binary is the program
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/lab"
)

// forge has a host send a datagram to the box's MAC address, from whom it likes.
func (w *socketWorld) forge(t *testing.T, by *lab.Host, from, to netip.AddrPort) {
	t.Helper()
	udp := make([]byte, 8, 16)
	bytes.BigEndian.PutUint16(udp, from.Port())
	bytes.BigEndian.PutUint16(udp[2:], to.Port())
	udp = append(udp, "forged!!"...)
	bytes.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	ether, header := uint16(lab.EtherIPv4), make([]byte, 20)
	addresses := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	if from.Addr().Is6() {
		ether, header = lab.EtherIPv6, make([]byte, 40)
		header[0], header[6], header[7] = 0x60, unix.IPPROTO_UDP, 64
		bytes.BigEndian.PutUint16(header[4:], uint16(len(udp)))
		copy(header[8:], addresses)
		bytes.BigEndian.PutUint16(udp[6:], checksum(append(append([]byte{}, addresses...), 0, 0, 0, byte(len(udp)), 0, 0, 0, unix.IPPROTO_UDP), udp))
	} else {
		header[0], header[8], header[9] = 0x45, 64, unix.IPPROTO_UDP
		bytes.BigEndian.PutUint16(header[2:], uint16(len(header)+len(udp)))
		copy(header[12:], addresses)
		bytes.BigEndian.PutUint16(header[10:], checksum(header))
	}
	frame := append(append([]byte{}, w.sidegate().MAC()...), by.MAC()...)
	frame = bytes.BigEndian.AppendUint16(frame, ether)
	frame = append(append(frame, header...), udp...)
	need(t, by.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: by.Interface().Index})
	}))
}

// checksum is that of RFC 1071.
func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, p := range parts {
		for i := 0; i+1 < len(p); i += 2 {
			sum += uint32(bytes.BigEndian.Uint16(p[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// TestOwnForged: what comes from the LAN by an address that only the box itself has, or into a flow of the box itself, is dropped and
// counted, and arrives nowhere. What breaks it is a program that knows flows by their addresses only.
func TestOwnForged(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	drops := func() uint64 { return w.status(t).Drops["own_forged"] }
	for _, from := range []string{"127.83.0.1", "127.83.0.2", "::1", "fd53:4753::2", "fd53:4753::fff0"} {
		source := netip.MustParseAddr(from)
		f := w.families()[0]
		if source.Is6() {
			f = w.families()[2]
		}
		for _, port := range []uint16{proxiedPort, directPort, 53} {
			t.Run(fmt.Sprint(from, " to ", port), func(t *testing.T) {
				before := drops()
				w.forge(t, w.laptop(), netip.AddrPortFrom(source, 5555), f.at(port))
				need(t, lab.Wait(t.Context(), "the forged packet to be counted", func() error {
					if n := drops() - before; n != 1 {
						return fmt.Errorf("own_forged counts %d", n)
					}
					return nil
				}))
			})
		}
	}
	for _, f := range w.families() {
		t.Run("into a flow "+f.name, func(t *testing.T) {
			s := w.udp(t, f)
			s.bind(t, netip.AddrPortFrom(f.box, 9995))
			s.asks(t, f, proxiedPort, 100)
			before, seen := drops(), len(w.witnessed(proxiedPort))
			w.forge(t, w.laptop(), netip.AddrPortFrom(f.box, 9995), f.at(proxiedPort))
			need(t, lab.Wait(t.Context(), "the forged packet to be counted", func() error {
				if n := drops() - before; n != 1 {
					return fmt.Errorf("own_forged counts %d", n)
				}
				return nil
			}))
			s.asks(t, f, proxiedPort, 100)
			if n := len(w.witnessed(proxiedPort)) - seen; n != 1 {
				t.Errorf("%d datagrams arrived, want the true one", n)
			}
			s.close()
		})
	}
}

// TestOwnPublished: the replies of a UDP service of the box that is published go to the client who came from outside, from the address that
// he asked, though the policy proxies all; whether the service is bound to that address, to none, or says with each reply from where it
// is. What breaks it is a reply that is taken for a flow of the box's own.
func TestOwnPublished(t *testing.T) {
	w := newSocketWorld(t)
	published := "published:\n"
	for _, a := range []netip.Addr{w.sidegate().Addr4(), w.sidegate().Addr6()} {
		for _, port := range []int{5001, 5002, 5003} {
			published += fmt.Sprintf("  - { address: %q, port: %d, network: udp }\n", a, port)
		}
	}
	w.startOwn(t, published, "default: hk")
	w.inAll(t, "service", func(t *testing.T, f family) {
		for how, service := range map[string]struct {
			at   netip.AddrPort
			info bool
		}{
			"bound to the address": {netip.AddrPortFrom(f.box, 5001), false},
			"bound to none":        {netip.AddrPortFrom(unspecified(f), 5002), false},
			"with a source":        {netip.AddrPortFrom(unspecified(f), 5003), true},
		} {
			s := w.udp(t, f)
			s.bind(t, service.at)
			at := netip.AddrPortFrom(f.box, service.at.Port())
			client, err := w.server().Dial(t.Context(), "udp", at.String())
			need(t, err)
			defer client.Close()
			for range 2 {
				_, err = client.Write([]byte("hello"))
				need(t, err)
				b := make([]byte, 16)
				n, from, err := s.from(b)
				need(t, err)
				if service.info {
					err = unix.Sendmsg(s.fd, b[:n], packetInfo(f.domain == unix.AF_INET6, f.box, 0), from, 0)
				} else {
					err = unix.Sendto(s.fd, b[:n], 0, from)
				}
				if err != nil {
					t.Fatalf("%s: replying: %v", how, err)
				}
				need(t, client.SetReadDeadline(time.Now().Add(3*time.Second)))
				if n, err = client.Read(b); err != nil || string(b[:n]) != "hello" {
					t.Errorf("%s: the client got %q, %v", how, b[:n], err)
				}
			}
			s.close()
		}
	})
	if n := w.status(t).Proxy.Sessions; n != 0 {
		t.Errorf("%d sessions are proxied", n)
	}
}
