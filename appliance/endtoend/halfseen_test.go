package endtoend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/datapath"
	"sidegate/appliance/lab"
	"sidegate/appliance/policy"
)

// watched is a datapath at work in the lab's gateway, asked for what it sees of direct connections. It is the built
// program's, without the program, which would weigh the evidence itself.
type watched struct {
	world
	*datapath.Datapath
	servers []*lab.Host
	echo    uint16 // port on which each server echoes
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{world: newWorld(t, lab.Options{}), echo: 7}
	w.servers = []*lab.Host{w.server()}
	for i := range 2 {
		h, err := w.AddServer(t.Context(), fmt.Sprint("other", i))
		need(t, err)
		w.servers = append(w.servers, h)
	}
	for _, h := range w.servers {
		_, err := h.StartEcho(t.Context(), w.echo)
		need(t, err)
	}
	box := w.sidegate()
	need(t, box.Do(func() (err error) {
		w.Datapath, err = datapath.Open(t.Context(), datapath.Options{StateDir: t.TempDir() + "/state", Log: slog.New(slog.DiscardHandler)})
		return err
	}))
	t.Cleanup(func() { need(t, box.Do(w.Datapath.Close)) })
	need(t, box.Do(func() error {
		i := box.Interface()
		return w.Apply(t.Context(), datapath.Desired{
			Policy:       &policy.Policy{Default: policy.OutboundDirect},
			Interfaces:   []datapath.Interface{{Name: i.Name, Index: i.Index, Ethernet: true}},
			OwnAddresses: []netip.Addr{box.Addr4(), box.Addr6()},
		})
	}))
	return w
}

// nft loads rules on a host.
func nft(t *testing.T, h *lab.Host, rules string) {
	t.Helper()
	c := h.Command(t.Context(), "nft", "-f", "-")
	c.Stdin = strings.NewReader(rules)
	need(t, c.Run())
}

// visit sends a few bytes, wants them back, and waits for the server to close.
func (w *watched) visit(ctx context.Context, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := w.laptop().Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	if err := tryExchange(c, 100); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, c)
	return err
}

func (w *watched) everywhere() (to []netip.AddrPort) {
	for _, h := range w.servers {
		to = append(to, netip.AddrPortFrom(h.Addr4(), w.echo), netip.AddrPortFrom(h.Addr6(), w.echo))
	}
	return to
}

func (w *watched) evidence(t *testing.T) (datapath.Halves, datapath.Evidence) {
	t.Helper()
	halves, err := w.Halves()
	need(t, err)
	return halves, halves.Evidence()
}

// TestHalfSeenConnectionsAreEvidence: three networks that drop what they see only one half of, and what the gateway makes of
// the laptop's connections there. The same world carried them before.
func TestHalfSeenConnectionsAreEvidence(t *testing.T) {
	for name, hinder := range hindrances {
		pattern := datapath.Stalled
		if strings.Contains(name, "MAC") {
			pattern = datapath.Unanswered
		}
		t.Run(name, func(t *testing.T) {
			w := newWatched(t)
			// The healthy network first: else the test proves nothing of the rules that break it.
			for _, to := range w.everywhere() {
				if err := w.visit(t.Context(), to); err != nil {
					t.Fatalf("before: %v", err)
				}
			}
			need(t, hinder(t.Context(), w.world))
			before := time.Now()
			succeeded := restless(t, w.visit, w.everywhere()...)
			var first time.Duration
			need(t, lab.Wait(within(t, 30*time.Second), "convincing evidence", func() error {
				_, e := w.evidence(t)
				if e.Pattern != datapath.Undecided && first == 0 {
					first = time.Since(before)
				}
				if e.Pattern != pattern || !e.Convincing() || len(e.Failing) < len(w.everywhere()) || e.Clients != 1 {
					return fmt.Errorf("evidence: %+v", e)
				}
				return nil
			}))
			t.Logf("evidence after %v, of every destination after %v", first.Round(time.Millisecond), time.Since(before).Round(time.Millisecond))
			if n := succeeded(); n != 0 {
				t.Errorf("%d connections were carried: the network does not drop them", n)
			}
		})
	}
}

// failing counts the destinations.
func failing(halves datapath.Halves, pattern datapath.Outcome) int {
	to := map[netip.AddrPort]bool{}
	for _, h := range halves {
		if h.Outcome == pattern {
			to[h.Destination] = true
		}
	}
	return len(to)
}

// TestHealthyConnections: networks in which connections fail for other reasons. The reasons are seen, and are not
// evidence beside what is carried.
func TestHealthyConnections(t *testing.T) {
	dead := netip.MustParseAddrPort("203.0.113.77:7")
	for name, test := range map[string]struct {
		breaks func(*testing.T, *watched)
		more   func(*watched) netip.AddrPort
		fails  bool // a failing connection must be seen
	}{
		"a dead address": {func(t *testing.T, w *watched) {
			_, err := w.router().Exec(t.Context(), "ip", "route", "add", "blackhole", dead.Addr().String())
			need(t, err)
		}, func(*watched) netip.AddrPort { return dead }, true},
		"a server that drops what goes to a port": {func(t *testing.T, w *watched) {
			nft(t, w.server(), "table inet guard {\n\tchain input {\n\t\ttype filter hook input priority filter;\n\t\ttcp dport 81 drop\n\t}\n}\n")
		}, func(w *watched) netip.AddrPort { return netip.AddrPortFrom(w.server().Addr4(), 81) }, true},
		"a network that loses 5 percent": {func(t *testing.T, w *watched) {
			nft(t, w.router(), "table inet lossy {\n\tchain forward {\n\t\ttype filter hook forward priority filter;\n\t\tmeta random < 214748364 drop\n\t}\n}\n")
		}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWatched(t)
			test.breaks(t, w)
			to := w.everywhere()
			if test.more != nil {
				to = append(to, test.more(w))
			}
			succeeded := restless(t, w.visit, to...)
			err := lab.Wait(within(t, 30*time.Second), "connections", func() error {
				halves, e := w.evidence(t)
				if e.Convincing() {
					return fmt.Errorf("evidence: %+v", e)
				}
				if n := succeeded(); n < 100 {
					return fmt.Errorf("only %d connections carried", n)
				}
				if test.fails && failing(halves, datapath.Unanswered) == 0 {
					return errors.New("nothing fails")
				}
				return nil
			})
			need(t, err)
			if halves, e := w.evidence(t); e.Pattern != datapath.Undecided {
				t.Errorf("evidence: %+v, of %v", e, halves)
			} else {
				t.Logf("%d connections carried, %d destinations fail", succeeded(), failing(halves, datapath.Unanswered))
			}
		})
	}
}

// TestDeadServerAlone: where nothing else is tried a dead server looks the same; it is evidence, and not convincing.
func TestDeadServerAlone(t *testing.T) {
	w := newWatched(t)
	_, err := w.router().Exec(t.Context(), "ip", "route", "add", "blackhole", "203.0.113.77")
	need(t, err)
	dead := netip.MustParseAddrPort("203.0.113.77:7")
	restless(t, w.visit, dead)
	need(t, lab.Wait(within(t, 30*time.Second), "evidence", func() error {
		if _, e := w.evidence(t); e.Pattern != datapath.Unanswered || len(e.Failing) != 1 || e.Failing[0] != dead || e.Convincing() {
			return fmt.Errorf("evidence: %+v", e)
		}
		return nil
	}))
}
