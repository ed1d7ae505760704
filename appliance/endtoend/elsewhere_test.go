package endtoend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// shellBox is a box that looks after itself, whose init starts the daemon: all that it is asked for it is asked for in its shell.
type shellBox struct {
	run    func(ctx context.Context, script string) (string, error)
	config string // path of the configuration on the box
}

func (b shellBox) try(t *testing.T, script string) (string, error) {
	t.Helper()
	return b.run(t.Context(), script)
}

func (b shellBox) configure(t *testing.T, config string) error {
	t.Helper()
	_, err := b.try(t, b.writes(config)+"sidegate reload")
	return err
}

// writes is the script that puts a configuration there, which is not loaded by that.
func (b shellBox) writes(config string) string {
	return "cat >" + b.config + " <<'END'\n" + strings.TrimSuffix(config, "\n") + "\nEND\n"
}

func (b shellBox) crash(t *testing.T) {
	t.Helper()
	_, err := b.try(t, "kill -9 $(pidof sidegate)")
	need(t, err)
}

func (shellBox) revive(*testing.T) {} // its init does

// serves waits until the gateway does.
func (b shellBox) serves(t *testing.T) {
	t.Helper()
	need(t, lab.Wait(within(t, 5*time.Minute), "the gateway to serve", func() error {
		_, err := b.try(t, "sidegate status >/dev/null && sleep 1") // the pause is an emulated machine's, which is slow
		return err
	}))
}

// elsewhere is a box that stands outside of the lab: see the documentation of the package.
type elsewhere struct {
	shellBox
	first string // the configuration that it begins with
}

func (b elsewhere) restart(t *testing.T) {
	t.Helper()
	_, err := b.try(t, b.writes(b.first))
	need(t, err)
	const boot = "cat /proc/sys/kernel/random/boot_id"
	before, err := b.try(t, boot)
	need(t, err)
	_, err = b.try(t, "(sleep 1; reboot) >/dev/null 2>&1 &")
	need(t, err)
	need(t, lab.Wait(within(t, 5*time.Minute), "the box to have started again", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		now, err := b.run(ctx, boot)
		if err == nil && now == before {
			err = errors.New("it has not stopped yet")
		}
		return err
	}))
	b.serves(t)
}

// TestElsewhere plays with a box that stands outside of the lab, as a virtual machine of somebody else's may.
func TestElsewhere(t *testing.T) {
	device, shell, config := os.Getenv("SIDEGATE_BOX_INTERFACE"), os.Getenv("SIDEGATE_BOX_SHELL"), os.Getenv("SIDEGATE_BOX_CONFIG")
	if device == "" && shell == "" && config == "" {
		t.Skip("needs a box: SIDEGATE_BOX_INTERFACE, SIDEGATE_BOX_SHELL and SIDEGATE_BOX_CONFIG, which vmtests/nixos sets")
	}
	if device == "" || shell == "" || config == "" {
		t.Fatalf("SIDEGATE_BOX_INTERFACE is %q, SIDEGATE_BOX_SHELL %q and SIDEGATE_BOX_CONFIG %q: set all three", device, shell, config)
	}
	s := newStage(t)
	need(t, s.sidegate().GiveWay(t.Context(), device))
	b := elsewhere{shellBox{remote(shell), config}, s.first()}
	s.sideRouter = b
	b.serves(t)
	need(t, b.configure(t, s.first()))
	s.playsAll(t, true)
}

// remote has a command run scripts, each of which it reads from its standard input.
func remote(command string) func(context.Context, string) (string, error) {
	return func(ctx context.Context, script string) (string, error) {
		words := strings.Fields(command)
		c := exec.CommandContext(ctx, words[0], words[1:]...)
		// Read to its end before it runs, for what it runs may read too.
		c.Stdin = strings.NewReader("{\nexec 2>&1 </dev/null\n" + script + "\nexit\n}\n")
		var out, errs bytes.Buffer
		c.Stdout, c.Stderr, c.WaitDelay = &out, &errs, time.Second
		if err := c.Run(); err != nil {
			return out.String(), fmt.Errorf("running %q: %w:\n%s%s", script, err, out.String(), errs.String())
		}
		return out.String(), nil
	}
}
