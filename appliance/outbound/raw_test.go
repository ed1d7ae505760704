package outbound

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sendMessage and receiveMessage use raw names, as a relay's sendmmsg and recvmmsg do.

func sendMessage(fd int, packet []byte, name *unix.RawSockaddrInet6, length uint32) error {
	iov := unix.Iovec{Base: &packet[0]}
	iov.SetLen(len(packet))
	message := unix.Msghdr{Name: (*byte)(unsafe.Pointer(name)), Namelen: length, Iov: &iov, Iovlen: 1}
	_, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func receiveMessage(fd int, packet []byte, name *unix.RawSockaddrInet6) (int, error) {
	iov := unix.Iovec{Base: &packet[0]}
	iov.SetLen(len(packet))
	message := unix.Msghdr{Name: (*byte)(unsafe.Pointer(name)), Namelen: unix.SizeofSockaddrInet6, Iov: &iov, Iovlen: 1}
	n, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
