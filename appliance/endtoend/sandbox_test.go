package endtoend

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The sandbox of the unit is tried by a program in a unit of the same text, and by the same program outside of it.

func init() {
	modes["probe"] = func(_ *json.Decoder, out *json.Encoder) error { return out.Encode(runProbe()) }
}

// forbidden is what the gateway must not do, each in a way that does no harm where it is permitted, and that root is not refused.
var forbidden = []struct {
	name string
	try  func() error
}{
	{"write to /etc", func() error { return os.WriteFile("/etc/probe", nil, 0o644) }},
	{"write to /var/lib", func() error { return os.WriteFile("/var/lib/probe", nil, 0o644) }},
	{"look into /home", func() error { _, err := os.ReadDir("/home/somebody"); return err }},
	{"read the file of the secret", func() error { _, err := os.ReadFile("/run/keys/hk"); return err }},
	{"change a kernel parameter", func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_default_ttl", []byte("64\n"), 0) }},
	{"change the cgroups", func() error { return os.Mkdir("/sys/fs/cgroup/probe", 0o755) }},
	{"pin beside its own", func() error { return os.Mkdir("/sys/fs/bpf/probe", 0o755) }},
	{"see other processes", func() error { _, err := os.Stat("/proc/1/status"); return err }},
	{"signal the first process", func() error { return unix.Kill(1, 0) }},
	{"trace a process", func() error { return unix.PtraceAttach(1 << 29) }},
	{"load a module", func() error { return unix.InitModule(nil, "") }},
	{"mount", func() error { return unix.Mount("none", "/tmp", "no-such-file-system", 0, "") }},
	{"have a namespace of its own", func() error { return unix.Unshare(unix.CLONE_NEWUSER) }}, // which a process of one thread may, root or not
	{"run what it has written", func() error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
		return err
	}},
	{"set the clock", func() error { return unix.ClockSettime(unix.CLOCK_REALTIME, &unix.Timespec{Nsec: -1}) }},
	{"become root", func() error { return unix.Setresuid(0, 0, 0) }},
	{"give a program its owner's rights", func() error { return chmodOwn(0o4755) }},
	{"see a device", func() error { _, err := os.Stat("/dev/net/tun"); return err }},
	{"make a device", func() error { return unix.Mknod("/tmp/device", unix.S_IFBLK|0o600, 0) }},
	{"have the processor first", func() error {
		return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	}},
	{"name the box", func() error { return unix.Sethostname([]byte("sidegate")) }},
	{"read the kernel's log", func() error { _, err := unix.Klogctl(10, nil); return err }},
	{"be another system", func() error { return errno(unix.SYS_PERSONALITY, 0x0008, 0, 0) }},
	{"restart the box", func() error { return errno(unix.SYS_REBOOT, 0, 0, 0) }},
	{"look at all processors' events", func() error { return errno(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0) }},
	{"open a socket of a strange kind", func() error {
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}},
}

// permitted is what a gateway could not do without; that it is not refused shows that the probe is not refused everything.
var permitted = []struct {
	name string
	try  func() error
}{
	{"write its state, for nobody else", func() error {
		path := os.Getenv("STATE_DIRECTORY") + "/probe"
		if err := os.WriteFile(path, nil, 0o666); err != nil {
			return err
		}
		i, err := os.Stat(path)
		if err == nil && i.Mode().Perm() != 0o600 {
			err = fmt.Errorf("others may read it: %s", i.Mode())
		}
		return err
	}},
	{"read its secret", func() error { _, err := os.ReadFile(os.Getenv("CREDENTIALS_DIRECTORY") + "/hk"); return err }},
	{"read its settings", func() error { _, err := os.ReadDir("/etc/sidegate"); return err }},
	{"pin", func() error { return os.Mkdir("/run/probe/bpf/probe", 0o700) }},
}

func errno(number, a, b, c uintptr) error {
	if _, _, e := unix.Syscall(number, a, b, c); e != 0 {
		return e
	}
	return nil
}

