package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// MarkBypass is the mark of injected packets that the gateway's programs let pass untouched, as if they were not there.
const MarkBypass = uint32(gatewayMarkMARK_OWN)

// addressesNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addressesNone = 1

// Injector makes frames come in by a LAN interface that nobody has sent. They meet all that a client's frames meet there: the
// gateway's programs, the box's firewall, its reverse path filter, its routes.
//
// It is a TAP interface without addresses, from which a program redirects everything. Nothing of it outlives the process, however
// that ends.
type Injector struct {
	tap     *os.File
	program *ebpf.Program
	link    link.Link
}

// OpenInjector makes one that injects to the interface of that index, in the calling thread's network namespace. Packets have the
// mark: 0, or MarkBypass.
func OpenInjector(ctx context.Context, index int, mark uint32) (_ *Injector, err error) {
	i := &Injector{}
	defer func() {
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w; it takes root, or CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF", err)
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("opening a way into the LAN interface: %w", err), i.Close())
		}
	}()
	if err := checkKernel(); err != nil {
		return nil, err
	}
	tap, err := i.openTAP()
	if err != nil {
		return nil, err
	}
	if i.program, err = loadInject(index, mark); err != nil {
		return nil, err
	}
	// Attached before the interface is up: nothing that comes in by it reaches the box's own stack.
	i.link, err = link.AttachTCX(link.TCXOptions{Interface: tap.Attrs().Index, Program: i.program, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return nil, fmt.Errorf("attaching the program inject: %w", err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return nil, fmt.Errorf("bringing %s up: %w", tap.Attrs().Name, err)
	}
	return i, ctx.Err()
}

// openTAP makes the interface. The kernel names it, so that several do not meet.
func (i *Injector) openTAP() (netlink.Link, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("opening %s: %w; load the kernel's module: modprobe tun", device, err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", device, err)
	}
	i.tap = os.NewFile(uintptr(fd), device)
	request, err := unix.NewIfreq("sgprobe%d")
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return nil, fmt.Errorf("making a TAP interface: %w", err)
	}
	tap, err := netlink.LinkByName(request.Name())
	if err != nil {
		return nil, fmt.Errorf("finding %s: %w", request.Name(), err)
	}
	// A kernel without IPv6 needs no such thing.
	if err := netlink.LinkSetIP6AddrGenMode(tap, addressesNone); err != nil && haveIPv6() {
		return nil, fmt.Errorf("keeping %s without addresses: %w", tap.Attrs().Name, err)
	}
	return tap, nil
}

// loadInject loads the one program, without the gateway's others and their maps.
func loadInject(index int, mark uint32) (*ebpf.Program, error) {
	spec, err := loadGateway()
	if err != nil {
		return nil, err
	}
	var s gatewayVariableSpecs
	if err := spec.Assign(&s); err != nil {
		return nil, err
	}
	if err := errors.Join(s.InjectTo.Set(uint32(index)), s.InjectMark.Set(mark)); err != nil {
		return nil, err
	}
	var loaded struct {
		Inject *ebpf.Program `ebpf:"inject"`
	}
	if err := spec.LoadAndAssign(&loaded, nil); err != nil {
		return nil, fmt.Errorf("loading the program inject: %w", err)
	}
	return loaded.Inject, nil
}

// Inject has one Ethernet frame come in.
func (i *Injector) Inject(frame []byte) error {
	if _, err := i.tap.Write(frame); err != nil {
		return fmt.Errorf("injecting a packet: %w", err)
	}
	return nil
}

// Close removes all of it.
func (i *Injector) Close() error {
	var errs []error
	if i.link != nil {
		errs = append(errs, i.link.Close())
	}
	if i.program != nil {
		errs = append(errs, i.program.Close())
	}
	if i.tap != nil {
		errs = append(errs, i.tap.Close())
	}
	return errors.Join(errs...)
}
