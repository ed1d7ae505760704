package endtoend

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// image is the disk that make image builds; without it, what needs it is skipped. (vmtests/run.sh)
func image(t *testing.T) (disk string) {
	t.Helper()
	packed := os.Getenv("SIDEGATE_IMAGE")
	if packed == "" {
		t.Skip("needs an image of the appliance, in SIDEGATE_IMAGE: make vmtest")
	}
	f, err := os.Open(packed)
	need(t, err)
	defer f.Close()
	if i, err := f.Stat(); err != nil || i.Size() > 60e6 {
		t.Errorf("the image is larger than 60 MB: %d, %v", i.Size(), err)
	}
	z, err := gzip.NewReader(f)
	need(t, err)
	disk = filepath.Join(t.TempDir(), "disk")
	out, err := os.Create(disk)
	need(t, err)
	_, err = io.Copy(out, z)
	need(t, errors.Join(err, out.Close()))
	return disk
}

// drive is a FAT file system with a label and files, as of a USB stick.
func drive(t *testing.T, label string, files map[string]string) (disk string) {
	t.Helper()
	dir := t.TempDir()
	disk = filepath.Join(dir, "drive")
	command := fmt.Sprintf("PATH=$PATH:/usr/sbin mkfs.vfat -C -n %s %s 2048", label, disk)
	for name, text := range files {
		path := filepath.Join(dir, name)
		need(t, os.WriteFile(path, []byte(text), 0o600))
		command += fmt.Sprintf(" && mcopy -i %s %s ::", disk, path)
	}
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("making a drive: %v\n%s", err, out)
	}
	return disk
}

// machineBox is the appliance in a virtual machine in the place of the lab's side router.
type machineBox struct {
	shellBox
	*lab.Machine
}

// startImage starts it, and returns when its console can be talked to.
func startImage(t *testing.T, w world, o lab.MachineOptions) machineBox {
	t.Helper()
	m, err := w.sidegate().StartMachine(t.Context(), o)
	need(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			text := m.Console()
			t.Logf("the console's last words:\n%s", text[max(0, len(text)-8000):])
		}
		if err := m.Kill(); err != nil {
			t.Error(err)
		}
	})
	begun := time.Now()
	need(t, m.Shell(within(t, 5*time.Minute)))
	b := machineBox{shellBox{m.Run, "/etc/sidegate/sidegate.yaml"}, m}
	b.serves(t)
	t.Logf("the box serves %.0f s after the machine's start", time.Since(begun).Seconds())
	return b
}

func (b machineBox) restart(t *testing.T) {
	t.Helper()
	_, err := b.try(t, "(sleep 1; reboot) >/dev/null 2>&1 &")
	need(t, err)
	need(t, b.Shell(within(t, 5*time.Minute)))
	b.serves(t)
}

// TestImage plays with the image: a PC with UEFI that has its address and configuration from a drive labelled SIDEGATE.
func TestImage(t *testing.T) {
	disk := image(t)
	s := newStage(t)
	s.sideRouter = startImage(t, s.world, lab.MachineOptions{UEFI: true, Disks: []string{disk, drive(t, "SIDEGATE", map[string]string{
		"sidegate.yaml": strings.ReplaceAll(s.first(), "\n", "\r\n"), // as of Windows
		"network": fmt.Sprintf("# the box\r\ninterface = eth0\r\naddress = %s\r\naddress = %s\r\ngateway = %s\r\ngateway = %s\r\n",
			s.sidegate().Interface().Addr4, s.sidegate().Interface().Addr6, s.router().Addr4(), s.router().Addr6()),
	})}})
	s.playsAll(t, true)
}

// TestImageFirstStart: an image that nobody has configured, on a PC with BIOS in a LAN with DHCP, forwards everything past itself, has
// its own connections decided, shows on its console how it is reached and configured, and serves within 5 s of the kernel's hand-over.
func TestImageFirstStart(t *testing.T) {
	disk := image(t)
	w := newWorld(t, lab.Options{})
	s := w.serve(t)
	startProgram(t, w.router(), "dnsmasq-base", "dnsmasq", "-k", "-C", "/dev/null", "-p", "0", "--user=root", "--no-ping", "--interface=lan",
		"--bind-interfaces", "--dhcp-range=192.168.0.150,192.168.0.200,1h", "--dhcp-authoritative", "--dhcp-option=3,"+w.router().Addr4().String(),
		fmt.Sprintf("--dhcp-host=%s,%s", w.sidegate().MAC(), w.sidegate().Addr4()), "--dhcp-leasefile="+filepath.Join(w.Dir(), "leases"), "--pid-file=")
	b := startImage(t, w, lab.MachineOptions{Disks: []string{disk}, Counted: true})

	need(t, lab.Wait(within(t, 30*time.Second), "an address by DHCP", func() error {
		_, err := b.try(t, "ip route | grep -q default && sidegate status | grep -q 'LAN .*eth0'")
		return err
	}))
	atBox := captureOn(t, w.sidegate(), "eth0")
	for _, network := range []string{"tcp", "udp"} {
		if _, err := spoken(t, w.laptop(), network, s.direct.Addr4(), forAnswer); err != nil {
			t.Errorf("%s: %v", network, err)
		} else if from := last(s.direct); from != w.laptop().Addr4() {
			t.Errorf("%s: the server saw %s", network, from)
		}
	}
	to := func(p lab.Packet) bool { return p.Dst == s.direct.Addr4() }
	from := func(p lab.Packet) bool { return p.Src == s.direct.Addr4() }
	if there, back := packets(t, atBox, to), packets(t, atBox, from); there == 0 || back != 0 {
		t.Errorf("the box has seen %d packets to the server and %d back", there, back)
	}
	if out, err := b.try(t, "ls /sys/fs/bpf/sidegate/links"); err != nil || !strings.Contains(out, "own-connect4") {
		t.Errorf("the box's own connections are not decided: %v\n%s", err, out)
	}

	log, err := b.try(t, "dmesg")
	need(t, err)
	handover, running := at(t, log, "Run /init as init process"), at(t, log, " running: ")
	t.Logf("the gateway serves %.1f s after the kernel's hand-over, which is %.1f s after its start, at a thousand million instructions a second", running-handover, handover)
	if running-handover > 5 {
		t.Error("that is more than 5 s")
	}

	_, err = b.try(t, "/usr/lib/sidegate/console.sh & sleep 5; kill $!") // the console as it is by now
	need(t, err)
	for _, want := range []string{"  192.168.0.2/24 on eth0\n", "default direct", "Serving since ", "labelled\nSIDEGATE", "labelled SGBOOT"} {
		if !strings.Contains(b.Console(), want) {
			t.Errorf("the console does not say %q", want)
		}
	}
}

// at is the kernel's time of a line of its log, in seconds since its start.
func at(t *testing.T, log, line string) float64 {
	t.Helper()
	found := regexp.MustCompile(`\[ *(\d+\.\d+)\] .*` + regexp.QuoteMeta(line)).FindStringSubmatch(log)
	if found == nil {
		t.Fatalf("the log does not say %q:\n%s", line, log)
	}
	seconds, err := strconv.ParseFloat(found[1], 64)
	need(t, err)
	return seconds
}