func chmodOwn(mode uint32) error {
	f, err := os.CreateTemp("", "probe")
	if err != nil {
		return nil // which fails the test, as it is to
	}
	defer os.Remove(f.Name())
	defer f.Close()
	return unix.Fchmod(int(f.Fd()), mode)
}

// runProbe tries all, and says what became of each.
func runProbe() map[string]string {
	runtime.LockOSThread() // some of it changes the thread
	results := make(map[string]string)
	for _, list := range [][]struct {
		name string
		try  func() error
	}{permitted, forbidden} {
		for _, c := range list {
			results[c.name] = "done"
			if err := c.try(); err != nil {
				results[c.name] = err.Error()
				if refused(err) {
					results[c.name] = "refused: " + err.Error()
				}
			}
		}
	}
	return results
}

// refused says whether somebody forbids it; that there is no such process in a /proc that hides others is the same.
func refused(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EAFNOSUPPORT)
}

// isConfined: what the unit forbids is refused, and the same is not refused to root outside of the unit.
func (b *unitBox) isConfined(t *testing.T) {
	const run = modeVariable + "=probe " + store + "/bin/probe"
	parse := func(text string) (results map[string]string) {
		t.Helper()
		if err := json.Unmarshal([]byte(text), &results); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return results
	}
	// The same unit, with another program that ends by itself and has own directories.
	unit := b.sh(t, "cat /etc/systemd/system/sidegate.service")
	unit = regexp.MustCompile(`(?m)^(Exec|Restart|Type|Watchdog|RuntimeDirectory=).*\n`).ReplaceAllString(unit, "")
	unit = strings.NewReplacer(
		"[Service]\n", "[Service]\nType=oneshot\nRuntimeDirectory=probe\nEnvironment="+modeVariable+"=probe\nExecStart="+store+"/bin/probe\nStandardOutput=file:/run/probed\n",
		":/run/sidegate/bpf", ":/run/probe/bpf",
	).Replace(unit)
	b.sh(t, "cat >/run/systemd/system/probe.service <<'END'\n%s\nEND\nsystemctl daemon-reload; systemctl start probe", unit)
	inside, outside := parse(b.sh(t, "cat /run/probed; rmdir /sys/fs/bpf/sidegate/probe")), parse(b.sh(t, run))
	for _, c := range permitted {
		if inside[c.name] != "done" {
			t.Errorf("in the unit, to %s: %s", c.name, inside[c.name])
		}
	}
	for _, c := range forbidden {
		in, out := inside[c.name], outside[c.name]
		if !strings.HasPrefix(in, "refused") {
			t.Errorf("in the unit, to %s: %s", c.name, in)
		}
		if strings.HasPrefix(out, "refused") && out != "refused: "+unix.EAFNOSUPPORT.Error() { // the kernel may lack it
			t.Errorf("outside of the unit, to %s: %s; so this proves nothing", c.name, out)
		}
		t.Logf("to %s: %s (outside: %s)", c.name, in, out)
	}
	// The daemon itself sees what the probe sees.
	if out, err := b.try(t, "nsenter -t "+b.process(t)+" -m sh -c 'touch /etc/probe || touch /var/lib/probe'"); err == nil || !strings.Contains(out, "Read-only") {
		t.Errorf("where the daemon is, root can write: %v\n%s", err, out)
	}

	analysis := b.sh(t, "systemd-analyze security --no-pager sidegate.service")
	found := regexp.MustCompile(`Overall exposure level for sidegate.service: ([0-9.]+)`).FindStringSubmatch(analysis)
	if found == nil {
		t.Fatalf("systemd-analyze says no level:\n%s", analysis)
	}
	exposure, err := strconv.ParseFloat(found[1], 64)
	need(t, err)
	t.Logf("systemd-analyze: %s", found[0])
	if exposure > mostExposed {
		t.Errorf("that is more than %v:\n%s", mostExposed, analysis)
	}
}

// mostExposed is what systemd-analyze may say of the unit, of 10, where 0 is the best. Debian 12's says 2.1; others weigh a little differently.
const mostExposed = 2.5
