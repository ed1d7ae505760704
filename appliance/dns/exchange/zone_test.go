package exchange

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestZone asks a server at a link-local address, with the interface as messages have it written. The
// address is in a network namespace of a process of its own, since sockets are opened on any thread.
func TestZone(t *testing.T) {
	const inside = "SIDEGATE_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root: it makes a network namespace")
		}
		c := exec.Command(os.Args[0], "-test.run=^TestZone$", "-test.v")
		c.Env = append(os.Environ(), inside+"=1")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if output, err := c.CombinedOutput(); err != nil || !strings.Contains(string(output), "--- PASS: TestZone") {
			t.Errorf("%v\n%s", err, output)
		}
		return
	}
	for _, args := range []string{
		"link set lo up", "link add eth0 type veth peer name eth1", "link set eth0 up", "link set eth1 up", "address add fe80::53/64 dev eth0 nodad",
	} {
		if output, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, output)
		}
	}
	at := serveUDP(t, "[fe80::53%eth0]:53", func(d datagram) { d.reply(pack(honest(d.Msg))) })
	serveTCP(t, at.String(), func(c *net.TCPConn) { converse(c, honestly) })
	for _, scheme := range []string{"udp", "tcp"} {
		wantA(t, upstream(t, scheme+"://[fe80::53%25eth0]", Options{}), "www.example.")
	}
}
