package sniff

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
)

// initialKeys open a client's Initial packets. Those are protected from accidents and not from readers: all that the keys derive
// from is in the packet (RFC 9001 section 5.2).
type initialKeys struct {
	version     *quicVersion
	destination string // the connection ID
	header      cipher.Block
	payload     cipher.AEAD
	iv          []byte
}

// are says whether these keys derive from the packet's connection ID.
func (k *initialKeys) are(p *packet) bool {
	return k != nil && k.version == p.version && k.destination == string(p.destination)
}

func deriveKeys(v *quicVersion, destination []byte) *initialKeys {
	k := &initialKeys{version: v, destination: string(destination)}
	initial, err := hkdf.Extract(sha256.New, destination, v.salt)
	if err != nil {
		return nil
	}
	client := expandLabel(initial, "client in", sha256.Size)
	if k.header, err = aes.NewCipher(expandLabel(client, v.label+" hp", 16)); err != nil {
		return nil
	}
	block, err := aes.NewCipher(expandLabel(client, v.label+" key", 16))
	if err != nil {
		return nil
	}
	if k.payload, err = cipher.NewGCM(block); err != nil {
		return nil
	}
	k.iv = expandLabel(client, v.label+" iv", k.payload.NonceSize())
	return k
}

// expandLabel is HKDF-Expand-Label with an empty context: RFC 8446 section 7.1.
func expandLabel(secret []byte, label string, size int) []byte {
	label = "tls13 " + label
	info := append([]byte{0, byte(size), byte(len(label))}, label...)
	info = append(info, 0)
	key, _ := hkdf.Expand(sha256.New, secret, string(info), size)
	return key
}

// open returns the frames in a packet, or nil if the keys do not fit: RFC 9001 sections 5.3 and 5.4.
func (k *initialKeys) open(p *packet) []byte {
	const sampleAfter = 4 // the packet number is taken for 4 bytes long where its length is not known yet
	if len(p.bytes) < p.number+sampleAfter+aes.BlockSize {
		return nil
	}
	b := bytes.Clone(p.bytes) // the datagram will be sent on as it is
	var mask [aes.BlockSize]byte
	k.header.Encrypt(mask[:], b[p.number+sampleAfter:][:aes.BlockSize])
	b[0] ^= mask[0] & 0x0f
	size := int(b[0]&3) + 1
	nonce := bytes.Clone(k.iv)
	for i := range size {
		b[p.number+i] ^= mask[1+i]
		// The number is whole: nothing can have been acknowledged yet that would let the client shorten it.
		nonce[len(nonce)-size+i] ^= b[p.number+i]
	}
	header := p.number + size
	payload, err := k.payload.Open(b[header:header], nonce, b[header:], b[:header])
	if err != nil {
		return nil
	}
	return payload
}
