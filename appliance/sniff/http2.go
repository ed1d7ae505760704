package sniff

import "math"

// HTTP/2 by prior knowledge: RFC 9113 sections 3.4, 4.1, 6 and 8.3.1.

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

const (
	frameData = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePush
	framePing
	frameGoAway
	frameWindow
	frameContinuation

	maxFrame = 1 << 14 // as long as the server has not allowed more, which it cannot have yet

	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// http2 reads what follows the preface: settings first, then anything that opens no request, then the request's fields.
func http2(b []byte) Result {
	r := reader{b: b, end: math.MaxInt} // a stream says nowhere where it ends
	var fields []byte
	stream, whole := 0, false // stream is the request's, once it has begun
	for first := true; r.ok() && !whole; first = false {
		size, kind, flags, id := r.number(3), r.number(1), r.number(1), r.number(4)&math.MaxInt32
		if !r.ok() {
			break
		}
		payload := r.part(size)
		switch {
		case size > maxFrame, first && (kind != frameSettings || flags&flagAck != 0), stream != 0 && id != stream:
			r.refuse()
		case kind == frameHeaders && stream == 0 && id%2 == 1:
			stream = id
			unpad(&payload, flags)
			fields, whole = append(fields, payload.rest()...), flags&flagEndHeaders != 0
		case kind == frameContinuation && stream != 0:
			fields, whole = append(fields, payload.rest()...), flags&flagEndHeaders != 0
		case stream != 0, kind == frameHeaders, kind == frameContinuation,
			kind == frameData, kind == frameReset, kind == framePush, kind == frameGoAway:
			r.refuse()
		} // any other opens no request; clients send unknown ones so that servers learn to ignore them: section 4.1
		if payload.stopped == Nothing {
			r.refuse()
		}
		r.take(0) // is the payload all there?
	}
	result := Result{Status: r.stopped, Protocol: ProtocolHTTP2}
	if stream == 0 {
		return result
	}
	authority, status := requestAuthority(fields, whole && r.ok())
	switch {
	case status == Found: // whatever follows
		return named(ProtocolHTTP2, withoutPort(authority))
	case r.stopped != Nothing:
		result.Status = status
	}
	return result
}

// unpad leaves the fragment of the fields in a HEADERS frame: section 6.2.
func unpad(payload *reader, flags int) {
	padding := 0
	if flags&flagPadded != 0 {
		padding = payload.number(1)
	}
	if flags&flagPriority != 0 {
		payload.take(5)
	}
	if padding > payload.end-payload.at {
		payload.refuse()
	}
	payload.end -= padding
}
