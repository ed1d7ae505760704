package proxy

import (
	"sync/atomic"
	"syscall"
	"time"
)

// rate is how fast something may happen: burst times at once, then once per interval.
type rate struct {
	interval time.Duration
	burst    int
}

// bucket enforces a rate (the generic cell rate algorithm, ITU-T I.371). Its zero value is full.
type bucket struct {
	next int64 // when the bucket will be full again, monotonic
}

// take reports whether it may happen now, and if so counts it.
func (b *bucket) take(now int64, r rate) bool {
	next := max(b.next, now)
	if next-now > int64(r.burst-1)*int64(r.interval) {
		return false
	}
	b.next = next + int64(r.interval)
	return true
}

// full reports whether the bucket holds no memory worth keeping.
func (b *bucket) full(now int64) bool { return b.next <= now }

// allowance is how much of UDP a client may have, and how fast it may open it: opening and evicting at
// the speed of a flood would cost the others the processor.
type allowance struct {
	sessions, flows       int
	dialing               int // sessions being opened at once
	sessionRate, flowRate rate
}

// ownShare is how many times the share of a client is that of this box itself. All of its programs are
// one client, and a resolver among them may be asked by the whole LAN.
const ownShare = 4

// allowance is the limits of UDP, times a share. A page of many QUIC connections, a torrent's DHT and a
// game's server list stay below the rates.
func (l Limits) allowance(share int, descriptors int64) allowance {
	l.Sessions *= share
	l.Flows *= share
	l.fit(descriptors)
	often := time.Duration(share)
	return allowance{
		sessions: l.Sessions, flows: l.Flows, dialing: 64 * share,
		sessionRate: rate{interval: time.Second / 256 / often, burst: 512 * share},
		flowRate:    rate{interval: time.Second / 512 / often, burst: 2048 * share},
	}
}

// descriptors is the budget of descriptors, shared by TCP and UDP.
type descriptors struct {
	limit int64
	used  atomic.Int64
}

func (d *descriptors) take(n int64) bool {
	if d.used.Add(n) > d.limit {
		d.used.Add(-n)
		return false
	}
	return true
}

func (d *descriptors) give(n int64) { d.used.Add(-n) }

// What things cost of the budget.
const (
	connectionDescriptors = 4 // two sockets, and a pipe for a direction that is held up
	sessionDescriptors    = 2 // a UDP socket, and the control connection of SOCKS5
	flowDescriptors       = 1
)

const (
	wantedDescriptors   = 1 << 18
	reservedDescriptors = 512 // for everything else in the process
)

// raiseDescriptors raises RLIMIT_NOFILE and returns how many of the descriptors the relay may use.
func raiseDescriptors() int64 {
	var now syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
		return 1024 - reservedDescriptors
	}
	for _, want := range []syscall.Rlimit{
		{Cur: max(now.Cur, wantedDescriptors), Max: max(now.Max, wantedDescriptors)}, // CAP_SYS_RESOURCE
		{Cur: now.Max, Max: now.Max},
		now,
	} {
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want) == nil {
			now = want
			break
		}
	}
	usable := int64(min(now.Cur, 1<<30))
	return max(usable-reservedDescriptors, usable/2)
}

// fit lowers the limits so that one client cannot use up the descriptors: half of them go to TCP, and
// an eighth each to UDP sessions and flows.
func (l *Limits) fit(descriptors int64) {
	eighth := int(descriptors / 8)
	l.Connections = min(l.Connections, 4*eighth/connectionDescriptors)
	l.Sessions = min(l.Sessions, eighth/sessionDescriptors)
	l.Flows = min(l.Flows, eighth/flowDescriptors)
}
