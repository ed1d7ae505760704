package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// BadRequest is an error that is the caller's.
type BadRequest struct{ Err error }

func (e BadRequest) Error() string { return e.Err.Error() }
func (e BadRequest) Unwrap() error { return e.Err }

// SocketOptions say where the API is and who may use it. The owner always may.
type SocketOptions struct {
	Path  string
	Group string // name or number; empty: the group of the process
}

// The API is for small questions: whatever is larger or slower is a mistake or an attack.
const (
	maxHeader     = 8 << 10 // bytes; explain's facts are in the URL
	headerTimeout = 5 * time.Second
	writeTimeout  = 60 * time.Second // a full flow table to a slow terminal
	idleTimeout   = 30 * time.Second
	stopTimeout   = 2 * time.Second
)

// Server is the API.
type Server struct {
	listener *net.UnixListener
	http     *http.Server
	made     string // the socket's directory, if it is of our making
	ready    chan struct{}
}

// Listen opens the socket, mode 0660, and makes its directory, mode 0755, if there is none. It replaces the
// socket of a predecessor that crashed, and refuses where somebody answers.
func Listen(o SocketOptions, g Gateway, log *slog.Logger) (*Server, error) {
	made := ""
	if dir := filepath.Dir(o.Path); os.Mkdir(dir, 0o755) == nil {
		made = dir
	}
	listener, err := listenUnix(o)
	if err != nil {
		removeEmpty(made)
		return nil, fmt.Errorf("opening the admin socket %s: %w", o.Path, err)
	}
	s := &Server{
		listener: listener,
		made:     made,
		ready:    make(chan struct{}),
		http: &http.Server{
			Handler:           api(g),
			MaxHeaderBytes:    maxHeader,
			ReadHeaderTimeout: headerTimeout,
			ReadTimeout:       headerTimeout,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       idleTimeout,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}
	return s, nil
}

func listenUnix(o SocketOptions) (*net.UnixListener, error) {
	gid, err := groupID(o.Group)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o755); err != nil {
		return nil, err
	}
	if err := removeStale(o.Path); err != nil {
		return nil, err
	}
	// The mode is right from the start: between bind and a chmod anybody could connect.
	old := syscall.Umask(0o117)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.Path, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		if err := os.Chown(o.Path, -1, gid); err != nil {
			listener.Close()
			return nil, err
		}
	}
	return listener, nil
}

// groupID is -1 for no group.
func groupID(group string) (int, error) {
	if group == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("there is no group %q: create it (groupadd --system %s) or name another", group, group)
	}
	return strconv.Atoi(g.Gid)
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return errors.New("there is a file that is not a socket: remove it, or choose another path")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return errors.New("another sidegate answers there: stop it, or choose another path")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

func (s *Server) String() string { return "admin api" }

// Ready is closed when requests are answered.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Run answers until ctx ends, and removes the socket.
func (s *Server) Run(ctx context.Context) error {
	close(s.ready)
	defer removeEmpty(s.made)
	return serve(ctx, s.http, s.listener)
}

// Close gives the socket up without having served. After Run it does nothing.
func (s *Server) Close() {
	s.listener.Close() // which removes the socket
	removeEmpty(s.made)
}

// removeEmpty removes a directory of our making, unless somebody uses it.
func removeEmpty(dir string) {
	if dir != "" {
		os.Remove(dir)
	}
}

// serve runs an HTTP server until ctx ends. Requests that are being answered get a moment to finish.
func serve(ctx context.Context, server *http.Server, listener net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if server.Shutdown(stop) != nil {
		server.Close()
	}
	<-failed
	return nil
}

// api is the whole interface: nouns are read with GET, reload is the one verb.
func api(g Gateway) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", answer(func(r *http.Request) (any, error) { return g.Status(r.Context()) }))
	mux.HandleFunc("GET /v1/flows", answer(func(r *http.Request) (any, error) { return g.Flows(r.Context()) }))
	mux.HandleFunc("GET /v1/names", answer(func(r *http.Request) (any, error) { return g.Names(r.Context()) }))
	mux.HandleFunc("GET /v1/rules", answer(func(r *http.Request) (any, error) { return g.Rules(r.Context()) }))
	mux.HandleFunc("GET /v1/explain", answer(func(r *http.Request) (any, error) {
		return g.Explain(r.Context(), r.URL.Query())
	}))
	mux.HandleFunc("POST /v1/reload", answer(func(r *http.Request) (any, error) {
		// A caller who hangs up must not leave half a reload behind.
		return g.Reload(context.WithoutCancel(r.Context()))
	}))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusNotFound, failure{fmt.Sprintf("there is no %s %s", r.Method, r.URL.Path)})
	})
	return http.MaxBytesHandler(mux, 0) // no request has a body
}

type failure struct {
	Error string `json:"error"`
}

func answer(ask func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := ask(r)
		switch {
		case errors.As(err, new(BadRequest)):
			reply(w, http.StatusBadRequest, failure{err.Error()})
		case err != nil:
			reply(w, http.StatusInternalServerError, failure{err.Error()})
		default:
			reply(w, http.StatusOK, value)
		}
	}
}

func reply(w http.ResponseWriter, status int, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	w.WriteHeader(status)
	w.Write(append(body, '\n')) // whoever hung up does not want to know
}
