package sniff

// staticNames are the names of RFC 7541 appendix A. Its values are of no use here: none is a host's.
var staticNames = [...]string{
	":authority", ":method", ":method", ":path", ":path", ":scheme", ":scheme", ":status", ":status", ":status",
	":status", ":status", ":status", ":status", "accept-charset", "accept-encoding", "accept-language", "accept-ranges",
	"accept", "access-control-allow-origin", "age", "allow", "authorization", "cache-control", "content-disposition",
	"content-encoding", "content-language", "content-length", "content-location", "content-range", "content-type",
	"cookie", "date", "etag", "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match",
	"if-range", "if-unmodified-since", "last-modified", "link", "location", "max-forwards", "proxy-authenticate",
	"proxy-authorization", "range", "referer", "refresh", "retry-after", "server", "set-cookie",
	"strict-transport-security", "transfer-encoding", "user-agent", "vary", "via", "www-authenticate",
}

// huffmanSymbols are the symbols of each length of code in RFC 7541 appendix B. The code is canonical: codes of one length are
// consecutive, in the order of the symbols, and follow those of the length before. EOS, the last of 30 bits, is left out: it
// must not occur.
var huffmanSymbols = [31]string{
	5:  "012aceiost",
	6:  " %-./3456789=A_bdfghlmnpru",
	7:  ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
	8:  "&*,;XZ",
	10: "!\"()?",
	11: "'+|",
	12: "#>",
	13: "\x00$@[]~",
	14: "^}",
	15: "<`{",
	19: "\\\xc3\xd0",
	20: "\x80\x82\x83\xa2\xb8\xc2\xe0\xe2",
	21: "\x99\xa1\xa7\xac\xb0\xb1\xb3\xd1\xd8\xd9\xe3\xe5\xe6",
	22: "\x81\x84\x85\x86\x88\x92\x9a\x9c\xa0\xa3\xa4\xa9\xaa\xad\xb2\xb5\xb9\xba\xbb\xbd\xbe\xc4\xc6\xe4\xe8\xe9",
	23: "\x01\x87\x89\x8a\x8b\x8c\x8d\x8f\x93\x95\x96\x97\x98\x9b\x9d\x9e\xa5\xa6\xa8\xae\xaf\xb4\xb6\xb7\xbc\xbf\xc5\xe7\xef",
	24: "\x09\x8e\x90\x91\x94\x9f\xab\xce\xd7\xe1\xec\xed",
	25: "\xc7\xcf\xea\xeb",
	26: "\xc0\xc1\xc8\xc9\xca\xcd\xd2\xd5\xda\xdb\xee\xf0\xf2\xf3\xff",
	27: "\xcb\xcc\xd3\xd4\xd6\xdd\xde\xdf\xf1\xf4\xf5\xf6\xf7\xf8\xfa\xfb\xfc\xfd\xfe",
	28: "\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f\x10\x11\x12\x13\x14\x15\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f\xdc\xf9",
	30: "\x0a\x0d\x16",
}

// unhuffman decodes a string, bit by bit: hosts' names are short. False if it is no such code, or if its last byte is not
// filled up with the beginning of EOS (RFC 7541 section 5.2).
func unhuffman(b []byte) ([]byte, bool) {
	decoded := make([]byte, 0, len(b)*8/5)
	code, bits := 0, 0 // of the symbol that is being read
	first := 0         // the first code of so many bits
	for _, c := range b {
		for shift := 7; shift >= 0; shift-- {
			code = code<<1 | int(c)>>shift&1
			first = (first + len(huffmanSymbols[bits])) << 1
			bits++
			if bits == len(huffmanSymbols) {
				return nil, false
			}
			if at := code - first; at < len(huffmanSymbols[bits]) {
				decoded = append(decoded, huffmanSymbols[bits][at])
				code, bits, first = 0, 0, 0
			}
		}
	}
	return decoded, bits < 8 && code == 1<<bits-1
}
