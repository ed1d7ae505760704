package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
)

// giveWay makes the host's port lead to a device of its namespace called "machine", behind which stands the box that takes its place: one
// that has its addresses, those of hardware too. The script makes that device. From then on the host itself has no address.
func (h *Host) giveWay(ctx context.Context, device string) error {
	h.replaced = true
	i := h.Interface()
	own := i.MAC.String()
	own = "06" + own[2:] // the bridge takes frames for its ports' addresses itself
	script := fmt.Sprintf(`set -e
		%[3]s
		if ip link show machines >/dev/null 2>&1; then # there was a box before
			ip link set machine master machines up
			exit 0
		fi
		echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
		ip address flush dev %[1]s
		ip link add machines type bridge mcast_snooping 0
		ip link set %[1]s down
		ip link set %[1]s address %[2]s master machines
		ip link set %[1]s up
		ip link set machine master machines up
		ip link set machines up
		for f in /proc/sys/net/bridge/bridge-nf-call-*tables; do [ ! -e $f ] || echo 0 >$f; done`, i.Name, own, device)
	_, err := h.Exec(ctx, "sh", "-c", script)
	return err
}

// GiveWay gives the host's place to a box that stands elsewhere, behind an interface of this machine, until the lab is closed.
// As with a virtual machine, captures on the host's interface see its packets, in the direction that the box sees them.
func (h *Host) GiveWay(ctx context.Context, device string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("giving the place of %s to what is behind %s: %w", h.name, device, err)
		}
	}()
	// With its name it might meet one of the host's.
	if out, err := exec.CommandContext(ctx, "ip", "link", "set", device, "netns", h.Namespace(), "name", "machine").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	_, ok := h.lab.onClose(func() error {
		return h.Do(func() error {
			out, err := exec.Command("ip", "link", "set", "machine", "netns", fmt.Sprint(os.Getpid()), "name", device).CombinedOutput()
			if err != nil {
				return fmt.Errorf("giving %s back: %w: %s", device, err, out)
			}
			return nil
		})
	})
	if !ok {
		return errClosed
	}
	return h.giveWay(ctx, "")
}
