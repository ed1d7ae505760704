package endtoend

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestOwnListFull: where the list of direct connections has no room the box's connections are decided all the same; what was connected before stays
// listed, and what is closed makes room.
func TestOwnListFull(t *testing.T) {
	w := newSocketWorld(t)
	w.startPorts(t)
	list := ownConnected(t, w.gateway)
	listed := func(s *boxSocket) bool {
		value := make([]byte, list.ValueSize())
		cookie, err := unix.GetsockoptUint64(s.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		need(t, err)
		err = list.Lookup(cookie, &value)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
		return err == nil
	}
	direct := func(f family) *boxSocket {
		t.Helper()
		s := w.tcp(t, f)
		need(t, s.connect(f.at(directPort)))
		saw, err := s.greeting()
		need(t, err)
		f.saw(t, "direct", saw, s)
		return s
	}
	before := direct(w.families()[0])
	value, n := make([]byte, list.ValueSize()), uint64(0)
	for ; ; n++ {
		if err := list.Put(n|1<<63, value); errors.Is(err, unix.E2BIG) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	w.inAll(t, "full", func(t *testing.T, f family) {
		if listed(direct(f)) {
			t.Error("the list was not full")
		}
		s := w.tcp(t, f)
		need(t, s.connect(f.at(proxiedPort)))
		saw, err := s.greeting()
		need(t, err)
		f.saw(t, "proxied", saw, s)
		if err := w.tcp(t, f).connect(f.at(blockedPort)); !errors.Is(err, unix.EPERM) {
			t.Errorf("connecting to what is blocked: %v, want %v", err, unix.EPERM)
		}
	})
	if !listed(before) {
		t.Error("what was connected before is not listed any more")
	}
	before.close()
	if listed(direct(w.families()[0])) != true {
		t.Error("what is closed made no room")
	}
	for i := range n {
		need(t, list.Delete(i|1<<63))
	}
}
