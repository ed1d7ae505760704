package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// links are the places where packets meet the programs: tcx ingress of each LAN interface, the namespace's
// socket lookup, and what the box itself sends by IPv6. Each is pinned under its name, so that it outlives the
// daemon.
type links struct {
	dir      string
	programs programs
	// An unreferenced link.Link is closed by the garbage collector; the pin would survive, our handle not.
	open   map[string]link.Link
	wanted map[string]bool // pins of what there is to be
}

const (
	lookupLink    = "proxy-lookup"
	redirectsLink = "no-redirects"
)

// LANLink is the name of the link on an interface, and of its pin. The BPF file system refuses dots, which VLANs have in their
// names; no interface has a colon.
func LANLink(device string) string { return "lan-" + strings.ReplaceAll(device, ".", ":") }

func newLinks(s *state) *links {
	return &links{dir: filepath.Join(s.dir, "links"), programs: programs{s}, open: map[string]link.Link{}, wanted: map[string]bool{}}
}

// place is one link as it should be.
type place struct {
	pin     string
	program func(*generation) *ebpf.Program
	attach  func(*ebpf.Program) (link.Link, error)
	ifindex uint32          // of a tcx link; 0 otherwise
	cgroup  uint64          // of a cgroup's link: the directory's inode; 0 otherwise
	kind    ebpf.AttachType // of a cgroup's link
	// The program is the same in all generations, and its kind of link knows no replacement; nor does it tell whether it is attached, but
	// the kernel lets no second one into its place.
	fixed bool
}

func places(interfaces []Interface) []place {
	all := []place{{
		pin:     lookupLink,
		program: func(g *generation) *ebpf.Program { return g.objects.ProxyLookup },
		attach:  attachLookup,
	}}
	if haveIPv6() {
		all = append(all, place{
			pin:     redirectsLink,
			program: func(g *generation) *ebpf.Program { return g.objects.NoRedirects },
			attach:  attachOutput,
			fixed:   true,
		})
	}
	for _, i := range interfaces {
		all = append(all, place{
			pin: LANLink(i.Name),
			program: func(g *generation) *ebpf.Program {
				if i.Ethernet {
					return g.objects.LanEthernet
				}
				return g.objects.LanIp
			},
			attach: func(p *ebpf.Program) (link.Link, error) {
				return link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: p, Attach: ebpf.AttachTCXIngress})
			},
			ifindex: uint32(i.Index),
		})
	}
	return all
}

func attachOutput(p *ebpf.Program) (link.Link, error) {
	return link.AttachNetfilter(link.NetfilterOptions{
		Program:        p,
		ProtocolFamily: link.NetfilterProtoIPv6,
		Hook:           link.NetfilterInetLocalOut,
		Priority:       1, // 0 is taken where a filter table is
	})
}

func attachLookup(p *ebpf.Program) (link.Link, error) {
	// The calling thread's namespace, which is not always the process's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	l, err := link.AttachNetNs(int(ns.Fd()), p)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// apply attaches next everywhere, and says which places had no link or pin. If one place fails, those already
// switched go back to what they ran before.
func (l *links) apply(next *generation, unchanged bool, all []place) (added []string, err error) {
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of links: %w", err)
	}
	var done []change
	defer func() {
		for _, c := range done {
			c.before.Close() // let go, or the generation that was replaced would stay
		}
	}()
	for _, p := range all {
		c, err := l.put(p, next, unchanged)
		if err != nil {
			err = fmt.Errorf("attaching %s: %w", p.pin, err)
			for _, c := range done {
				err = errors.Join(err, l.undo(c))
			}
			return nil, errors.Join(err, l.forget())
		}
		if c.fresh {
			added = append(added, "the link "+p.pin)
		}
		if c.kept {
			added = append(added, "the pin of the program of "+p.pin)
		}
		done = append(done, c)
	}
	return added, nil
}

// want says what there is to be, and nothing else.
func (l *links) want(all []place) {
	clear(l.wanted)
	for _, p := range all {
		l.wanted[p.pin] = true
	}
}

// change is what put did to a place.
type change struct {
	pin      string
	link     link.Link
	replaced bool          // the link ran another program
	before   *ebpf.Program // which one; nil: it is not pinned, since somebody else put it there, or a predecessor that pinned none
	made     bool          // the link is new
	fresh    bool          // something was missing: the link, its pin, or our program in it
	kept     bool          // the program was not pinned
}

// pinned reports whether there is a pin of a name that begins so, of ours or of a predecessor.
func (l *links) pinned(prefix string) bool {
	found, _ := filepath.Glob(filepath.Join(l.dir, prefix+"*")) // the pattern is sound
	return len(found) > 0
}

// put makes one place run the generation's program: by atomic replacement where a link is there, by a new
// link otherwise, or where the interface of that name is another one now.
func (l *links) put(p place, g *generation, unchanged bool) (change, error) {
	existing, repinned := l.find(p)
	if existing != nil && !p.fixed {
		return l.replace(existing, p.program(g), change{pin: p.pin, link: existing, fresh: repinned}, unchanged)
	}
	if !p.fixed {
		if _, err := l.programs.keep(p.program(g)); err != nil {
			return change{}, err
		}
	}
	attached, err := p.attach(p.program(g))
	if existing != nil && errors.Is(err, unix.EBUSY) {
		return change{pin: p.pin, link: existing, fresh: repinned}, nil
	}
	if err != nil {
		return change{}, err
	}
	if existing != nil { // somebody has detached it
		l.drop(p.pin, existing)
	}
	if err := attached.Pin(filepath.Join(l.dir, p.pin)); err != nil {
		attached.Close()
		return change{}, err
	}
	l.open[p.pin] = attached
	return change{pin: p.pin, link: attached, made: true, fresh: true}, nil
}

