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
