package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// SystemOptions say what a System is made of, beside the machine's own /usr.
type SystemOptions struct {
	Cgroup  string // an empty directory of a cgroup v2, which becomes the system's root; the caller removes it
	Users   map[string]int
	Files   []SystemFile
	Enabled map[string][]string // units by the target that wants them
}

// SystemFile is a file of a System: a text, or one of this machine.
type SystemFile struct {
	Path       string
	Text, From string
	Mode       os.FileMode // of a text; 0: 0644
}

// System is systemd, of the machine's own /usr, as the first process of namespaces of its own, with a network that takes the place of
// a host's. It has an own root directory, which lasts, and an own /run, as every start finds them. Of the kernel's
// parameters it can change those of its network only.
type System struct {
	*Process
	life    context.Context // ends all of them
	options SystemOptions
	place   *Host // the host that it stands in the place of
	inner   *Host // its network
	root    string
	starts  int
	first   int // number of its first process
}

// What a system in a namespace must not touch, for it is the machine's, or needs a bus that is not here.
var masked = []string{
	"systemd-journald-audit.socket", "systemd-udevd.service", "systemd-modules-load.service", "kmod-static-nodes.service",
	"systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "systemd-random-seed.service", "systemd-repart.service",
	"systemd-firstboot.service", "systemd-sysusers.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
	"systemd-logind.service", "getty.target", "dbus.service", "dbus.socket", "systemd-timesyncd.service", "systemd-resolved.service",
	"dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
	"sys-fs-fuse-connections.mount", "e2scrub_reap.service", "apt-daily.timer", "apt-daily-upgrade.timer",
}

const systemd = "/usr/lib/systemd/systemd"

// StartSystem starts it; see Booted. It ends with ctx.
func (h *Host) StartSystem(ctx context.Context, o SystemOptions) (*System, error) {
	if _, err := os.Stat(systemd); err != nil {
		return nil, MissingError{systemd, "systemd"}
	}
	if at, err := filepath.EvalSymlinks("/lib"); err != nil || at != "/usr/lib" {
		return nil, MissingError{"/lib in /usr", "usrmerge"} // /usr is all that it has of this machine
	}
	s := &System{life: ctx, options: o, place: h, root: h.lab.file(h.name, ".root")}
	if err := s.build(); err != nil {
		return nil, fmt.Errorf("making the root directory of a system: %w", err)
	}
	return s, s.Start()
}

