package exchange

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// sessions are the schemes that keep connections.
var sessions = []string{"tcp", "tls", "https", "h3", "quic"}

func options(scheme string, a authority, timeout time.Duration) Options {
	o := Options{Timeout: timeout}
	if scheme != "tcp" && scheme != "udp" {
		o.CAFile = a.certificate
	}
	return o
}

// TestReuse wants questions one after the other to share a connection.
func TestReuse(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell })
			u := upstream(t, s.url, options(scheme, a, 0))
			for range 20 {
				wantA(t, u, "www.example.")
			}
			if n := s.connections.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestMisbehaviour has servers do each thing to the first question, which is never an answer.
func TestMisbehaviour(t *testing.T) {
	noLeaks(t)
	a := newAuthority(t)
	const timeout = time.Second
	for _, row := range []struct {
		act  act
		want string
	}{
		{silence, "no answer within "},
		{hangUp, ""}, // each protocol has words of its own for it
		{lie, "the answer is to another question"},
		{babble, "the answer is "},
		{refuse, "the server "},
	} {
		for _, scheme := range sessions {
			if row.act == refuse && (scheme == "tcp" || scheme == "tls") {
				continue // these have no other errors than DNS's own
			}
			t.Run(fmt.Sprintf("%d %s", row.act, scheme), func(t *testing.T) {
				t.Parallel()
				s := serve(t, scheme, "127.0.0.1:0", a.pair, func(connection, _ int) act {
					if connection == 1 {
						return row.act
					}
					return tell
				})
				u := upstream(t, s.url, options(scheme, a, timeout))
				err := wantError(t, u, timeout+5*time.Second, row.want)
				if row.act == silence && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%v is not DeadlineExceeded", err)
				}
				if row.act == hangUp || row.act == silence { // that connection is not asked again
					wantA(t, u, "www.example.")
				}
			})
		}
	}
}

// TestDeadConnection has a connection that worked end, in a way that we notice or not, before or when
// the next question comes. That question must be answered all the same.
func TestDeadConnection(t *testing.T) {
	noLeaks(t)
	a := newAuthority(t)
	for _, scheme := range sessions {
		for name, second := range map[string]act{"hangs up": hangUp, "is silent": silence} {
			t.Run(scheme+" "+name, func(t *testing.T) {
				t.Parallel()
				s := serve(t, scheme, "127.0.0.1:0", a.pair, func(connection, question int) act {
					if connection == 1 && question > 1 {
						return second
					}
					return tell
				})
				u := upstream(t, s.url, options(scheme, a, 2*time.Second))
				for range 4 {
					wantA(t, u, "www.example.")
				}
				if n := s.connections.Load(); n != 2 {
					t.Errorf("%d connections; want a second one, and no third", n)
				}
			})
		}
	}
}

// TestRestart has a server end and another one begin at its address.
func TestRestart(t *testing.T) {
	noLeaks(t)
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			var u *Upstream
			t.Run("first", func(t *testing.T) {
				s := serve(t, scheme, loopback(port).String(), a.pair, func(int, int) act { return tell })
				var err error
				if u, err = New("doh", s.url, options(scheme, a, 3*time.Second)); err != nil {
					t.Fatal(err)
				}
				wantA(t, u, "www.example.")
			})
			defer u.Close()
			serve(t, scheme, loopback(port).String(), a.pair, func(int, int) act { return tell })
			wantA(t, u, "www.example.")
		})
	}
}

// TestSlowOne has one question that the server keeps while others are answered: those are not slower,
// and the connection is not given up.
func TestSlowOne(t *testing.T) {
	noLeaks(t)
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			var keep atomic.Bool
			slow := make(chan struct{}, 1)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act {
				if keep.CompareAndSwap(true, false) {
					slow <- struct{}{}
					return silence
				}
				return tell
			})
			u := upstream(t, s.url, options(scheme, a, 2*time.Second))
			wantA(t, u, "www.example.")
			keep.Store(true)
			kept := make(chan error)
			go func() { kept <- askA(t.Context(), u, "slow.example.") }()
			<-slow
			for done := false; !done; {
				select {
				case err := <-kept:
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("the slow question: %v", err)
					}
					done = true
				default:
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					if err := askA(ctx, u, "www.example."); err != nil {
						t.Error(err)
					}
					cancel()
				}
			}
			if n := s.connections.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestCrowd has many questions at once and bounds the connections that they open.
