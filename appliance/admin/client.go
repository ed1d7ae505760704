package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"
)

// ErrNotRunning says that no gateway answers on the socket.
var ErrNotRunning = errors.New("no sidegate is running")

// Client asks a running gateway.
type Client struct {
	path string
	http http.Client
}

// maxAnswer bounds what a client reads, in bytes: some million flows.
const maxAnswer = 1 << 30

// NewClient makes a client of the gateway behind a socket. Nothing is opened yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &Client{
		path: socket,
		http: http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
	}
}

// Status asks how the gateway fares.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.ask(ctx, http.MethodGet, "status", nil, &s)
}

// Flows asks for the flow table.
func (c *Client) Flows(ctx context.Context) (f []Flow, err error) {
	return f, c.ask(ctx, http.MethodGet, "flows", nil, &f)
}

// Names asks for what clients know addresses by.
func (c *Client) Names(ctx context.Context) (n []Name, err error) {
	return n, c.ask(ctx, http.MethodGet, "names", nil, &n)
}

// Rules asks for the policy in force.
func (c *Client) Rules(ctx context.Context) (r []Rule, err error) {
	return r, c.ask(ctx, http.MethodGet, "rules", nil, &r)
}

// Explain asks for a decision. Facts are as Gateway.Explain takes them.
func (c *Client) Explain(ctx context.Context, facts map[string][]string) (e LiveExplanation, err error) {
	return e, c.ask(ctx, http.MethodGet, "explain", facts, &e)
}

// Reload makes the gateway read its configuration again. That the configuration is refused is not an error
// of the call: see Reload.OK.
func (c *Client) Reload(ctx context.Context) (r Reload, err error) {
	return r, c.ask(ctx, http.MethodPost, "reload", nil, &r)
}

func (c *Client) ask(ctx context.Context, method, noun string, query url.Values, into any) error {
	target := url.URL{Scheme: "http", Host: "sidegate", Path: "/v1/" + noun, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, target.String(), nil)
	if err != nil {
		return fmt.Errorf("asking the gateway: %w", err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return c.explain(err)
	}
	defer response.Body.Close()
	body := io.LimitReader(response.Body, maxAnswer)
	if response.StatusCode != http.StatusOK {
		var f failure
		if err := json.NewDecoder(body).Decode(&f); err != nil || f.Error == "" {
			f.Error = response.Status
		}
		return errors.New(f.Error)
	}
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("reading the gateway's answer: %w", err)
	}
	return nil
}

// explain says what a failed connection means, and what to do.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (nothing answers on %s); start it with: sidegate run", ErrNotRunning, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("you may not open %s; become root, or a member of its group", c.path)
	}
	if wrapped := (*url.Error)(nil); errors.As(err, &wrapped) {
		err = wrapped.Err // without the made-up URL
	}
	return fmt.Errorf("asking the gateway on %s: %w", c.path, err)
}
