package gateway_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestRefusedStart: what cannot start says why in one line, leaves nothing behind, and does not disturb the
// one that runs.
func TestRefusedStart(t *testing.T) {
	w := newWorld(t)
	config := filepath.Join(t.TempDir(), "config.yaml")
	need(t, os.WriteFile(config, []byte("interfaces: { lan: auto }\nmetrics: { listen: \"127.0.0.1:9653\" }\ndefault: direct\n"), 0o600))
	before := network(t, w.box())
	socket, state := filepath.Join(w.Dir(), "other.sock"), filepath.Join(w.Dir(), "other-state")
	refused := func(t *testing.T, want string, args ...string) {
		t.Helper()
		full := append([]string{"run", "-c", config, "--socket", socket, "--state-dir", state}, args...)
		p, err := w.box().Command(t.Context(), binary, full...).Start()
		need(t, err)
		if err := p.Wait(); err == nil {
			t.Error("it was not refused")
		}
		log := p.Tail(20)
		last := log[strings.LastIndex(log, "\n")+1:]
		if !strings.HasPrefix(last, "sidegate: ") && !strings.HasPrefix(last, config+":") || !strings.Contains(last, want) || strings.Contains(log, "goroutine") {
			t.Errorf("it says %q, want %q", log, want)
		}
		for _, path := range []string{socket, state} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left behind (%v)", path, err)
			}
		}
	}

	t.Run("group", func(t *testing.T) { refused(t, "there is no group", "--socket-group", "no-such-group") })
	t.Run("metrics", func(t *testing.T) {
		l, err := w.box().Listen(t.Context(), "tcp", "127.0.0.1:9653")
		need(t, err)
		defer l.Close()
		refused(t, "config.yaml:2: metrics: listening on 127.0.0.1:9653: ")
	})
	t.Run("socket is a file", func(t *testing.T) {
		refused(t, "not a socket", "--socket", config)
	})
	if after := network(t, w.box()); after != before {
		t.Errorf("refused starts changed the network:\n%s\nis\n%s", before, after)
	}

	w.start(t, everythingDirect)
	running := network(t, w.box())
	t.Run("second in the namespace", func(t *testing.T) { refused(t, "another sidegate runs in this network namespace") })
	t.Run("second on the socket", func(t *testing.T) {
		refused(t, "another sidegate answers there", "--socket", w.Socket)
	})
	if s := w.status(t); !s.LastReload.OK || len(s.Problems) != 0 || network(t, w.box()) != running {
		t.Errorf("the one that runs was disturbed: %+v", s)
	}
}

// TestCrashedSocketIsReplaced: the socket that a killed daemon left is not in the way of the next.
func TestCrashedSocketIsReplaced(t *testing.T) {
	w := newWorld(t)
	w.start(t, everythingDirect)
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("unix", w.Socket); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			c.Close()
		}
		t.Fatalf("the killed gateway's socket: %v; this test proves nothing", err)
	}
	w.start(t, everythingDirect)
	w.status(t)
	w.stop(t)
}
