package endtoend

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawConnect is connect(2) with any bytes for an address.
func rawConnect(fd int, address []byte) error {
	if _, _, err := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&address[0])), uintptr(len(address))); err != 0 {
		return err
	}
	return nil
}

// markControl is a control message that gives a datagram a mark (socket(7)).
func markControl(mark uint32) []byte {
	b := make([]byte, unix.CmsgSpace(4))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SO_MARK
	h.SetLen(unix.CmsgLen(4))
	*(*uint32)(unsafe.Pointer(&b[unix.CmsgLen(0)])) = mark
	return b
}
