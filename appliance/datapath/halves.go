package datapath

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Half is what became of a TCP connection that is forwarded direct and not translated, told by the half of it that
// passes here.
type Half struct {
	Client      netip.AddrPort
	ClientMAC   [6]byte // zero where the link has none
	Destination netip.AddrPort
	Interface   int // index of the LAN interface that it came in by
	Outcome     Outcome
	Attempts    int           // times that the SYN, then the first data, was sent; 255 may be more
	Age         time.Duration // since the first SYN
	Idle        time.Duration // since the last packet
}

// Outcome of a Half, in the order of how far it came.
type Outcome uint8

// The outcomes. A connection of which nothing can be said, because it is too young or the client gave up soon, has none.
const (
	Undecided  Outcome = iota
	Unanswered         // its SYN was sent again and again, and nothing else
	Stalled            // it was answered, and its first data was sent again and again
	Answered           // it was answered; the client has sent no data
	Carried            // its data was acknowledged
)

func (o Outcome) String() string {
	return [...]string{"undecided", "unanswered", "stalled", "answered", "carried"}[o]
}

const (
	// Something that was lost once is sent twice. Three times within seconds is more than bad luck, and all clients
	// send a SYN as often: Linux after 1 s and 3 s, or each second (tcp_syn_linear_timeouts); Windows and macOS too.
	failingAttempts = 3
	// What was not sent again for so long has arrived: no client waits longer before its second attempt (RFC 6298 §2).
	acknowledgedAfter = 3 * time.Second
	// How long a connection is evidence. The world may have changed since.
	halfWindow = 2 * time.Minute
	// SYN, ACK, one packet with a later FIN, RST or ACK: what passes of a connection even if no data arrives.
	bareConnection = 4
	// More packets than that are not sent within halfWindow by a client that gets no further: a first flight, and
	// then ever rarer the same.
	goesOn = 64
	// Who waits longer for an answer sends again (RFC 6298 §2.1): there is none.
	answerTime = time.Second
)

// Halves reads the flow tables for direct TCP connections that are not translated and began in the last two minutes,
// and have an outcome. It walks the tables, which takes a tenth of a second when they are full.
func (d *Datapath) Halves() (Halves, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.generation == nil {
		return nil, nil
	}
	now, err := d.generation.now()
	if err != nil {
		return nil, err
	}
	var halves Halves
	for _, table := range d.state.flowTables() {
		err := eachFlow(table, func(k gatewayFlowKey, v gatewayFlow) {
			if h := d.generation.clock.half(now, k, v); h.Outcome != Undecided {
				halves = append(halves, h)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return halves, nil
}

// half is undecided for flows that are not what the watch is about.
func (c clock) half(now uint64, k gatewayFlowKey, v gatewayFlow) Half {
	h := Half{
		Client:      netip.AddrPortFrom(k.Source.addr(), bigEndian(k.SourcePort)),
		ClientMAC:   v.ClientMac,
		Destination: netip.AddrPortFrom(k.Destination.addr(), bigEndian(k.DestinationPort)),
		Interface:   int(v.Interface),
		Attempts:    int(v.Attempts),
		Age:         c.since(now, v.FirstSeen),
		Idle:        c.since(now, v.LastSeen),
	}
	direct := gatewayVerdict(v.Verdict) == gatewayVerdictVERDICT_DIRECT &&
		v.Mark&uint32(gatewayMarkMARK_MASK) == uint32(gatewayMarkMARK_DIRECT)
	if k.Protocol == unix.IPPROTO_TCP && direct && h.Age < halfWindow {
		h.Outcome = outcome(v, h.Idle)
	}
	return h
}

// outcome of a connection whose last packet came so long ago.
func outcome(v gatewayFlow, idle time.Duration) Outcome {
	state := gatewayFlowState(v.State)
	switch {
	case state == gatewayFlowStateFLOW_OPENING && v.Attempts >= failingAttempts:
		return Unanswered
	case state == gatewayFlowStateFLOW_OPENING: // perhaps refused, perhaps only just begun
		return Undecided
	case v.Attempts >= failingAttempts && v.Packets <= goesOn:
		return Stalled
	case v.Attempts == 0 && state == gatewayFlowStateFLOW_ESTABLISHED:
		return Answered
	case v.Attempts == 0: // reset at once, as a port scan does
		return Undecided
	case state == gatewayFlowStateFLOW_ESTABLISHED && idle >= acknowledgedAfter,
		v.Packets > bareConnection+uint64(v.Attempts):
		return Carried
	}
	return Undecided
}

// Halves are connections, of any client and to any destination.
type Halves []Half

// Since leaves out the failing connections of which the last d say nothing: whose last packet is older, or may yet be answered.
func (h Halves) Since(d time.Duration) Halves {
	return slices.DeleteFunc(slices.Clone(h), func(half Half) bool {
		failing := half.Outcome == Unanswered || half.Outcome == Stalled
		return failing && (half.Idle >= d || half.Idle < answerTime)
	})
}

// Evidence says whether the connections look as if the network dropped what it sees only one half of. It is no
// proof: a dead server looks the same. What proves it is that the box itself, whose connections the network sees
// both halves of, reaches one of Failing.
type Evidence struct {
	Pattern Outcome // Unanswered, Stalled, or Undecided: there is none
	// Failing are destinations of such connections, the youngest first, one port of each address. None of the
	// addresses has served another connection meanwhile.
	Failing []netip.AddrPort
	Clients int // distinct clients that these connections are of
	Against int // distinct addresses that connections reached all the same, since the first of these
}

// Convincing reports whether chance is an unlikely explanation: several destinations fail and none is reached.
func (e Evidence) Convincing() bool { return len(e.Failing) >= 3 && e.Against == 0 }

// Evidence weighs the connections. One server that is down, or drops what goes to one port, is not evidence while
// as many others are reached; a connection that loses packets and goes on is none at all.
func (h Halves) Evidence() Evidence {
	// A network that drops the data lets SYNs pass, so the rarer pattern is looked for first.
	if e := h.of(Stalled, Carried); e.Pattern != Undecided {
		return e
	}
	return h.of(Unanswered, Stalled)
}

// of weighs one pattern against connections that came at least as far as reached. Only those count that began since
// the first failing one did: what worked before it says nothing of a network that has changed.
func (h Halves) of(pattern, reached Outcome) Evidence {
	var failing Halves
	for _, half := range h {
		if half.Outcome == pattern {
			failing = append(failing, half)
		}
	}
	if len(failing) == 0 {
		return Evidence{}
	}
	slices.SortFunc(failing, func(a, b Half) int { return cmp.Compare(a.Age, b.Age) })
	first := failing[len(failing)-1].Age
	served := map[netip.Addr]bool{}
	for _, half := range h {
		if half.Outcome >= reached && half.Age <= first {
			served[half.Destination.Addr()] = true
		}
	}
	e := Evidence{Pattern: pattern, Against: len(served)}
	clients, seen := map[string]bool{}, map[netip.Addr]bool{}
	for _, half := range failing {
		to := half.Destination
		if served[to.Addr()] {
			continue
		}
		clients[half.client()] = true
		if !seen[to.Addr()] {
			seen[to.Addr()] = true
			e.Failing = append(e.Failing, to)
		}
	}
	if e.Clients = len(clients); len(e.Failing) <= e.Against {
		return Evidence{}
	}
	return e
}

// client is the device, as far as the link tells: people have several addresses.
func (h Half) client() string {
	if h.ClientMAC != [6]byte{} {
		return string(h.ClientMAC[:])
	}
	return h.Client.Addr().String()
}