// replace makes a link run next. The pin comes first: whoever dies in between leaves no link whose program a successor cannot open.
func (l *links) replace(existing link.Link, next *ebpf.Program, c change, unchanged bool) (_ change, err error) {
	if c.kept, err = l.programs.keep(next); err != nil {
		return c, err
	}
	running, err := existing.Info()
	if err != nil {
		return c, err
	}
	id, err := programID(next)
	if err != nil || running.Program == id {
		return c, err
	}
	if c.before, err = l.programs.open(running.Program); err != nil {
		return c, err
	}
	if err := existing.Update(next); err != nil {
		c.before.Close()
		return c, err
	}
	// Unchanged, and yet it ran another program: somebody replaced it.
	c.replaced, c.fresh = true, c.fresh || unchanged
	return c, nil
}

// undo takes a place to what it was.
func (l *links) undo(c change) error {
	switch {
	case c.made:
		l.drop(c.pin, c.link)
	case c.before != nil:
		return c.link.Update(c.before)
	case c.replaced:
		return fmt.Errorf("%s keeps the new policy: what it ran before is pinned nowhere, as an older sidegate leaves it", c.pin)
	}
	return nil
}

// forget removes the pins of programs that no link runs, be it open here or only pinned yet.
func (l *links) forget() error {
	running := map[ebpf.ProgramID]bool{}
	for _, open := range l.open {
		info, err := open.Info()
		if err != nil {
			return err
		}
		running[info.Program] = true
	}
	pins, err := os.ReadDir(l.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading the pinned links: %w", err)
	}
	for _, pin := range pins {
		if l.open[pin.Name()] != nil {
			continue
		}
		if id, err := pinnedProgram(filepath.Join(l.dir, pin.Name())); err == nil { // else it is no link
			running[id] = true
		}
	}
	return l.programs.removeExcept(running)
}

func pinnedProgram(path string) (ebpf.ProgramID, error) {
	pinned, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return 0, err
	}
	defer pinned.Close()
	info, err := pinned.Info()
	if err != nil {
		return 0, err
	}
	return info.Program, nil
}

// find returns the place's link if it is pinned and still attached where it should be; if not it removes
// what is left of it.
func (l *links) find(p place) (existing link.Link, repinned bool) {
	existing = l.open[p.pin]
	path := filepath.Join(l.dir, p.pin)
	if existing == nil {
		if loaded, err := link.LoadPinnedLink(path, nil); err == nil {
			existing = loaded
		}
	} else if _, err := os.Stat(path); err != nil {
		// Somebody removed the pin: a crash would detach it. The program itself is still in place, and stays
		// so: a link closed and made anew would let packets by in between.
		if repinned = errors.Join(existing.Unpin(), existing.Pin(path)) == nil; !repinned {
			existing.Close()
			existing = nil
		}
	}
	if existing == nil {
		delete(l.open, p.pin)
		os.Remove(path)
		return nil, false
	}
	if !attachedTo(existing, p) {
		l.drop(p.pin, existing)
		return nil, false
	}
	l.open[p.pin] = existing
	return existing, repinned
}

func attachedTo(l link.Link, p place) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex == p.ifindex
	}
	if cgroup := info.Cgroup(); cgroup != nil {
		return cgroup.CgroupId == p.cgroup
	}
	if info.Netfilter() != nil {
		return true // its kind does not tell the namespace; the state directory belongs to one. Put tells whether it is
	}
	ns := info.NetNs()
	return ns != nil && ns.NetnsInode != 0 && ns.NetnsInode == threadNamespace()
}

func threadNamespace() uint32 {
	var st unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &st) != nil {
		return 0
	}
	return uint32(st.Ino)
}

// drop detaches explicitly: what goes with its last pin goes some milliseconds later, from a work queue, and
// whoever was told that all is gone would still meet the program.
func (l *links) drop(pin string, existing link.Link) {
	delete(l.open, pin)
	existing.Detach() // an error means that its interface is gone, and it with it
	os.Remove(filepath.Join(l.dir, pin))
	existing.Close()
}

// removeOther detaches what is not wanted, and lets go of what no link runs any more.
func (l *links) removeOther() error { return errors.Join(l.removeExcept(l.wanted), l.forget()) }

// removeExcept detaches what a predecessor or an earlier configuration attached and nobody wants now.
func (l *links) removeExcept(wanted map[string]bool) error {
	pins, err := os.ReadDir(l.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the pinned links: %w", err)
	}
	for _, pin := range pins {
		if wanted[pin.Name()] {
			continue
		}
		path := filepath.Join(l.dir, pin.Name())
		existing := l.open[pin.Name()]
		if existing == nil {
			if existing, err = link.LoadPinnedLink(path, nil); err != nil {
				existing = nil
			}
		}
		if existing != nil {
			l.drop(pin.Name(), existing)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("detaching %s: %w", pin.Name(), err)
		}
	}
	return nil
}

// Close lets go of the handles and leaves the pins.
func (l *links) Close() error {
	var errs error
	for pin, open := range l.open {
		errs = errors.Join(errs, open.Close())
		delete(l.open, pin)
	}
	return errs
}

func (l *links) remove() error {
	err := errors.Join(l.removeExcept(nil), l.Close())
	if rm := os.Remove(l.dir); rm != nil && !errors.Is(rm, syscall.ENOENT) {
		err = errors.Join(err, rm)
	}
	return err
}