func (s *System) build() error {
	for _, dir := range []string{"usr", "proc", "sys", "dev", "run", "tmp", "root", "home/somebody", "boot", "etc/systemd/system", "var/lib", "var/log"} {
		if err := os.MkdirAll(filepath.Join(s.root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		to, err := os.Readlink("/" + name)
		if err != nil {
			continue // there is no such directory on every machine
		}
		if err := os.Symlink(to, filepath.Join(s.root, name)); err != nil {
			return err
		}
	}
	users, groups := "root:x:0:0::/root:/bin/sh\n", "root:x:0:\n"
	add := func(name string, number int) {
		users += fmt.Sprintf("%s:x:%d:%d::/:/usr/sbin/nologin\n", name, number, number)
		groups += fmt.Sprintf("%s:x:%d:\n", name, number)
	}
	add("nobody", Nobody)
	for i, name := range []string{"adm", "utmp", "systemd-journal"} { // which the files of systemd belong to
		groups += fmt.Sprintf("%s:x:%d:\n", name, 40+i)
	}
	add("systemd-network", 998)
	for name, number := range s.options.Users {
		add(name, number)
	}
	files := []SystemFile{
		{Path: "/etc/passwd", Text: users},
		{Path: "/etc/group", Text: groups},
		{Path: "/etc/nsswitch.conf", Text: "passwd: files\ngroup: files\nhosts: files dns\n"},
		{Path: "/etc/hosts", Text: "127.0.0.1 localhost\n"},
		{Path: "/etc/machine-id", Text: strings.Repeat("5", 32) + "\n"},
		{Path: "/etc/os-release", From: "/usr/lib/os-release"},
		{Path: "/etc/ld.so.cache", From: "/etc/ld.so.cache"},
	}
	for _, f := range append(files, s.options.Files...) {
		if err := s.file(f); err != nil {
			return err
		}
	}
	units := filepath.Join(s.root, "etc/systemd/system")
	for _, unit := range masked {
		if err := os.Symlink("/dev/null", filepath.Join(units, unit)); err != nil {
			return err
		}
	}
	for target, wanted := range s.options.Enabled {
		dir := filepath.Join(units, target+".wants")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for _, unit := range wanted {
			from := "/usr/lib/systemd/system/" + unit
			if _, err := os.Stat(filepath.Join(units, unit)); err == nil {
				from = "../" + unit
			}
			if err := os.Symlink(from, filepath.Join(dir, unit)); err != nil {
				return err
			}
		}
	}
	return nil
}

// seeds is where the files of /run are until it is mounted.
const seeds = ".run"

func (s *System) file(f SystemFile) error {
	path := filepath.Join(s.root, f.Path)
	if below, ok := strings.CutPrefix(f.Path, "/run/"); ok {
		path = filepath.Join(s.root, seeds, below)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if f.Mode == 0 {
		f.Mode = 0o644
	}
	if err := os.WriteFile(path, []byte(f.Text), f.Mode); err != nil {
		return err
	}
	return os.Chmod(path, f.Mode)
}

// enterSystem is what makes the namespaces a system's. Its arguments are the root directory, and pairs of files to be seen there.
const enterSystem = `set -e
cd "$1"; root=$PWD; shift
mount --make-rprivate /
mount --bind . .; cd "$root"
mount --bind /usr usr; mount -o remount,bind,ro usr
while [ $# -gt 0 ]; do mount --bind "$1" "./$2"; shift 2; done
mount -t proc proc proc
mount --bind proc/sys proc/sys; mount --bind proc/sys/net proc/sys/net; mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sys sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t bpf -o mode=0755 bpf sys/fs/bpf
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=0755 run run; [ ! -d .run ] || cp -a .run/. run
mount -t tmpfs -o mode=0755 dev dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/net; mknod dev/net/tun c 10 200 # a device, as every machine has some
mkdir dev/pts dev/shm; mount -t devpts -o newinstance,ptmxmode=0666 pts dev/pts; ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 shm dev/shm
echo 0 >proc/sys/net/ipv4/ip_forward # as where it is switched on, whatever this machine's are
for of in all default eth0; do echo 1 >proc/sys/net/ipv4/conf/$of/send_redirects; done
hostname sidegate
pivot_root . .
umount -l .
cd /
mount --make-rshared / # as on a machine, where systemd does that itself: credentials come to a unit so
exec env -i container=lab PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=no`

// Start starts it again after its end.
func (s *System) Start() (err error) {
	ctx := s.life
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting systemd in the place of %s: %w", s.place.name, err)
		}
	}()
	// A new network each time, as a machine that is switched on has.
	s.starts++
	if s.inner, err = s.place.lab.newHost(fmt.Sprintf("system%d", s.starts)); err != nil {
		return err
	}
	err = s.place.giveWay(ctx, fmt.Sprintf("ip link del machine 2>/dev/null || true; ip link add machine type veth peer name eth0 address %s netns %s",
		s.place.MAC(), s.inner.Namespace()))
	if err != nil {
		return err
	}
	args := []string{"--mount", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "--kill-child", "sh", "-c", enterSystem, "sh", s.root}
	for _, f := range append([]SystemFile{{Path: "/etc/os-release", From: "/usr/lib/os-release"}, {Path: "/etc/ld.so.cache", From: "/etc/ld.so.cache"}}, s.options.Files...) {
		if f.From != "" {
			args = append(args, f.From, f.Path)
		}
	}
	command := s.inner.Command(ctx, "unshare", args...)
	command.Cgroup = s.options.Cgroup
	if s.Process, err = command.Start(); err != nil {
		return err
	}
	err = Wait(ctx, "the first process of the namespace", func() error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", s.Pid()))
		if err == nil {
			_, err = fmt.Sscan(string(text), &s.first)
		}
		return err
	})
	if err != nil {
		return err
	}
	// Its parent must not stay in what is the system's root: there systemd wants groups only.
	return os.WriteFile(filepath.Join(filepath.Dir(s.options.Cgroup), "cgroup.procs"), fmt.Append(nil, s.Pid()), 0)
}

// Network is the host that the system is, until it starts again.
func (s *System) Network() *Host { return s.inner }

// Cgroup is its root of cgroup v2.
func (s *System) Cgroup() string { return s.options.Cgroup }

// Booted waits until all of its units are started, and returns an error if one has failed.
func (s *System) Booted(ctx context.Context) error {
	ctx, end := s.whileAlive(ctx, func() error { return fmt.Errorf("systemd has ended: %w", s.Wait()) })
	defer end()
	return Wait(ctx, "systemd to start all", func() error {
		out, err := s.Run(ctx, "systemctl is-system-running || systemctl --failed --no-legend --plain")
		if state, failed, _ := strings.Cut(out, "\n"); err == nil && state != "running" {
			err = fmt.Errorf("it is %s: %s", state, failed)
		}
		return err
	})
}

// Run has a shell of the system, which is a program of none of its units, run a script, and returns what it wrote. That it fails is an error.
func (s *System) Run(ctx context.Context, script string) (string, error) {
	group := filepath.Join(s.options.Cgroup, "shell")
	if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	c := s.place.Command(ctx, "nsenter", "-t", fmt.Sprint(s.first), "-a", "sh", "-ec", "exec 2>&1\n"+script)
	var out bytes.Buffer
	c.Cgroup, c.Stdout = group, &out
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("running %q: %w\n%s", script, err, out.String())
	}
	return out.String(), nil
}

// Reboot has it shut down, and starts it again.
func (s *System) Reboot(ctx context.Context) error {
	if _, err := s.Run(ctx, "systemctl --no-block reboot"); err != nil {
		return err
	}
	select {
	case <-s.Done():
	case <-ctx.Done():
		return fmt.Errorf("waiting for systemd to shut down: %w", context.Cause(ctx))
	}
	return s.Start()
}

// Kill ends all of its processes at once.
func (s *System) Kill() error {
	if err := unix.Kill(s.first, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return s.Process.Kill()
}
