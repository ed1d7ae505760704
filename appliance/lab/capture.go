package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Capture counts the packets that pass an interface, in both directions, by their headers. It sees received packets
// before tc does and sent ones after it, so that what a tc program drops counts as received and not as sent. TCP
// packets are counted as the kernel moves them inside a machine: up to 64 KiB each, whatever the MTU.
type Capture struct {
	where  string
	ring   *ring
	forget func() // takes the capture off the lab's list
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once

	mu      sync.Mutex
	counts  map[header]*Counts
	total   Counts
	dropped uint64
	err     error
	closed  bool
}

// Counts are packets and bytes with their Ethernet headers; Largest is the size of the largest packet.
type Counts struct {
	Packets, Bytes uint64
	Largest        int
}

// Capture starts counting on the host's first interface. The lab closes it if the caller does not.
func (h *Host) Capture() (*Capture, error) { return h.CaptureOn(h.interfaces[0].Name) }

// CaptureOn starts counting on an interface. It keeps one entry of some 150 bytes for each distinct header.
func (h *Host) CaptureOn(name string) (*Capture, error) {
	c := &Capture{
		where:  h.name + "/" + name,
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
		forget: func() {},
		counts: make(map[header]*Counts),
	}
	err := h.Do(func() (err error) {
		c.ring, err = newRing(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("capturing on %s: %w", c.where, err)
	}
	go c.drainRegularly()
	forget, ok := h.lab.onClose(func() error {
		_, err := c.Close()
		if errors.As(err, new(DropError)) {
			return nil // whoever counted has been told
		}
		return err
	})
	if !ok {
		c.Close()
		return nil, errClosed
	}
	c.forget = forget
	return c, nil
}

// DropError says that the kernel had no room for packets: counts are too small.
type DropError struct {
	Where   string // host/interface
	Dropped uint64
}

func (e DropError) Error() string {
	return fmt.Sprintf("the capture on %s missed %d packets, so its counts are too small", e.Where, e.Dropped)
}

// Count adds up the packets that match, among all that passed before the call. It fails with a DropError if any packet
// was missed, so that no zero can be wrong.
func (c *Capture) Count(match func(Packet) bool) (Counts, error) {
	var sum Counts
	for p, n := range c.All() {
		if match(p) {
			sum.add(n)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return sum, c.problem()
}

// All iterates over the distinct headers seen so far, in no order.
func (c *Capture) All() iter.Seq2[Packet, Counts] {
	return func(yield func(Packet, Counts) bool) {
		c.mu.Lock()
		c.drain()
		packets := make([]Packet, 0, len(c.counts))
		counts := make([]Counts, 0, len(c.counts))
		for h, n := range c.counts {
			packets = append(packets, h.packet())
			counts = append(counts, *n)
		}
		c.mu.Unlock()
		for i := range packets {
			if !yield(packets[i], counts[i]) {
				return
			}
		}
	}
}

// Reset forgets what was counted, for example what building up a connection took.
func (c *Capture) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain()
	clear(c.counts)
	c.total = Counts{}
}

// Close ends the capture and returns the sum of everything. It fails like Count. Counting afterwards still works, on
// what was seen before.
func (c *Capture) Close() (Counts, error) {
	c.once.Do(func() {
		c.forget()
		close(c.stop)
		<-c.done
		c.mu.Lock()
		defer c.mu.Unlock()
		c.drain()
		c.closed = true
		if err := c.ring.close(); err != nil && c.err == nil {
			c.err = fmt.Errorf("closing the capture on %s: %w", c.where, err)
		}
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total, c.problem()
}

func (c *Capture) problem() error {
	if c.err == nil && c.dropped > 0 {
		return DropError{c.where, c.dropped}
	}
	return c.err
}

// drainRegularly empties the ring every few milliseconds. Waking up for each packet instead would take processor time
// from the traffic that is measured; the ring holds what 10 Mpps bring in between.
func (c *Capture) drainRegularly() {
	defer close(c.done)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
			c.mu.Lock()
			c.drain()
			c.mu.Unlock()
		}
	}
}

// drain takes all packets out of the ring. It needs the lock.
func (c *Capture) drain() {
	if c.closed {
		return
	}
	for range slotCount { // once around: a flood must not hold the lock for ever
		var h header
		size, ok := c.ring.next(&h)
		if !ok {
			break
		}
		n := c.counts[h]
		if n == nil {
			n = new(Counts)
			c.counts[h] = n
		}
		one := Counts{1, uint64(size), size}
		n.add(one)
		c.total.add(one)
	}
	dropped, err := c.ring.dropped()
	if err != nil && c.err == nil {
		c.err = fmt.Errorf("reading the drops of the capture on %s: %w", c.where, err)
	}
	c.dropped += dropped
}

func (c *Counts) add(o Counts) {
	c.Packets += o.Packets
	c.Bytes += o.Bytes
	c.Largest = max(c.Largest, o.Largest)
}

// From matches packets of a sender, To those for a receiver, Between both directions of a pair of addresses.
func From(a netip.Addr) func(Packet) bool {
	return func(p Packet) bool { return p.Src.Addr() == a }
}

// To matches packets for a receiver.
func To(a netip.Addr) func(Packet) bool {
	return func(p Packet) bool { return p.Dst.Addr() == a }
}

// Between matches both directions of a pair of addresses.
func Between(a, b netip.Addr) func(Packet) bool {
	return func(p Packet) bool {
		return p.Src.Addr() == a && p.Dst.Addr() == b || p.Src.Addr() == b && p.Dst.Addr() == a
	}
}

// ring is an AF_PACKET socket with TPACKET_V2 (packet(7)): one slot of fixed size for each packet, whose status word
// says who owns it. Version 3 packs better, but hides a packet until its block is full or times out; here a count must
// include all that has passed.
type ring struct {
	fd     int
	memory []byte
	index  int
}

const (
	slotSize  = 256 // of which the kernel's own header takes some 80; the rest holds every header that parse reads
	slotCount = 1 << 16
	blockSize = 1 << 16
)

func newRing(device string) (_ *ring, err error) {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("looking up the interface: %w", err)
	}
	// Protocol 0 keeps packets of other interfaces out until bind names ours.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket: %w", missing(err, "CONFIG_PACKET"))
	}
	r := &ring{fd: fd}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2); err != nil {
		return nil, fmt.Errorf("choosing the ring's version: %w", err)
	}
	request := unix.TpacketReq{
		Block_size: blockSize, Block_nr: slotCount * slotSize / blockSize, Frame_size: slotSize, Frame_nr: slotCount,
	}
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &request); err != nil {
		return nil, fmt.Errorf("allocating %d MiB for packets: %w", slotCount*slotSize>>20, err)
	}
	r.memory, err = unix.Mmap(fd, 0, slotCount*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the ring: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Attrs().Index}); err != nil {
		return nil, fmt.Errorf("binding to the interface: %w", err)
	}
	return r, nil
}

