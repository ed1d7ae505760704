// Package sniff reads the server's name out of a connection's first bytes: TLS, HTTP/1, HTTP/2 by prior knowledge, and QUIC.
//
// It is pure: bytes in, an answer out, with no clock, no goroutine and nothing shared. Whoever has the bytes decides how
// long to wait for more. The bytes come from anybody, so nothing in them makes it panic, read what was not given, or
// allocate more than a small multiple of MaxStream; and what can be none of these protocols is Nothing at the first byte
// that gives it away, so that no connection waits in vain.
//
// What it finds is what the client says, which may be untrue: verify it before anything trusts it.
package sniff

import "strings"

// MaxStream is how many bytes of a TCP stream, or of the handshake in QUIC, are worth waiting for: at this many
// without a name the answer is Nothing. Browsers' ClientHellos have some 2,000 bytes, and common servers accept 8 to 16 KiB
// of a request's header.
const MaxStream = 16 << 10

// Protocol is what a client speaks. The zero value is one that is not known yet, or none of these.
type Protocol uint8

const (
	ProtocolTLS   Protocol = iota + 1 // RFC 8446, RFC 5246 and older, down to SSL 3.0
	ProtocolHTTP1                     // RFC 9112
	ProtocolHTTP2                     // RFC 9113 section 3.3: in the clear, and without an upgrade
	ProtocolQUIC                      // RFC 9000 and RFC 9369
)

var protocolNames = [...]string{"unknown", "tls", "http1", "http2", "quic"}

// String is a word for logs and metrics: tls, http1, http2, quic, or unknown.
func (p Protocol) String() string {
	if int(p) < len(protocolNames) {
		return protocolNames[p]
	}
	return protocolNames[0]
}

// Status is how far the search for a name is.
type Status uint8

const (
	More    Status = iota + 1 // feed more
	Found                     // the name is known
	Nothing                   // it never will be
)

var statusNames = [...]string{"invalid", "more", "found", "nothing"}

func (s Status) String() string {
	if int(s) < len(statusNames) {
		return statusNames[s]
	}
	return statusNames[0]
}

// Result is what first bytes say.
type Result struct {
	Status   Status
	Protocol Protocol
	// Name is a host name in lower-case ASCII, without port and trailing dot; never an address. With More it is a name that has
	// been read although its message is not complete: the best there is for whoever will not wait longer.
	Name string
	// ECH says that there was an encrypted_client_hello extension (RFC 9849): the name may be only the outer one. It
	// may also be the true one, for browsers send the extension with random content to servers that they know no key of.
	ECH bool
}

// Stream reads all the bytes of a TCP stream that have come so far, and may be called again with more of them. It looks at no
// more than MaxStream.
func Stream(first []byte) Result {
	first = first[:min(len(first), MaxStream)]
	result := stream(first)
	if result.Status == More && len(first) == MaxStream {
		return result.last()
	}
	return result
}

// stream chooses by the first byte, or for HTTP/2 by as many as differ from an HTTP/1 request.
func stream(b []byte) Result {
	switch {
	case len(b) == 0:
		return Result{Status: More}
	case b[0] == recordHandshake:
		return tlsStream(b)
	case len(b) < len(preface) && strings.HasPrefix(preface, string(b)):
		return Result{Status: More}
	case len(b) >= len(preface) && string(b[:len(preface)]) == preface:
		return http2(b[len(preface):])
	}
	return http1(b)
}

// last is the result when nothing more will be waited for.
func (r Result) last() Result {
	r.Status = Nothing
	if r.Name != "" {
		r.Status = Found
	}
	return r
}

// named ends the search with a host's name as the client wrote it, which may turn out to be none.
func named(p Protocol, host string) Result {
	if name, ok := hostName(host); ok {
		return Result{Status: Found, Protocol: p, Name: name}
	}
	return Result{Status: Nothing, Protocol: p}
}
