package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

// newLab builds a lab that ends with the test.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the lab creates network namespaces")
	}
	l, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// brief bounds a test's waits.
func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestForwarding(t *testing.T) {
	l := newLab(t, Options{})
	t.Logf("\n%s", l.Describe())
	out, err := l.Host(Laptop).Exec(brief(t), "ping", "-c1", "-W1", l.Host(Server).Addr4().String())
	t.Log(out, err)
	out, err = l.Host(Laptop).Exec(brief(t), "ip", "a")
	t.Log(out, err)
	out, err = l.Host("switch").Exec(brief(t), "bridge", "link")
	t.Log(out, err)
}
