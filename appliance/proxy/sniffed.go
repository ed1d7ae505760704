package proxy

import (
	"sync/atomic"

	"sidegate/appliance/sniff"
)

// sniffed are the counters behind Sniffed.
type sniffed struct {
	named             [sniff.ProtocolQUIC + 1]atomic.Uint64
	nothing, timedOut atomic.Uint64
}

// count counts a flow by what is known of it in the end. Without an answer that is final, a name may
// still have been read.
func (s *sniffed) count(r sniff.Result, timedOut bool) {
	switch {
	case r.Name != "":
		s.named[r.Protocol].Add(1)
	case timedOut:
		s.timedOut.Add(1)
	default:
		s.nothing.Add(1)
	}
}

func (s *sniffed) snapshot() Sniffed {
	return Sniffed{
		TLS:      s.named[sniff.ProtocolTLS].Load(),
		HTTP1:    s.named[sniff.ProtocolHTTP1].Load(),
		HTTP2:    s.named[sniff.ProtocolHTTP2].Load(),
		QUIC:     s.named[sniff.ProtocolQUIC].Load(),
		Nothing:  s.nothing.Load(),
		TimedOut: s.timedOut.Load(),
	}
}
