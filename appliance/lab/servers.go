package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// MissingError says that a program which a peer needs is not installed. Tests skip on it; Package is what to install on
// Debian and Ubuntu.
type MissingError struct{ Binary, Package string }

func (e MissingError) Error() string {
	return fmt.Sprintf("%s is not installed: install the package %s", e.Binary, e.Package)
}

// find looks a program up, in the directories for administrators too, which the path of an ordinary user lacks.
func find(binary, pkg string) (string, error) {
	if path, err := exec.LookPath(binary); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, binary)); err == nil {
			return path, nil
		}
	}
	return "", MissingError{binary, pkg}
}

// Credentials are asked for by a proxy; the zero value means that it lets everyone in.
type Credentials struct{ User, Password string }

// crypt hashes the password as crypt(3) does, through perl, which is part of every Debian: Go has no crypt.
func (c Credentials) crypt(ctx context.Context) (string, error) {
	perl, err := find("perl", "perl-base")
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, perl, "-e", `print crypt(<STDIN>, '$6$sidegate$')`)
	cmd.Stdin = strings.NewReader(c.Password)
	hash, err := cmd.Output()
	if err != nil || !strings.HasPrefix(string(hash), "$6$") {
		return "", fmt.Errorf("hashing the password: crypt(3) gave %q: %w", hash, err)
	}
	return string(hash), nil
}

// Daemon is a server process that answers.
type Daemon struct {
	*Process
	Addr4, Addr6 netip.AddrPort
	CA           string // file with the authority of its certificate, if it has one
}

// URL is the server's IPv4 address as a URL of the scheme, with credentials if c has any.
func (d *Daemon) URL(scheme string, c Credentials) string {
	if c.User != "" {
		return fmt.Sprintf("%s://%s:%s@%s", scheme, c.User, c.Password, d.Addr4)
	}
	return fmt.Sprintf("%s://%s", scheme, d.Addr4)
}

// listens asks the kernel, not the server: iperf3 takes a connection that says nothing for its only client.
func (h *Host) listens(port uint16) error {
	return h.Do(func() error {
		for _, table := range []string{"tcp", "tcp6"} {
			sockets, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(sockets)) {
				const stateListen = "0A" // proc_net_tcp in the kernel's documentation
				f := strings.Fields(line)
				if len(f) > 3 && f[3] == stateListen && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
					return nil
				}
			}
		}
		return fmt.Errorf("nothing listens on port %d", port)
	})
}

// startDaemon starts a prepared server and waits until it listens on a TCP port.
func (h *Host) startDaemon(c *Command, port uint16) (*Daemon, error) {
	p, err := c.Start()
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		Process: p,
		Addr4:   netip.AddrPortFrom(h.Addr4(), port),
		Addr6:   netip.AddrPortFrom(h.Addr6(), port),
	}
	ctx, cancel := context.WithTimeout(c.ctx, 15*time.Second)
	defer cancel()
	ctx, end := p.whileAlive(ctx, func() error { return errors.New("it has ended") })
	defer end()
	err = Wait(ctx, fmt.Sprintf("%s to listen on %s", p.name, d.Addr4), func() error { return h.listens(port) })
	if err != nil {
		log := p.tailForError()
		return nil, errors.Join(fmt.Errorf("%w%s", err, log), p.Kill())
	}
	return d, nil
}

// DanteOptions configure StartDante. Port 0 means 1080.
type DanteOptions struct {
	Port        uint16
	Credentials Credentials // SOCKS5 user and password (RFC 1929)
	Resolver    netip.Addr  // whom it asks for names; none: it reaches addresses only
	AnyPeer     bool        // passes on UDP from whoever sends it, and not only from those whom the client has written to
}

// StartDante starts a SOCKS5 server with CONNECT and UDP ASSOCIATE, reached over either family and reaching both.
func (h *Host) StartDante(ctx context.Context, o DanteOptions) (*Daemon, error) {
	binary, err := find("danted", "dante-server")
	if err != nil {
		return nil, err
	}
	if o.Port == 0 {
		o.Port = 1080
	}
	method, device, connect := "none", h.interfaces[0].Name, "yes"
	if o.AnyPeer {
		connect = "no"
	}
	if o.Credentials.User != "" {
		method = "username"
	}
	config := fmt.Sprintf(`logoutput: stderr
internal.protocol: ipv4 ipv6
internal: %[1]s port = %[2]d
external.protocol: ipv4 ipv6
external: %[1]s
clientmethod: none
socksmethod: %[3]s
udp.connectdst: %[4]s
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: connect udpassociate bind }
socks pass { from: 0/0 to: 0/0 command: udpreply bindreply }
`, device, o.Port, method, connect)
	path := h.lab.file("danted", ".conf")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	command := h.Command(ctx, binary, "-f", path, "-p", h.lab.file("danted", ".pid"))
	if o.Credentials.User != "" {
		if command, err = h.withAccount(ctx, o.Credentials, command); err != nil {
			return nil, err
		}
	}
	if o.Resolver.IsValid() {
		if command, err = command.Resolving(o.Resolver); err != nil {
			return nil, err
		}
	}
	return h.startDaemon(command, o.Port)
}

