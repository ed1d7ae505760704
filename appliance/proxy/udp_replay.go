package proxy

import (
	"fmt"

	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// replay sends datagrams on to where their client sent them, in the client's name, so that the server
// knows them as part of the flow that the kernel forwards, and answers the client.
func (s *shard) replay(key flowKey, mark uint32, datagrams [][]byte) Reason {
	if mark == 0 {
		mark = s.server().options.Mark
	}
	fd, err := openReplay(key.client, mark)
	if err != nil {
		s.server().log.Debug("udp flow refused", "client", key.client.addrPort(), "destination", key.remote.addrPort(), "error", err)
		return SocketFailed
	}
	defer unix.Close(fd)
	var to sockaddr
	length := key.remote.writeSockaddr(&to)
	s.flush()
	// No segmentation: it needs more of the path than single datagrams do, and there are few.
	socket := udpSocket{registration: registration{fd: fd}, noSegmentation: 1}
	s.out.begin(&socket)
	for _, d := range datagrams {
		s.out.add(nil, d, &to, length)
	}
	r := s.out.end()
	s.server().traffic(policy.OutboundDirect).up.add(r.packets, r.bytes)
	s.server().refuse(SendFailed, r.lost)
	return 0
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

// handOver ends a flow that the kernel forwards from now on.
func (f *flow) handOver(mark uint32, datagrams [][]byte) {
	s := f.shard
	for len(datagrams) > 0 {
		if refused := s.replay(f.key, mark, datagrams); refused != 0 {
			s.server().refuse(refused, len(datagrams))
		}
		first, end := s.emptied().receive(f.socket.fd)
		datagrams = s.received(first, end)
	}
	f.end()
}
