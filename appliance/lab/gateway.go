package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// GatewayOptions say how StartGateway starts sidegate.
type GatewayOptions struct {
	Binary string   // the program; "/proc/self/exe" is the one that is running
	Config string   // text of the YAML configuration file
	Args   []string // more arguments of `sidegate run`
	Cgroup string   // directory of a cgroup v2 that it runs in; empty: this process's
	// Capabilities (capabilities(7): CAP_NET_ADMIN, …) are all that it may do beside a user who owns its files, as a unit of
	// systemd is started; nil: it runs as root.
	Capabilities []string
	// Resolver is the DNS server that its /etc/resolv.conf names; invalid: the machine's.
	Resolver netip.Addr
}

// Gateway is a sidegate that runs on a host, with the files that are its own.
type Gateway struct {
	*Process
	Config string        // path of the configuration file
	Socket string        // path of the admin socket
	State  string        // directory of the pins, in a BPF file system
	Took   time.Duration // from the start of the process until it said that it is ready
}

// StartGateway runs `sidegate run` on the host and returns when the gateway says that it is ready (sd_notify(3)).
// Its state lasts as long as the lab: a second one on the same host finds what the first one left.
func (h *Host) StartGateway(ctx context.Context, o GatewayOptions) (*Gateway, error) {
	state, err := h.MountBPF()
	if err != nil {
		return nil, err
	}
	g := &Gateway{
		Config: h.lab.file(h.name, ".yaml"),
		Socket: filepath.Join(h.lab.Dir(), h.name+".sock"),
		State:  filepath.Join(state, "sidegate"),
	}
	if err := os.WriteFile(g.Config, []byte(o.Config), 0o644); err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	ready, err := newNotify(h.lab.file(h.name, ".notify"))
	if err != nil {
		return nil, fmt.Errorf("opening the gateway's notification socket: %w", err)
	}
	defer ready.Close()

	args := append([]string{"run", "-c", g.Config, "--socket", g.Socket, "--state-dir", g.State, "--data-dir", filepath.Join(h.lab.Dir(), h.name+".data")}, o.Args...)
	command := h.Command(ctx, o.Binary, args...)
	if o.Capabilities != nil {
		if command, err = h.unprivileged(ctx, o, args, []string{h.lab.Dir(), state, g.State, ready.LocalAddr().String()}); err != nil {
			return nil, err
		}
	}
	if o.Resolver.IsValid() {
		if command, err = command.Resolving(o.Resolver); err != nil {
			return nil, err
		}
	}
	command.Env, command.Cgroup = []string{"NOTIFY_SOCKET=" + ready.LocalAddr().String()}, o.Cgroup
	start := time.Now()
	if g.Process, err = command.Start(); err != nil {
		return nil, err
	}
	if err := awaitReady(ctx, ready, g.Process); err != nil {
		return nil, errors.Join(fmt.Errorf("starting sidegate on %s: %w", h.name, err), g.Kill())
	}
	g.Took = time.Since(start)
	return g, nil
}

// Nobody is the user whom a gateway with capabilities runs as.
const Nobody = 65534

// unprivileged prepares the gateway as a user without rights but the capabilities. The user owns the files named; the directory in
// /run that root's gateways share is replaced by one of its own.
func (h *Host) unprivileged(ctx context.Context, o GatewayOptions, args, own []string) (*Command, error) {
	if _, err := find("setpriv", "util-linux"); err != nil {
		return nil, err
	}
	for _, path := range own {
		if err := os.MkdirAll(path, 0o700); err != nil && !errors.Is(err, syscall.ENOTDIR) {
			return nil, fmt.Errorf("preparing %s: %w", path, err)
		}
		if err := os.Chown(path, Nobody, Nobody); err != nil {
			return nil, fmt.Errorf("preparing %s: %w", path, err)
		}
	}
	set := "-all"
	for _, c := range o.Capabilities {
		set += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	const script = `mkdir -p /run/sidegate && mount -t tmpfs -o mode=0755,uid=$1,gid=$1 none /run/sidegate && caps=$2 && user=$1 && shift 2 &&
		exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --inh-caps "$caps" --ambient-caps "$caps" --bounding-set "$caps" "$@"`
	command := h.Command(ctx, "sh", append([]string{"-c", script, "sh", fmt.Sprint(Nobody), set, o.Binary}, args...)...)
	command.private = true
	return command, nil
}

func newNotify(path string) (*net.UnixConn, error) {
	return net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
}

// awaitReady reads notifications until one says READY=1, at most 30 seconds.
func awaitReady(ctx context.Context, from *net.UnixConn, p *Process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("it does not become ready"))
	defer cancel()
	ctx, end := p.whileAlive(ctx, func() error { return errors.New(lastLine(p)) })
	defer end()
	defer context.AfterFunc(ctx, func() { from.SetReadDeadline(time.Unix(1, 0)) })()
	for message := make([]byte, 4096); ; {
		n, err := from.Read(message)
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("waiting until it is ready: %w", err)
		}
		if slices.Contains(strings.Split(string(message[:n]), "\n"), "READY=1") {
			return nil
		}
	}
}

// lastLine is what a program that ended said last: why, if it is a good one.
func lastLine(p *Process) string {
	if line := p.Tail(1); line != "" {
		return strings.TrimPrefix(line, "sidegate: ")
	}
	return fmt.Sprintf("it ended without a word (%v)", p.Wait())
}
