package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
)

// FileServer is an HTTP server inside this process that serves and takes random bytes, and remembers who asked.
//
//	GET  /bytes/N   N bytes, always the same ones: Digest(N) is their SHA-256
//	POST /upload    answers with the SHA-256 of the body in hexadecimal
//	GET  /whoami    answers with the sender's address and port
type FileServer struct {
	addr4, addr6 netip.AddrPort

	mu       sync.Mutex
	requests []Request
}

// Request is one that the FileServer has finished answering. Bytes counts the body that was sent or received.
type Request struct {
	From         netip.AddrPort
	Method, Path string
	Bytes        int64
}

// StartFiles starts a file server on a TCP port of the host, both families. The lab stops it on Close.
func (h *Host) StartFiles(ctx context.Context, port uint16) (*FileServer, error) {
	l, err := h.Listen(ctx, "tcp", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, fmt.Errorf("starting the file server on %s: %w", h.name, err)
	}
	port = uint16(l.Addr().(*net.TCPAddr).Port)
	s := &FileServer{addr4: netip.AddrPortFrom(h.Addr4(), port), addr6: netip.AddrPortFrom(h.Addr6(), port)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes/{n}", s.bytes)
	mux.HandleFunc("POST /upload", s.upload)
	mux.HandleFunc("PUT /upload", s.upload)
	mux.HandleFunc("GET /whoami", func(w http.ResponseWriter, r *http.Request) {
		n, _ := fmt.Fprintln(w, sender(r))
		s.record(r, int64(n))
	})
	server := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	_, ok := h.lab.onClose(func() error {
		err := server.Close()
		if e := <-done; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	})
	if !ok {
		server.Close()
		<-done
		return nil, errClosed
	}
	return s, nil
}

// Addr4 is where the server listens.
func (s *FileServer) Addr4() netip.AddrPort { return s.addr4 }

// Addr6 is the same in IPv6.
func (s *FileServer) Addr6() netip.AddrPort { return s.addr6 }

// Requests returns what was answered so far.
func (s *FileServer) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

func (s *FileServer) record(r *http.Request, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, Request{sender(r), r.Method, r.URL.Path, n})
}

func (s *FileServer) bytes(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
	if err != nil || n < 0 {
		http.Error(w, "how many bytes?", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	sent, _ := io.Copy(w, Random(n)) // a client that leaves early is seen in the count
	s.record(r, sent)
}

func (s *FileServer) upload(w http.ResponseWriter, r *http.Request) {
	h := sha256.New()
	n, err := io.Copy(h, r.Body)
	s.record(r, n)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintln(w, hex.EncodeToString(h.Sum(nil)))
}

func sender(r *http.Request) netip.AddrPort {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// Random returns n bytes that depend on n only.
func Random(n int64) io.Reader {
	var seed [32]byte
	copy(seed[:], strconv.FormatInt(n, 10))
	return io.LimitReader(rand.NewChaCha8(seed), n)
}

// Digest is the SHA-256 of Random(n) in hexadecimal.
func Digest(n int64) string {
	h := sha256.New()
	io.Copy(h, Random(n)) // neither side can fail
	return hex.EncodeToString(h.Sum(nil))
}
