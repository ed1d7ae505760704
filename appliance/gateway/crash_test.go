package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// TestCrash kills the daemon under load: direct traffic loses nothing, what is to be proxied is dropped and
// counted and never seen by the router, and a restart proxies again, with nothing there twice.
func TestCrash(t *testing.T) {
	w := newWorld(t)
	hk := w.dante(t)
	abroad, err := w.AddServer(t.Context(), "abroad")
	need(t, err)
	files, err := abroad.StartFiles(t.Context(), 80)
	need(t, err)
	sink, err := w.server().StartSink(t.Context(), 9)
	need(t, err)
	bulk, err := w.server().StartBulk(t.Context(), 5001)
	need(t, err)
	config := hk + "interfaces: { lan: auto }\nrules: [ { name: abroad, ip_cidr: " + abroad.Addr4().String() + ", outbound: hk } ]\ndefault: direct\n"
	w.start(t, config)
	if who, err := w.ask(t.Context(), files); err != nil || who != w.Host(lab.Upstream).Addr4().String() {
		t.Fatalf("proxying does not work: the server saw %s, %v", who, err)
	}
	atRouter, err := w.router().CaptureOn("lan")
	need(t, err)
	links := w.pinnedLinks(t)
	rules := network(t, w.box())

	// Traffic of both kinds, through the crash and the restart.
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	sent := make(chan int, 1)
	go func() {
		n, err := w.laptop().Flood(ctx, lab.Flood{To: []netip.AddrPort{sink.Addr4()}, Rate: 5000})
		if err != nil {
			t.Error(err)
		}
		sent <- n
	}()
	download := make(chan error, 1)
	c, err := w.laptop().Dial(ctx, "tcp", bulk.Addr4().String())
	need(t, err)
	defer c.Close()
	go func() {
		n, err := lab.Download(ctx, c.(*net.TCPConn))
		if err == nil && n == 0 {
			err = errors.New("nothing arrived")
		}
		download <- err
	}()
	await(t, "the flood to arrive", func() error {
		if n, _ := sink.Received(); n < 500 {
			return fmt.Errorf("%d packets", n)
		}
		return nil
	})

	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		brief, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if who, err := w.ask(brief, files); err == nil {
			t.Errorf("without a daemon, the server was reached by %s", who)
		}
		cancel()
	}
	if got := network(t, w.box()); got != rules {
		t.Errorf("the rules and routes went with the daemon: were\n%s\nare\n%s", rules, got)
	}

	w.start(t, config)
	began := time.Now()
	awaitWithin(t, 2*time.Second, "proxying after the restart", func() error {
		_, err := w.ask(t.Context(), files)
		return err
	})
	t.Logf("ready %s after the restart, proxying %s later", w.Took, time.Since(began))
	if n := w.status(t).Drops["no_listener"]; n < 3 {
		t.Errorf("%d drops were counted for the missing listener, want 3 at least", n)
	}
	if got := w.pinnedLinks(t); got != links {
		t.Errorf("links were %s, are %s", links, got)
	}
	if got := network(t, w.box()); got != rules {
		t.Errorf("rules and routes were\n%s\nare\n%s", rules, got)
	}

	stop()
	n := <-sent
	if err := <-download; err != nil {
		t.Errorf("the download that was going on: %v", err)
	}
	await(t, "every direct packet to arrive", func() error {
		if got, _ := sink.Received(); got != uint64(n) {
			return fmt.Errorf("%d of %d did", got, n)
		}
		return nil
	})
	leaked, err := atRouter.Count(lab.Between(w.laptop().Addr4(), abroad.Addr4()))
	need(t, err)
	if leaked.Packets != 0 {
		t.Errorf("the router saw %d packets between the laptop and the proxied server", leaked.Packets)
	}
	if all, err := atRouter.Count(lab.To(abroad.Addr4())); err == nil && all.Packets != 0 {
		t.Errorf("the router saw %d packets to the proxied server: dante is not on its way", all.Packets)
	}
}

// pinnedLinks are the names of the links that the datapath has pinned.
func (w *world) pinnedLinks(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.State, "links"))
	need(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}
