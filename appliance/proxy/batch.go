package proxy

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is how many datagrams one system call takes.
	batchSize = 64
	// slotSize is how far apart datagrams lie in a batch's memory: the longest possible one fits, so
	// that none is ever cut. Only the pages that datagrams reach are ever backed by memory (256 KiB
	// per batch while they are short). It is an odd number of cache lines, or else the beginnings of
	// all datagrams would compete for the same sets of the processor's caches.
	slotSize = 65536 + 64
)

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	length uint32
	_      [unsafe.Sizeof(uintptr(0)) - 4]byte
}

// batch receives datagrams, of several sockets one after the other until it is emptied.
type batch struct {
	memory   []byte // outside of the collector's heap
	messages [batchSize]mmsghdr
	vectors  [batchSize]unix.Iovec
	names    [batchSize]sockaddr
	controls [batchSize][controlSize / 8]uint64
	filled   int // datagrams in it
	dirty    int // messages that must be prepared before the kernel writes to them again
}

// controlSize has room for IPV6_ORIGDSTADDR.
const controlSize = 64

func newBatch() (*batch, error) {
	memory, err := unix.Mmap(-1, 0, batchSize*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("allocating a batch: %w", err)
	}
	b := &batch{memory: memory, dirty: batchSize}
	for i := range b.messages {
		b.vectors[i].Base = &memory[i*slotSize]
		b.vectors[i].SetLen(slotSize)
		m := &b.messages[i]
		m.Iov = &b.vectors[i]
		m.SetIovlen(1)
		m.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		m.Control = (*byte)(unsafe.Pointer(&b.controls[i]))
	}
	return b, nil
}

func (b *batch) close() { unix.Munmap(b.memory) }

// empty forgets the datagrams.
func (b *batch) empty() {
	for i := range b.messages[:b.dirty] {
		m := &b.messages[i]
		m.Namelen = unix.SizeofSockaddrInet6
		m.SetControllen(controlSize)
	}
	b.filled, b.dirty = 0, 0
}

// receive adds what waits at a socket, without blocking, as far as there is room. The new datagrams
// are those from first to before end. An error of the socket, such as an ICMP message that came back,
// is the same as nothing: it concerns a datagram that was sent before.
func (b *batch) receive(fd int) (first, end int) {
	first = b.filled
	free := b.messages[first:]
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&free[0])), uintptr(len(free)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		n = 0
	}
	b.filled = first + int(n)
	b.dirty = min(b.filled+1, batchSize)
	return first, b.filled
}

// payload is the i-th datagram; valid until the batch is emptied.
func (b *batch) payload(i int) []byte {
	start := i * slotSize
	end := start + int(b.messages[i].length)
	return b.memory[start:end:end]
}

// source is who sent the i-th datagram.
func (b *batch) source(i int) (endpoint, bool) { return readSockaddr(&b.names[i]) }

// destination is where the i-th datagram was sent to, if the socket asked to be told.
func (b *batch) destination(i int) (to endpoint, ok bool) {
	length := int(b.messages[i].Controllen)
	for at := 0; at+unix.CmsgLen(0) < length; {
		h := (*unix.Cmsghdr)(unsafe.Add(unsafe.Pointer(&b.controls[i]), at))
		if int(h.Len) <= unix.CmsgLen(0) {
			break
		}
		for _, f := range families {
			if int(h.Level) == f.level && int(h.Type) == f.original {
				return readSockaddr((*sockaddr)(unsafe.Add(unsafe.Pointer(h), unix.CmsgLen(0))))
			}
		}
		at += unix.CmsgSpace(int(h.Len) - unix.CmsgLen(0))
	}
	return to, false
}
