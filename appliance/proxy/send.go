package proxy

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxMessages = 128
	maxVectors  = 1024
	// maxGroup and maxGroupBytes bound what one message may hold for the kernel to cut up: 64 segments
	// (UDP_MAX_SEGMENTS before Linux 6.9), 65,507 bytes.
	maxGroup      = 64
	maxGroupBytes = 65000
	// longestSegment is what an Ethernet frame carries over IPv4. Longer segments gain little.
	longestSegment = 1472
)

// udpSocket is a socket to send on.
type udpSocket struct {
	registration
	// noSegmentation is the length from which on the kernel refused to cut messages up: it must not
	// be longer than the path's MTU, and the path may need what cannot be segmented. 0: not known.
	noSegmentation int
}

// sender gathers datagrams for one socket and sends them with as few system calls as possible, and
// runs of equal length as one message that the kernel cuts up (UDP_SEGMENT, Linux 4.18).
type sender struct {
	socket   *udpSocket
	messages [maxMessages]mmsghdr
	groups   [maxMessages]group
	vectors  [maxVectors]unix.Iovec
	names    [maxMessages]sockaddr
	controls [maxMessages]segmentControl
	count    int // messages
	vector   int // vectors
	result   sent
}

// group is what became one message.
type group struct {
	segment int // length of each datagram but the last
	count   int // datagrams
	bytes   int
	payload int  // bytes without headers
	open    bool // another datagram may join
}

type segmentControl struct {
	unix.Cmsghdr
	segment uint16
	_       [6]byte
}

// sent is what became of the datagrams.
type sent struct {
	packets, bytes int // payload
	lost           int // datagrams that the kernel refused
}

// begin starts sending on a socket.
func (s *sender) begin(socket *udpSocket) {
	s.socket = socket
	s.count, s.vector = 0, 0
	s.result = sent{}
}

// add takes one datagram: header, which may be nil, then payload. Both must stay as they are until
// end. To is nil on a connected socket.
func (s *sender) add(header, payload []byte, to *sockaddr, toLength uint32) {
	if s.count == maxMessages || s.vector+2 > maxVectors {
		s.flush()
	}
	length := len(header) + len(payload)
	if !s.join(length, to) {
		s.start(length, to, toLength)
	}
	g := &s.groups[s.count-1]
	g.count++
	g.bytes += length
	g.payload += len(payload)
	m := &s.messages[s.count-1]
	for _, part := range [...][]byte{header, payload} {
		if len(part) == 0 {
			continue
		}
		s.vectors[s.vector].Base = &part[0]
		s.vectors[s.vector].SetLen(len(part))
		s.vector++
		m.Iovlen++
	}
}

// join reports whether a datagram can be a further segment of the last message.
func (s *sender) join(length int, to *sockaddr) bool {
	if s.count == 0 {
		return false
	}
	g := &s.groups[s.count-1]
	if !g.open || length > g.segment || length == 0 || g.count == maxGroup || g.bytes+length > maxGroupBytes {
		return false
	}
	if to != nil && *to != s.names[s.count-1] {
		return false
	}
	g.open = length == g.segment // a shorter one is the last
	return true
}

func (s *sender) start(length int, to *sockaddr, toLength uint32) {
	m := &s.messages[s.count]
	*m = mmsghdr{}
	m.Iov = &s.vectors[s.vector]
	if to != nil {
		s.names[s.count] = *to
		m.Name = (*byte)(unsafe.Pointer(&s.names[s.count]))
		m.Namelen = toLength
	}
	s.groups[s.count] = group{segment: length, open: length <= longestSegment && (s.socket.noSegmentation == 0 || length < s.socket.noSegmentation)}
	s.count++
}

// end sends what was added since begin.
func (s *sender) end() sent {
	s.flush()
	return s.result
}

func (s *sender) flush() {
	for i := range s.count {
		if g := &s.groups[i]; g.count > 1 {
			c := &s.controls[i]
			c.Level, c.Type = unix.SOL_UDP, unix.UDP_SEGMENT
			c.SetLen(unix.CmsgLen(2))
			c.segment = uint16(g.segment)
			s.messages[i].Control = (*byte)(unsafe.Pointer(c))
			s.messages[i].SetControllen(int(unsafe.Sizeof(*c)))
		}
	}
	told := false
	for next := 0; next < s.count; {
		n, errno := sendmmsg(s.socket.fd, s.messages[next:s.count])
		for _, g := range s.groups[next : next+n] {
			s.result.packets += g.count
			s.result.bytes += g.payload
		}
		next += n
		switch {
		case errno == 0:
			told = false
		case errno == unix.EINTR:
		case errno == unix.ECONNREFUSED && !told:
			told = true // an ICMP answer to an earlier datagram: this one was not tried
		case errno == unix.EAGAIN:
			for _, g := range s.groups[next:s.count] {
				s.result.lost += g.count
			}
			next = s.count // the buffer is full for all of them
		default:
			s.refused(next, errno)
			next++
		}
	}
	s.count, s.vector = 0, 0
}

// refused deals with a message that the kernel will not take.
func (s *sender) refused(i int, errno unix.Errno) {
	g := &s.groups[i]
	switch {
	case g.count == 1:
		s.result.lost++
		return
	case errno == unix.EIO:
		s.socket.noSegmentation = 1 // no checksum offload on the path, or IPsec: no length will do
	case errno == unix.EINVAL, errno == unix.EMSGSIZE:
		s.socket.noSegmentation = g.segment
	default:
		s.result.lost += g.count
		return
	}
	before := s.result.packets
	s.singly(i)
	s.result.bytes += g.payload * (s.result.packets - before) / g.count
}

// singly sends the datagrams of a group one by one.
func (s *sender) singly(i int) {
	whole := s.messages[i]
	vectors := unsafe.Slice(whole.Iov, whole.Iovlen)
	for len(vectors) > 0 {
		length, n := 0, 0
		for length < s.groups[i].segment && n < len(vectors) {
			length += int(vectors[n].Len)
			n++
		}
		one := [1]mmsghdr{whole}
		one[0].Iov = &vectors[0]
		one[0].SetIovlen(n)
		one[0].Control = nil
		one[0].SetControllen(0)
		if sent, _ := sendmmsg(s.socket.fd, one[:]); sent == 1 {
			s.result.packets++
		} else {
			s.result.lost++
		}
		vectors = vectors[n:]
	}
}

func sendmmsg(fd int, messages []mmsghdr) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}
