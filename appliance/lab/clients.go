package lab

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// This file runs clients that others wrote, as people and their programs do.

// Reply is what dig reports of an answer.
type Reply struct {
	Status  string   // NOERROR, NXDOMAIN, SERVFAIL, …
	Flags   string   // such as "qr rd ra"
	Records []string // of the answer section, as "name ttl IN type data"
	Took    time.Duration
}

// Data are the data of the records of one type, in order.
func (r Reply) Data(kind string) (data []string) {
	for _, line := range r.Records {
		if f := strings.Fields(line); len(f) > 4 && f[3] == kind {
			data = append(data, strings.Join(f[4:], " "))
		}
	}
	return data
}

// Dig asks a server for a name with dig, once, for at most five seconds: args are more of its arguments, such as "AAAA" or
// "+tcp". dig takes an answer only from the address that it asked.
func (h *Host) Dig(ctx context.Context, server netip.Addr, name string, args ...string) (Reply, error) {
	binary, err := find("dig", "bind9-dnsutils")
	if err != nil {
		return Reply{}, err
	}
	begun := time.Now()
	args = append([]string{"@" + server.String(), name, "+tries=1", "+timeout=5", "+nocookie"}, args...)
	out, err := h.Exec(ctx, binary, args...)
	reply := Reply{Took: time.Since(begun)}
	if err != nil {
		// dig says on standard output why it has no answer.
		return reply, errors.Join(err, errors.New(strings.TrimSpace(out)))
	}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, ";; ->>HEADER<<-"):
			if m := digStatus.FindStringSubmatch(line); m != nil {
				reply.Status = m[1]
			}
		case strings.HasPrefix(line, ";; flags: "):
			reply.Flags, _, _ = strings.Cut(strings.TrimPrefix(line, ";; flags: "), ";")
		case line != "" && line[0] != ';':
			reply.Records = append(reply.Records, line)
		}
	}
	if reply.Status == "" {
		return reply, fmt.Errorf("dig from %s said nothing of an answer: %s", h.name, out)
	}
	return reply, nil
}

var digStatus = regexp.MustCompile(`status: (\w+)`)

// Curl runs curl, which trusts the lab's authority, and returns what it fetched. It looks names up at resolver, unless
// args say otherwise.
func (h *Host) Curl(ctx context.Context, resolver netip.Addr, args ...string) (string, error) {
	binary, err := find("curl", "curl")
	if err != nil {
		return "", err
	}
	authority, err := h.lab.Authority()
	if err != nil {
		return "", err
	}
	args = append([]string{"-sS", "--fail", "--max-time", "15", "--cacert", authority.File}, args...)
	c, err := h.Command(ctx, binary, args...).Resolving(resolver)
	if err != nil {
		return "", err
	}
	return c.Output()
}

// Getent looks a name up with getaddrinfo(3), which asks resolver.
func (h *Host) Getent(ctx context.Context, resolver netip.Addr, name string) ([]netip.Addr, error) {
	c, err := h.Command(ctx, "getent", "ahosts", name).Resolving(resolver)
	if err != nil {
		return nil, err
	}
	out, err := c.Output()
	if err != nil {
		return nil, err
	}
	var found []netip.Addr
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == "STREAM" {
			a, err := netip.ParseAddr(f[0])
			if err != nil {
				return nil, err
			}
			found = append(found, a)
		}
	}
	return found, nil
}

// ChromiumOptions say how Chromium looks at a page.
type ChromiumOptions struct {
	URL      string
	Resolver netip.Addr
	DoH      string   // URL of a DNS server that it asks by HTTPS instead, and no other
	QUIC     []string // "name:port" of sites that it speaks HTTP/3 with from the beginning
}

