package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
)

// RadvdOptions are what a main router says of itself besides its prefix.
type RadvdOptions struct {
	Preference string     // low, medium or high (RFC 4191); empty: medium
	Managed    bool       // addresses are to be had by DHCPv6
	Resolver   netip.Addr // DNS server that it names (RFC 8106); none: it names none
}

// StartRadvd advertises the host as IPv6 router on its first interface, with the prefix that the interface has, every 3 to 4
// seconds, as main routers do (RFC 4861).
func (h *Host) StartRadvd(ctx context.Context, o RadvdOptions) (*Process, error) {
	binary, err := find("radvd", "radvd")
	if err != nil {
		return nil, err
	}
	more := ""
	if o.Preference != "" {
		more += " AdvDefaultPreference " + o.Preference + ";\n"
	}
	if o.Managed {
		more += " AdvManagedFlag on;\n"
	}
	if o.Resolver.IsValid() {
		more += " RDNSS " + o.Resolver.String() + " {};\n"
	}
	config := h.lab.file(h.name, ".radvd.conf")
	text := fmt.Sprintf("interface %s {\n AdvSendAdvert on;\n MinRtrAdvInterval 3;\n MaxRtrAdvInterval 4;\n AdvDefaultLifetime 60;\n%s prefix ::/64 {};\n};\n",
		h.interfaces[0].Name, more)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("writing the configuration of radvd: %w", err)
	}
	return h.Command(ctx, binary, "--nodaemon", "--config", config, "--pidfile", h.lab.file(h.name, ".radvd.pid"), "--logmethod", "stderr").Start()
}
