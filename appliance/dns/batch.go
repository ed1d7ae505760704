package dns

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is how many datagrams one system call takes.
	batchSize = 64
	// slotSize is how far apart datagrams lie in memory. A longer query is cut and thus malformed. It is an
	// odd number of cache lines, or else the beginnings of all would compete for the same sets of the
	// processor's caches.
	slotSize = 4096 + 64
	// controlSize has room for either family's packet information.
	controlSize = 64
)

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	length uint32
	_      [unsafe.Sizeof(uintptr(0)) - 4]byte
}

// peer is where a datagram came from and where it was sent to, as the kernel reads and writes them: the
// answer goes back with both as they are, but for prepare.
type peer struct {
	name    unix.RawSockaddrInet6 // of either family
	control [controlSize / 8]uint64
}

// batch receives queries, and sends the answers of some of them.
type batch struct {
	family   *family
	memory   []byte // queries, then answers
	in, out  [batchSize]mmsghdr
	vectors  [2 * batchSize]unix.Iovec
	peers    [batchSize]peer
	dirty    int // messages that must be prepared before the kernel writes to them again
	answered int
}

func newBatch(f *family) *batch {
	b := &batch{family: f, memory: make([]byte, 2*batchSize*slotSize), dirty: batchSize}
	for i := range b.vectors {
		b.vectors[i].Base = &b.memory[i*slotSize]
		b.vectors[i].SetLen(slotSize)
	}
	for i := range b.in {
		m := &b.in[i]
		m.Iov = &b.vectors[i]
		m.SetIovlen(1)
		m.Name = (*byte)(unsafe.Pointer(&b.peers[i].name))
		m.Control = (*byte)(unsafe.Pointer(&b.peers[i].control))
		b.out[i].Iov = &b.vectors[batchSize+i]
		b.out[i].SetIovlen(1)
	}
	return b
}

// receive takes what waits at a socket, without blocking. An error of the socket, such as an ICMP message
// that came back, is the same as nothing: it concerns a datagram that was sent before.
func (b *batch) receive(fd int) int {
	for i := range b.in[:b.dirty] {
		m := &b.in[i]
		m.Namelen = unix.SizeofSockaddrInet6
		m.SetControllen(controlSize)
	}
	b.answered = 0
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.in[0])), batchSize, unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		n = 0
	}
	b.dirty = min(int(n)+1, batchSize)
	return int(n)
}

// query is the i-th datagram; valid until the next receive.
func (b *batch) query(i int) []byte {
	start := i * slotSize
	end := start + int(b.in[i].length)
	return b.memory[start:end:end]
}

// answer is where the answer to the i-th query may be written.
func (b *batch) answer(i int) []byte {
	start := (batchSize + i) * slotSize
	return b.memory[start : start : start+slotSize]
}

// put has the answer to the i-th query sent, which lies where answer said.
func (b *batch) put(i, length int) {
	m := &b.out[b.answered]
	m.Iov = &b.vectors[batchSize+i]
	m.Iov.SetLen(length)
	m.Name, m.Namelen = b.in[i].Name, b.in[i].Namelen
	m.Control = b.in[i].Control
	m.SetControllen(unix.CmsgSpace(b.family.infoSize))
	b.answered++
}

// send sends the answers, and returns how many the kernel did not take.
func (b *batch) send(fd int) (lost int) {
	for next := 0; next < b.answered; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.out[next])), uintptr(b.answered-next), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			next += int(n)
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			return lost + b.answered - next // the buffer is full for all of them
		default:
			lost++ // this client cannot be reached
			next++
		}
	}
	return lost
}

// prepare returns who sent the i-th datagram and where to, and turns its packet information into what
// sends the answer from there.
func (b *batch) prepare(i int) (client netip.AddrPort, to netip.Addr, ok bool) {
	p := &b.peers[i]
	h := (*unix.Cmsghdr)(unsafe.Pointer(&p.control))
	if int(b.in[i].Controllen) < unix.CmsgLen(b.family.infoSize) || int(h.Level) != b.family.level || int(h.Type) != b.family.info ||
		int(p.name.Family) != b.family.domain || b.in[i].Flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return client, to, false
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&p.name.Port))[:])
	data := unsafe.Add(unsafe.Pointer(h), unix.CmsgLen(0))
	if b.family.domain == unix.AF_INET {
		info := (*unix.Inet4Pktinfo)(data)
		to = netip.AddrFrom4(info.Addr)
		info.Ifindex, info.Spec_dst = 0, info.Addr
		from := (*unix.RawSockaddrInet4)(unsafe.Pointer(&p.name))
		return netip.AddrPortFrom(netip.AddrFrom4(from.Addr), port), to, true
	}
	info := (*unix.Inet6Pktinfo)(data)
	to = netip.AddrFrom16(info.Addr)
	if !to.IsLinkLocalUnicast() {
		info.Ifindex = 0 // as the routes say
	}
	return netip.AddrPortFrom(netip.AddrFrom16(p.name.Addr), port), to, true
}

// sendTo sends one answer to a peer that prepare has seen.
func (p *peer) sendTo(fd int, f *family, answer []byte) error {
	vector := unix.Iovec{Base: &answer[0]}
	vector.SetLen(len(answer))
	m := unix.Msghdr{
		Name: (*byte)(unsafe.Pointer(&p.name)), Namelen: unix.SizeofSockaddrInet6,
		Iov: &vector, Control: (*byte)(unsafe.Pointer(&p.control)),
	}
	if f.domain == unix.AF_INET {
		m.Namelen = unix.SizeofSockaddrInet4
	}
	m.SetIovlen(1)
	m.SetControllen(unix.CmsgSpace(f.infoSize))
	if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&m)), unix.MSG_DONTWAIT); errno != 0 {
		return fmt.Errorf("sending an answer: %w", errno)
	}
	return nil
}