// next takes a packet out and returns its full size.
func (r *ring) next(h *header) (size int, ok bool) {
	slot := r.memory[r.index*slotSize : (r.index+1)*slotSize]
	t := (*unix.Tpacket2Hdr)(unsafe.Pointer(&slot[0]))
	status := atomic.LoadUint32(&t.Status)
	if status&unix.TP_STATUS_USER == 0 {
		return 0, false
	}
	address := (*unix.RawSockaddrLinklayer)(unsafe.Pointer(&slot[tpacketAlign(unsafe.Sizeof(*t))]))
	h.out = address.Pkttype == unix.PACKET_OUTGOING
	if status&unix.TP_STATUS_VLAN_VALID != 0 {
		h.vlan = t.Vlan_tci & 0xfff
	}
	parse(slot[t.Mac:min(int(t.Mac)+int(t.Snaplen), slotSize)], h)
	size = int(t.Len)
	atomic.StoreUint32(&t.Status, unix.TP_STATUS_KERNEL)
	r.index = (r.index + 1) % slotCount
	return size, true
}

// dropped returns how many packets found no slot since the last call.
func (r *ring) dropped() (uint64, error) {
	s, err := unix.GetsockoptTpacketStats(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, err
	}
	return uint64(s.Drops), nil
}

func (r *ring) close() error {
	var err error
	if r.memory != nil {
		err = unix.Munmap(r.memory)
	}
	return errors.Join(err, unix.Close(r.fd))
}

func tpacketAlign(n uintptr) uintptr { return (n + 15) &^ 15 }

// htons gives a number in network byte order, as the kernel's structures hold it.
func htons(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}
