package lab

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// NginxOptions configure StartNginx. A port of 0 means that it is not listened on.
type NginxOptions struct {
	HTTP, HTTPS uint16 // HTTPS speaks HTTP/1.1 and HTTP/2
	HTTP2       uint16 // without TLS, for clients that know in advance
	Sites       []Site // the first takes names that no other has
}

// Site is what one web server of several on one address shows: its pages by path, beside /whoami, which answers with a
// Visit. Its name has a certificate of the lab's authority.
type Site struct {
	Name  string
	Pages map[string]string
}

// Visit is what a server says about who asked it. Address is the client's, as the server sees it; Site the one that
// answered, by the name that the client gave.
type Visit struct {
	Address  netip.Addr
	Site     string
	Protocol string // HTTP/1.1, HTTP/2.0 or HTTP/3.0
}

func (v Visit) String() string { return fmt.Sprintf("%s %s %s", v.Address, v.Site, v.Protocol) }

// ParseVisit reads what /whoami answers.
func ParseVisit(text string) (Visit, error) {
	f := strings.Fields(text)
	if len(f) != 3 {
		return Visit{}, fmt.Errorf("%q is not what a server says about its visitor", text)
	}
	a, err := netip.ParseAddr(f[0])
	return Visit{a.Unmap(), f[1], f[2]}, err
}

// StartNginx starts a web server on all addresses of the host, also those of OwnPrefix.
func (h *Host) StartNginx(ctx context.Context, o NginxOptions) (*Daemon, error) {
	binary, err := find("nginx", "nginx")
	if err != nil {
		return nil, err
	}
	root := h.lab.file("nginx", "")
	var servers strings.Builder
	for _, s := range o.Sites {
		if err := s.write(filepath.Join(root, s.Name)); err != nil {
			return nil, fmt.Errorf("writing the pages of %s: %w", s.Name, err)
		}
		certificate, err := h.Certificate(s.Name)
		if err != nil {
			return nil, err
		}
		servers.WriteString("server {\n")
		for port, kind := range map[uint16]string{o.HTTP: "", o.HTTP2: "http2", o.HTTPS: "ssl http2"} {
			if port != 0 {
				fmt.Fprintf(&servers, "listen 0.0.0.0:%[1]d %[2]s; listen [::]:%[1]d %[2]s;\n", port, kind)
			}
		}
		fmt.Fprintf(&servers, "server_name %s; root %s; ssl_certificate %s; ssl_certificate_key %s;\n",
			s.Name, filepath.Join(root, s.Name), certificate.File, certificate.Key)
		servers.WriteString("location = /whoami { return 200 \"$remote_addr $server_name $server_protocol\\n\"; }\n}\n")
	}
	temporary := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temporary += fmt.Sprintf("%s_temp_path %s;\n", kind, filepath.Join(root, kind))
	}
	config := fmt.Sprintf(`daemon off;
user root;
pid %[1]s/pid;
error_log stderr;
worker_processes 1;
events { worker_connections 8192; }
http {
access_log off;
server_names_hash_bucket_size 128;
default_type text/html;
add_header Access-Control-Allow-Origin * always;
add_header Cache-Control no-store always;
%[2]s%[3]s}
`, root, temporary, servers.String())
	path := h.lab.file("nginx", ".conf")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	return h.startDaemon(h.Command(ctx, binary, "-e", "stderr", "-c", path), cmp.Or(o.HTTPS, o.HTTP, o.HTTP2))
}

func (s Site) write(root string) error {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	for path, text := range s.Pages {
		file := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// StartHTTP3 starts an HTTP/3 server inside this process on a UDP port of all the host's addresses, by quic-go. Each of
// the names is a site with /whoami.
func (h *Host) StartHTTP3(ctx context.Context, port uint16, names ...string) (netip.AddrPort, error) {
	at, err := h.startHTTP3(ctx, port, names)
	if err != nil {
		return at, fmt.Errorf("starting the HTTP/3 server on %s: %w", h.name, err)
	}
	return at, nil
}

func (h *Host) startHTTP3(ctx context.Context, port uint16, names []string) (at netip.AddrPort, err error) {
	certificates, err := h.certificates(names)
	if err != nil {
		return at, err
	}
	socket, err := h.ListenUDP(ctx, "udp", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return at, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /whoami", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Cache-Control", "no-store")
		fmt.Fprintln(w, Visit{sender(r).Addr(), r.TLS.ServerName, r.Proto})
	})
	server := &http3.Server{
		Handler:   mux,
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: certificates}),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(socket) }()
	_, ok := h.lab.onClose(func() error {
		err := errors.Join(server.Close(), socket.Close())
		if e := <-done; e != nil && !errors.Is(e, http.ErrServerClosed) && !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
		return err
	})
	if !ok {
		server.Close()
		socket.Close()
		<-done
		return at, errClosed
	}
	return netip.AddrPortFrom(h.Addr4(), port), nil
}

// certificates makes one for each name: a client may go on using a connection for another name that its certificate has.
func (h *Host) certificates(names []string) (all []tls.Certificate, err error) {
	for _, name := range names {
		c, err := h.Certificate(name)
		if err != nil {
			return nil, err
		}
		all = append(all, c.Pair)
	}
	return all, nil
}

// VisitHTTP3 asks for https://name/whoami at an address by HTTP/3, on a new connection from a port (0: any free one), and says how
// long it was from the first packet to the answer.
func (h *Host) VisitHTTP3(ctx context.Context, port uint16, name string, at netip.AddrPort) (Visit, time.Duration, error) {
	socket, err := h.ListenUDP(ctx, "udp", fmt.Sprintf(":%d", port))
	if err != nil {
		return Visit{}, 0, err
	}
	defer socket.Close()
	return h.VisitHTTP3By(ctx, socket, name, at)
}

// VisitHTTP3By does that by a socket of the caller's.
func (h *Host) VisitHTTP3By(ctx context.Context, socket net.PacketConn, name string, at netip.AddrPort) (_ Visit, _ time.Duration, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("visiting %s at %s from %s by HTTP/3: %w", name, at, h.name, err)
		}
	}()
	authority, err := h.lab.Authority()
	if err != nil {
		return Visit{}, 0, err
	}
	transport := &quic.Transport{Conn: socket}
	defer transport.Close()
	tripper := &http3.Transport{
		TLSClientConfig: &tls.Config{RootCAs: authority.Pool, ServerName: name},
		Dial: func(ctx context.Context, _ string, config *tls.Config, q *quic.Config) (*quic.Conn, error) {
			return transport.DialEarly(ctx, net.UDPAddrFromAddrPort(at), config, q)
		},
	}
	defer tripper.Close()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+name+"/whoami", nil)
	if err != nil {
		return Visit{}, 0, err
	}
	begun := time.Now()
	response, err := tripper.RoundTrip(request)
	if err != nil {
		return Visit{}, 0, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return Visit{}, 0, err
	}
	took := time.Since(begun)
	v, err := ParseVisit(string(text))
	return v, took, err
}