// Chromium opens a page without a window and returns its elements as HTML, when it has loaded and its scripts have
// waited for what they fetch. It trusts the lab's authority.
func (h *Host) Chromium(ctx context.Context, o ChromiumOptions) (string, error) {
	binary, err := find("chromium", "chromium")
	if err != nil {
		return "", err
	}
	authority, err := h.lab.Authority()
	if err != nil {
		return "", err
	}
	profile := h.lab.file("chromium", "")
	if err := os.Mkdir(profile, 0o700); err != nil {
		return "", err
	}
	if o.DoH != "" {
		state, err := json.Marshal(map[string]any{"dns_over_https": map[string]string{"mode": "secure", "templates": o.DoH}})
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(profile, "Local State"), state, 0o600); err != nil {
			return "", err
		}
	}
	args := []string{
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
		"--user-data-dir=" + profile, "--ignore-certificate-errors-spki-list=" + authority.Fingerprint,
		"--virtual-time-budget=20000", "--dump-dom",
	}
	if len(o.QUIC) > 0 {
		args = append(args, "--enable-quic", "--origin-to-force-quic-on="+strings.Join(o.QUIC, ","))
	}
	c := h.Command(ctx, binary, append(args, o.URL)...)
	c.Env = []string{"HOME=" + profile, "XDG_RUNTIME_DIR=" + profile, "DBUS_SESSION_BUS_ADDRESS=unix:path=/nonexistent"}
	if c, err = c.Resolving(o.Resolver); err != nil {
		return "", err
	}
	return c.Output()
}

// DnsperfOptions say what dnsperf asks. Zero values are dnsperf's own.
type DnsperfOptions struct {
	Server      netip.AddrPort
	Names       []string // asked for type A, in turn
	Clients     int      // sockets
	Outstanding int      // questions without an answer yet
	Rate        int      // a second
	For         time.Duration
	Once        bool // each name once, instead
	Latencies   bool // of each answer; costs dnsperf speed
}

// DnsperfResult is what dnsperf measured.
type DnsperfResult struct {
	Sent, Completed, Lost int
	PerSecond             float64
	Latencies             []time.Duration // in order of arrival, if they were asked for
}

// Dnsperf asks a DNS server as fast as it answers.
func (h *Host) Dnsperf(ctx context.Context, o DnsperfOptions) (r DnsperfResult, err error) {
	binary, err := find("dnsperf", "dnsperf")
	if err != nil {
		return r, err
	}
	names := h.lab.file("dnsperf", ".names")
	if err := os.WriteFile(names, []byte(strings.Join(o.Names, " A\n")+" A\n"), 0o644); err != nil {
		return r, err
	}
	args := []string{
		"-s", o.Server.Addr().String(), "-p", strconv.Itoa(int(o.Server.Port())), "-d", names,
		"-c", strconv.Itoa(cmp.Or(o.Clients, 8)), "-q", strconv.Itoa(cmp.Or(o.Outstanding, 200)),
	}
	if o.Once {
		args = append(args, "-n", "1")
	} else {
		args = append(args, "-l", strconv.Itoa(int(max(o.For, time.Second).Seconds())))
	}
	if o.Rate > 0 {
		args = append(args, "-Q", strconv.Itoa(o.Rate))
	}
	if o.Latencies {
		args = append(args, "-v")
	}
	out, err := h.Exec(ctx, binary, args...)
	if err != nil {
		return r, err
	}
	for what, into := range map[string]any{
		"Queries sent": &r.Sent, "Queries completed": &r.Completed, "Queries lost": &r.Lost, "Queries per second": &r.PerSecond,
	} {
		_, after, ok := strings.Cut(out, what+":")
		if ok {
			_, err = fmt.Sscan(after, into)
		}
		if !ok || err != nil {
			return r, fmt.Errorf("dnsperf does not say how many %s: %s", strings.ToLower(what), out)
		}
	}
	if !o.Latencies {
		return r, nil
	}
	for line := range strings.Lines(out) { // "> NOERROR www.test A 0.000123"
		f := strings.Fields(line)
		if len(f) != 5 || f[0] != ">" {
			continue
		}
		seconds, err := strconv.ParseFloat(f[4], 64)
		if err != nil {
			return r, fmt.Errorf("reading a latency of dnsperf's: %w", err)
		}
		r.Latencies = append(r.Latencies, time.Duration(seconds*float64(time.Second)))
	}
	return r, nil
}
