package lab

import (
	"context"
	"fmt"
	"os"
)

// StartRadvd advertises the host as IPv6 router on one of its interfaces, with the prefix that the interface has, every 3 to 4 seconds, as
// main routers do (RFC 4861).
func (h *Host) StartRadvd(ctx context.Context, device string) (*Process, error) {
	binary, err := find("radvd", "radvd")
	if err != nil {
		return nil, err
	}
	config := h.lab.file(h.name, ".radvd.conf")
	text := fmt.Sprintf("interface %s {\n AdvSendAdvert on;\n MinRtrAdvInterval 3;\n MaxRtrAdvInterval 4;\n AdvDefaultLifetime 60;\n prefix ::/64 {};\n};\n", device)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("writing the configuration of radvd: %w", err)
	}
	return h.Command(ctx, binary, "--nodaemon", "--config", config, "--pidfile", h.lab.file(h.name, ".radvd.pid"), "--logmethod", "stderr").Start()
}
