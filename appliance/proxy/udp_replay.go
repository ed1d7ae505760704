package proxy

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// replay sends datagrams on to where their client sent them, in the client's name, so that the server
// knows them as part of the flow that the kernel forwards, and answers the client. They have the mark, which the
// socket has not: that is known as the daemon's own.
func (s *shard) replay(key flowKey, mark uint32, datagrams [][]byte) Reason {
	fd, err := openReplay(key.client, s.server().options.Mark)
	if err != nil {
		s.server().log.Debug("udp flow refused", "client", key.client.addrPort(), "destination", key.remote.addrPort(), "error", err)
		return SocketFailed
	}
	defer unix.Close(fd)
	to, marked, up := key.remote.sockaddr(), markMessage(mark), &s.server().traffic(policy.OutboundDirect).up
	for _, d := range datagrams { // one by one: there are few
		if _, err := unix.SendmsgN(fd, d, marked, to, unix.MSG_DONTWAIT); err != nil {
			s.server().refuse(SendFailed, 1)
			continue
		}
		up.add(1, len(d))
	}
	return 0
}

// markMessage is the control message that gives one datagram another firewall mark than its socket's, if it is not 0
// (Linux 5.5).
func markMessage(mark uint32) []byte {
	if mark == 0 {
		return nil
	}
	b := make([]byte, unix.CmsgSpace(4))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SO_MARK
	h.SetLen(unix.CmsgLen(4))
	binary.NativeEndian.PutUint32(b[unix.CmsgLen(0):], mark)
	return b
}

// openReplay opens a socket bound to a client's address. It must not be connected, not for a moment:
// the kernel would take the server's answers, which it is to forward, for this socket's (early demux),
// and ip_forward drops what has a socket.
func openReplay(client endpoint, mark uint32) (fd int, err error) {
	f := familyOf(client)
	return f.openUDP(func(fd int) error {
		if err := f.setTransparent(fd, mark); err != nil {
			return err
		}
		// The client may be the remote of somebody else's flow.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return fmt.Errorf("sharing a udp address: %w", err)
		}
		growBuffers(fd, flowBuffer)
		if err := unix.Bind(fd, client.sockaddr()); err != nil {
			return fmt.Errorf("binding a udp socket to %s: %w", client.addrPort(), err)
		}
		return nil
	})
}