func TestCrowd(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell })
			u := upstream(t, s.url, options(scheme, a, time.Minute))
			var asking sync.WaitGroup
			for i := range 500 {
				asking.Go(func() {
					if err := askA(t.Context(), u, fmt.Sprintf("n%d.example.", i)); err != nil {
						t.Error(err)
					}
				})
			}
			asking.Wait()
			if n := int(s.connections.Load()); n > streamLimits.width {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestStorm asks a server that hangs up on everybody, as fast as it fails, for a while: connections
// stay rare.
func TestStorm(t *testing.T) {
	noLeaks(t)
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return hangUp })
			u := upstream(t, s.url, options(scheme, a, time.Second))
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			var asking sync.WaitGroup
			var asked atomic.Int32
			for range 50 {
				asking.Go(func() {
					for ctx.Err() == nil {
						asked.Add(1)
						if askA(ctx, u, "www.example.") == nil {
							t.Error("answered")
						}
					}
				})
			}
			asking.Wait()
			// 0, 0, 50, 100, 200, 400 and 800 ms are waited before each.
			if n := s.connections.Load(); n > 7 || n < 2 {
				t.Errorf("%d connections in a second, for %d questions", n, asked.Load())
			}
		})
	}
}

// TestCancelled gives up a question, at each point where it may wait.
func TestCancelled(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range append([]string{"udp"}, sessions...) {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			ctx, cancel := context.WithCancel(t.Context())
			var url string
			if scheme == "udp" {
				url = "udp://" + serveUDP(t, "127.0.0.1:0", func(datagram) { cancel() }).String()
			} else {
				url = serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { cancel(); return silence }).url
			}
			u := upstream(t, url, options(scheme, a, time.Minute))
			for _, when := range []string{"while asked", "before"} {
				begun := time.Now()
				if err := askA(ctx, u, "www.example."); !errors.Is(err, context.Canceled) {
					t.Errorf("%s: %v", when, err)
				}
				if took := time.Since(begun); took > 10*time.Second {
					t.Errorf("%s: took %v", when, took)
				}
			}
		})
	}
}

// TestClose closes while questions wait, and asks then.
func TestClose(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range append([]string{"udp"}, sessions...) {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			arrived := make(chan struct{}, 100)
			var url string
			if scheme == "udp" {
				url = "udp://" + serveUDP(t, "127.0.0.1:0", func(datagram) { arrived <- struct{}{} }).String()
			} else {
				url = serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { arrived <- struct{}{}; return silence }).url
			}
			u := upstream(t, url, options(scheme, a, time.Minute))
			const questions = 20
			ended := make(chan error)
			for range questions {
				go func() { ended <- askA(context.Background(), u, "www.example.") }()
			}
			for range questions {
				<-arrived
			}
			if err := u.Close(); err != nil {
				t.Error(err)
			}
			for range questions {
				if err := <-ended; !errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), "\n") {
					t.Errorf("while asked: %v", err)
				}
			}
			if err := askA(t.Context(), u, "www.example."); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after: %v", err)
			}
			if err := u.Close(); err != nil {
				t.Error("the second close:", err)
			}
		})
	}
}

// TestCertificates wants each encrypted scheme to refuse a server that is not the one meant.
func TestCertificates(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	for _, scheme := range sessions[1:] {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell })
			for _, row := range []struct {
				o    Options
				want string // empty: the server is taken
			}{
				{Options{CAFile: a.certificate}, ""},
				{Options{CAFile: a.certificate, ServerName: "dns.example"}, ""},
				{Options{CAFile: a.certificate, ServerName: "evil.example"}, "evil.example"},
				{Options{CAFile: other.certificate}, "unknown authority"},
				{Options{}, "unknown authority"},
			} {
				u := upstream(t, s.url, row.o)
				if row.want == "" {
					wantA(t, u, "www.example.")
				} else {
					wantError(t, u, 2*time.Second, row.want)
				}
			}
		})
	}
}

// TestCloseAtOnce closes at any moment of the first questions.
func TestCloseAtOnce(t *testing.T) {
	a := newAuthority(t)
	for _, scheme := range sessions {
		t.Run(scheme, func(t *testing.T) {
			noLeaks(t)
			s := serve(t, scheme, "127.0.0.1:0", a.pair, func(int, int) act { return tell })
			for i := range 50 {
				u := upstream(t, s.url, options(scheme, a, time.Minute))
				var asking sync.WaitGroup
				for range 3 {
					asking.Go(func() {
						if err := askA(t.Context(), u, "www.example."); err != nil && !errors.Is(err, net.ErrClosed) {
							t.Error(err)
						}
					})
				}
				time.Sleep(time.Duration(i) * 100 * time.Microsecond) // each time at another one
				u.Close()
				asking.Wait()
			}
		})
	}
}