// withAccount makes a program see one more user of the system: dante asks the system's user database.
func (h *Host) withAccount(ctx context.Context, c Credentials, inner *Command) (*Command, error) {
	hash, err := c.crypt(ctx)
	if err != nil {
		return nil, err
	}
	replaced := make(map[string]string)
	for file, line := range map[string]string{
		"passwd": c.User + ":x:65000:65000::/nonexistent:/usr/sbin/nologin\n",
		"shadow": c.User + ":" + hash + ":20000:0:99999:7:::\n",
	} {
		text, err := os.ReadFile("/etc/" + file)
		if err != nil {
			return nil, err
		}
		path := h.lab.file(file, "")
		mode := map[string]os.FileMode{"passwd": 0o644, "shadow": 0o600}[file]
		if err := os.WriteFile(path, append(text, line...), mode); err != nil {
			return nil, err
		}
		replaced["/etc/"+file] = path
	}
	return inner.seeing(replaced), nil
}

// SquidOptions configure StartSquid. Port 0 means 3128.
type SquidOptions struct {
	Port        uint16
	Credentials Credentials // basic authentication (RFC 7617)
	TLS         bool        // an HTTPS proxy, with a certificate for its addresses
}

// StartSquid starts an HTTP proxy that allows CONNECT to any port.
func (h *Host) StartSquid(ctx context.Context, o SquidOptions) (*Daemon, error) {
	binary, err := find("squid", "squid")
	if err != nil {
		return nil, err
	}
	if o.Port == 0 {
		o.Port = 3128
	}
	access := "http_access allow all\n"
	if o.Credentials.User != "" {
		helper := "/usr/lib/squid/basic_ncsa_auth"
		if _, err := os.Stat(helper); err != nil {
			return nil, MissingError{helper, "squid"}
		}
		hash, err := o.Credentials.crypt(ctx)
		if err != nil {
			return nil, err
		}
		users := h.lab.file("squid", ".users")
		if err := os.WriteFile(users, []byte(o.Credentials.User+":"+hash+"\n"), 0o644); err != nil {
			return nil, err
		}
		access = fmt.Sprintf("auth_param basic program %s %s\nacl known proxy_auth REQUIRED\nhttp_access allow known\n"+
			"http_access deny all\n", helper, users)
	}
	listen, ca := fmt.Sprintf("http_port %d", o.Port), ""
	if o.TLS {
		certificate, err := h.Certificate()
		if err != nil {
			return nil, err
		}
		authority, err := h.lab.Authority()
		if err != nil {
			return nil, err
		}
		listen = fmt.Sprintf("https_port %d tls-cert=%s tls-key=%s", o.Port, certificate.File, certificate.Key)
		ca = authority.File
	}
	// cache_log on standard error joins the process's log; the service name keeps its shared memory apart from a squid
	// that the machine may run.
	config := fmt.Sprintf(`%s
%scache deny all
cache_mem 8 MB
access_log none
cache_log /dev/stderr
cache_store_log none
pid_filename none
coredump_dir %s
pinger_enable off
shutdown_lifetime 0 seconds
dns_nameservers 127.0.0.1
visible_hostname sidegate-lab
`, listen, access, h.lab.Dir())
	path := h.lab.file("squid", ".conf")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	service := "sg" + strings.ReplaceAll(h.lab.ID(), ".", "x") + h.name
	d, err := h.startDaemon(h.Command(ctx, binary, "-N", "-f", path, "-n", service), o.Port)
	if err != nil {
		return nil, err
	}
	d.CA = ca
	return d, nil
}

// StartMicrosocks starts a small SOCKS5 server without UDP.
func (h *Host) StartMicrosocks(ctx context.Context, port uint16, c Credentials) (*Daemon, error) {
	binary, err := find("microsocks", "microsocks")
	if err != nil {
		return nil, err
	}
	args := []string{"-i", "::", "-p", strconv.Itoa(int(port))}
	if c.User != "" {
		args = append(args, "-u", c.User, "-P", c.Password)
	}
	return h.startDaemon(h.Command(ctx, binary, args...), port)
}

// StartIperf3 starts an iperf3 server.
func (h *Host) StartIperf3(ctx context.Context, port uint16) (*Daemon, error) {
	binary, err := find("iperf3", "iperf3")
	if err != nil {
		return nil, err
	}
	return h.startDaemon(h.Command(ctx, binary, "-s", "-p", strconv.Itoa(int(port)), "--forceflush"), port)
}
