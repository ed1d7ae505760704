package proxy

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sidegate/appliance/sniff"
)

// sniff waits for the name in what the client says first, no longer than Options.SniffTimeout: then, or
// as soon as it is clear that there is none, the result has none. The bytes stay in the socket, so that the
// relay finds them as if nobody had looked. It reports false if the client is gone, or ctx ended.
func (c *connection) sniff(ctx context.Context, client *net.TCPConn) (told sniff.Result, alive bool) {
	server := c.tcp.server
	raw, err := client.SyscallConn()
	if err != nil {
		return told, false
	}
	client.SetReadDeadline(time.Now().Add(server.options.SniffTimeout))
	stop := context.AfterFunc(ctx, func() { client.SetReadDeadline(longAgo) })
	defer func() {
		if stop() {
			client.SetReadDeadline(time.Time{})
		}
	}()
	var first firstBytes
	err = raw.Read(func(fd uintptr) bool { return c.tcp.look(int(fd), &first) })
	switch {
	case ctx.Err() != nil, first.gone:
		return told, false
	case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
		return told, false
	}
	server.sniffed.count(first.result, err != nil)
	return first.result, true
}

var longAgo = time.Unix(1, 0)

// firstBytes is what is known of the beginning of a client's stream.
type firstBytes struct {
	length int
	result sniff.Result
	gone   bool // reset
}

// look peeks at a socket and reports whether there is no use in waiting for more. The runtime's poller is
// edge-triggered: it calls again whenever something has arrived, and not because of what lies there
// already.
func (t *tcp) look(fd int, f *firstBytes) (done bool) {
	buffer, _ := t.firstBytes.Get().(*[sniff.MaxStream]byte)
	if buffer == nil {
		buffer = new([sniff.MaxStream]byte)
	}
	defer t.firstBytes.Put(buffer)
	for ended := false; ; {
		n, _, err := unix.Recvfrom(fd, buffer[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return false
		case err != nil:
			f.gone = true
			return true
		}
		if n > f.length {
			f.length, f.result = n, sniff.Stream(buffer[:n])
		}
		// Who ended without a word has no result. He may still wait for an answer.
		if f.result.Status != sniff.More || ended {
			return true
		}
		// The end of a stream that lies behind unread bytes shows in no peek. What came before it is
		// all there by now.
		if ended, f.gone = ends(fd); f.gone || !ended {
			return f.gone
		}
	}
}

// ends reports whether the peer has ended its stream (FIN), or the connection (RST).
func ends(fd int) (stream, connection bool) {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(poll, 0); n != 1 || err != nil {
		return false, false // an interrupted poll: what it missed comes as an event
	}
	return poll[0].Revents&unix.POLLRDHUP != 0, poll[0].Revents&unix.POLLERR != 0
}
