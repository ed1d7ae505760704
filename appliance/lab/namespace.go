package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace held by a descriptor, and by a name under /run/netns for people who want to look
// into it with `ip netns exec`.
type namespace struct {
	name   string
	handle netns.NsHandle

	mu     sync.RWMutex // held while entering: a closed descriptor's number may already mean something else
	closed bool
}

var errClosed = errors.New("the lab is closed")

func newNamespace(name string) (*namespace, error) {
	ns := &namespace{name: name}
	err := excursion(func() (err error) {
		ns.handle, err = netns.NewNamed(name)
		return err
	})
	if err != nil && !errors.Is(err, os.ErrExist) {
		os.Remove(filepath.Join(namesRoot, name)) // NewNamed leaves the file if it cannot mount on it
	}
	switch {
	case errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("creating network namespace %s: this kernel lacks CONFIG_NET_NS: %w", name, err)
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("creating network namespace %s: needs CAP_SYS_ADMIN: %w", name, err)
	case err != nil:
		return nil, fmt.Errorf("creating network namespace %s: %w", name, err)
	}
	return ns, nil
}

// excursion runs f, which changes the network namespace of its thread, and brings the thread back.
func excursion(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		return fmt.Errorf("opening the current network namespace: %w", err)
	}
	defer home.Close()
	defer func() {
		// Going on in a foreign namespace would do the caller's next work on the wrong network.
		if err := netns.Set(home); err != nil {
			panic(fmt.Sprintf("lab: cannot return to the network namespace of the process: %v", err))
		}
	}()
	return f()
}

// do runs f on a thread inside the namespace.
func (ns *namespace) do(f func() error) error {
	return excursion(func() error {
		if err := ns.enter(); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", ns.name, err)
		}
		return f()
	})
}

func (ns *namespace) enter() error {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	if ns.closed {
		return errClosed
	}
	return netns.Set(ns.handle)
}

// close forgets the namespace; the kernel removes it with its links when nothing else holds it.
func (ns *namespace) close() error {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.closed {
		return nil
	}
	ns.closed = true
	if err := errors.Join(ns.handle.Close(), netns.DeleteNamed(ns.name)); err != nil {
		return fmt.Errorf("removing network namespace %s: %w", ns.name, err)
	}
	return nil
}
