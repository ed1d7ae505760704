package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"sidegate/appliance/config"
	"sidegate/appliance/datapath"
	"sidegate/appliance/outbound"
)

// Plan is a configuration with all that is made of it before the kernel is touched. What fails to become
// a Plan is refused by run, reload and check alike, because all of them call Load.
type Plan struct {
	Config     *config.Config
	Path       string // absolute path of the file; empty: the built-in default
	Digest     string // SHA-256 of the file in hexadecimal; empty if it is no regular file
	outbounds  *outbound.Set
	upstreams  []upstream
	resolution *resolution // nil: DNS is ordinary traffic
	inForce    lookup      // by whatever plan is in force; nil: none is
}

// surroundings are what a plan needs of the gateway that it is for. Without one, as when a file is only checked, they
// are empty.
type surroundings struct {
	own    func(netip.Addr) bool
	lookup lookup // of the plan in force
	log    *slog.Logger
}

// Load reads a configuration file, or takes the built-in default for "", makes its outbounds and checks the
// whole policy. Nothing is opened and no name is looked up. Errors are lines of the form FILE:LINE: ….
func Load(path string) (*Plan, error) { return loadFor(path, surroundings{}) }

func loadFor(path string, s surroundings) (_ *Plan, err error) {
	p := &Plan{inForce: s.lookup}
	if path == "" {
		p.Config = config.Default()
	} else {
		c, err := config.Load(path)
		if err != nil {
			return nil, err
		}
		p.Config, p.Path, p.Digest = c, absolute(path), digest(path)
	}
	if err := p.makeOutbounds(); err != nil {
		return nil, err
	}
	if err := p.makeResolution(s); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.resolution.close()
		}
	}()
	// Names and subnets are not known yet, but their rules will count against the limit: each stands in with an address.
	widest := p.combine(func(host string) []netip.Addr {
		if found := literal(host); found != nil {
			return found
		}
		return []netip.Addr{netip.IPv6Loopback()}
	}, []netip.Prefix{netip.MustParsePrefix("::1/128")})
	if err := widest.policy.Validate(); err != nil { // all that Compile would refuse
		return nil, config.Position{File: p.Config.File}.Errorf("%w", err)
	}
	return p, nil
}

// lookup finds a host as the plan says. When the plan has been replaced, and its flows live on, it is as the one in force says.
func (p *Plan) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	addrs, err := p.resolution.lookup(ctx, host)
	if err != nil && p.resolution != nil && p.resolution.closed.Load() && p.inForce != nil {
		return p.inForce(ctx, host)
	}
	return addrs, err
}

func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path // the working directory is gone: as it was named
}

func digest(path string) string {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return "" // standard input can be read once
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (p *Plan) makeOutbounds() error {
	options := outbound.Options{
		Lookup:      p.lookup,
		Control:     markOwn,
		DialTimeout: p.Config.Proxy.DialTimeout,
		Timeout:     p.Config.Proxy.HandshakeTimeout,
	}
	var made []outbound.Outbound
	var errs []error
	for _, name := range sortedKeys(p.Config.Outbounds) {
		spec := p.Config.Outbounds[name]
		credentials := outbound.Credentials{Username: spec.Username, Password: spec.Password.Reveal()}
		o, err := outbound.New(name, spec.URL, credentials, options)
		if err != nil {
			errs = append(errs, spec.Position.Errorf("%w", err))
			continue
		}
		made = append(made, o)
		if host, port, ok := o.Upstream(); ok {
			p.upstreams = append(p.upstreams, upstream{name, host, port})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	set, err := outbound.NewSet(options, made...)
	if err != nil {
		return config.Position{File: p.Config.File}.Errorf("%w", err)
	}
	p.outbounds = set
	return nil
}

// ownDialer connects from the box itself.
func ownDialer() *net.Dialer {
	d := &net.Dialer{Control: markOwn}
	d.SetMultipathTCP(false)
	return d
}

// markOwn marks a socket as the daemon's own, so that the datapath never steers its traffic.
func markOwn(_, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) {
		set = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, datapath.MarkOwn)
	})
	if err = errors.Join(err, set); err != nil {
		return fmt.Errorf("marking the socket %#x: %w", datapath.MarkOwn, err)
	}
	return nil
}
