package geodata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxUnpacked bounds what a compressed file becomes: some ten times the largest list that people use.
const maxUnpacked = 32 << 20

var (
	errTruncated = errors.New("it is damaged: it ends too early; fetch it again")
	errTrailing  = errors.New("it is damaged: it goes on behind its end; fetch it again")
	errTooLarge  = fmt.Errorf("it has more than %d MiB when unpacked", maxUnpacked>>20)
)

// unpack reads all of a compressed stream.
func unpack(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxUnpacked+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("it is damaged: fetch it again (%w)", err)
	case len(data) > maxUnpacked:
		return nil, errTooLarge
	}
	return data, nil
}

// cursor reads numbers and bytes. After the first that is missing it yields zeros, and err says so.
type cursor struct {
	rest []byte
	err  error
}

// truncated notes the first error.
func (c *cursor) truncated() {
	if c.err == nil {
		c.err = errTruncated
	}
}

// take returns the next n bytes, without copying them.
func (c *cursor) take(n uint64) []byte {
	if n > uint64(len(c.rest)) {
		c.truncated()
	}
	if c.err != nil {
		return nil
	}
	taken := c.rest[:n]
	c.rest = c.rest[n:]
	return taken
}

// end is the first error, or that there is more than a file should have.
func (c *cursor) end() error {
	if c.err == nil && len(c.rest) > 0 {
		c.err = errTrailing
	}
	return c.err
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) uint64() uint64 {
	if b := c.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (c *cursor) uvarint() uint64 {
	n, size := binary.Uvarint(c.rest)
	if size <= 0 {
		c.truncated()
		return 0
	}
	c.take(uint64(size))
	return n
}

// words returns a number of 64-bit words.
func (c *cursor) words(n uint64) words {
	if n > uint64(len(c.rest))/8 {
		c.truncated()
		return nil
	}
	return words(c.take(n * 8))
}

// words are big-endian 64-bit words as they stand in the file.
type words []byte

// bit reports bit i%64 of word i/64; beyond the end there are zeros.
func (w words) bit(i int) bool {
	word := i / 64 * 8
	if word >= len(w) {
		return false
	}
	return binary.BigEndian.Uint64(w[word:])>>(i%64)&1 != 0
}
