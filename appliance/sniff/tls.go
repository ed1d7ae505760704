package sniff

// TLS's records and its ClientHello: RFC 8446 sections 5.1 and 4.1.2, which are those of RFC 5246 here.

const (
	recordHandshake = 22
	maxRecord       = 1 << 14

	handshakeClientHello = 1
	// maxClientHello is the sum of its fields' largest sizes: what says that it is longer is none.
	maxClientHello = 2 + 32 + 1 + 32 + 2 + 65534 + 1 + 255 + 2 + 65535

	extensionServerName = 0
	extensionECH        = 0xfe0d // RFC 9849 section 5
	serverNameHost      = 0      // RFC 6066 section 3
)

func tlsStream(b []byte) Result {
	message, ok := handshake(b)
	result := Result{Status: More}
	if len(message) > 0 {
		result = clientHello(message, ProtocolTLS)
	}
	if !ok && result.Status == More {
		result.Status, result.Name = Nothing, ""
	}
	return result
}

// handshake returns what has come of the first handshake message, at least, out of its records; false if something else follows
// it. It copies only where there are several records.
func handshake(b []byte) ([]byte, bool) {
	var message []byte
	for r := newReader(b); r.more() && !complete(message); {
		if r.number(1) != recordHandshake {
			return message, false // also an alert or early data amidst the message
		}
		version, size := r.take(2), r.take(2)
		if version == nil { // half of it may have come
			return message, r.at == len(b) || b[r.at] == 3
		}
		if version[0] != 3 || version[1] > 4 {
			return message, false
		}
		if size == nil {
			return message, true
		}
		n := int(size[0])<<8 | int(size[1])
		if n == 0 || n > maxRecord { // RFC 8446 section 5.1: no empty fragments of a handshake
			return message, false
		}
		fragment := r.take(min(n, len(b)-r.at))
		if message == nil {
			message = fragment[:len(fragment):len(fragment)]
		} else {
			message = append(message, fragment...)
		}
	}
	return message, true
}

// complete says whether a handshake message is all there.
func complete(message []byte) bool {
	r := newReader(message)
	r.take(1)
	n := r.number(3)
	return r.ok() && len(message)-r.at >= n
}

// clientHello reads the name in a ClientHello, or in what has come of it.
func clientHello(b []byte, p Protocol) Result {
	result := Result{Protocol: p}
	r := reader{b: b, end: 4}
	if r.number(1) != handshakeClientHello {
		r.refuse()
	}
	n := r.number(3)
	if n > maxClientHello {
		r.refuse()
	}
	r.end += n

	if version := r.take(2); version != nil && version[0] != 3 {
		r.refuse()
	}
	r.take(32) // random
	session := r.number(1)
	if session > 32 {
		r.refuse()
	}
	r.take(session)
	suites := r.number(2)
	if suites == 0 || suites%2 != 0 {
		r.refuse()
	}
	r.take(suites)
	compression := r.number(1)
	if compression == 0 {
		r.refuse()
	}
	r.take(compression)
	if r.number(2) != r.end-r.at { // without extensions, which old clients leave out, it ends before this
		r.refuse()
	}

	seen := false
	for r.more() {
		kind, size := r.number(2), r.number(2)
		body := r.part(size)
		if !r.ok() {
			break
		}
		switch kind {
		case extensionECH:
			result.ECH = true
		case extensionServerName:
			if seen { // RFC 8446 section 4.2: servers refuse a second one
				r.refuse()
			}
			seen, result.Name = true, serverName(&body)
			r.stop(body.stopped)
		}
	}
	r.take(0) // the last one's body may not have come

	switch result.Status = r.stopped; result.Status {
	case 0:
		return result.last()
	case Nothing:
		result.Name = ""
	}
	return result
}

// serverName is the host name of RFC 6066 section 3. What has none that can be a host's is refused.
func serverName(r *reader) string {
	if r.number(2) != r.end-r.at {
		r.refuse()
	}
	for r.more() {
		kind, size := r.number(1), r.number(2)
		if text := r.take(size); r.ok() && kind == serverNameHost {
			name, ok := hostName(string(text))
			if !ok {
				r.refuse()
			}
			return name
		}
	}
	r.refuse()
	return ""
}
