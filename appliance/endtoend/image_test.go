package endtoend

import (
	"compress/gzip"
	"context"
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

// imageOfPC says that the image's kernel knows the devices of PCs, USB among them.
func imageOfPC() bool { return !strings.Contains(os.Getenv("SIDEGATE_IMAGE_KERNEL"), "-cloud-") }

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

// startImage starts it, and returns when the gateway serves.
func startImage(t *testing.T, w world, o lab.MachineOptions) machineBox {
	t.Helper()
	begun := time.Now()
	b := bootImage(t, w, o)
	b.serves(t)
	t.Logf("the box serves %.0f s after the machine's start", time.Since(begun).Seconds())
	return b
}

// bootImage starts it, and returns when its console can be talked to.
func bootImage(t *testing.T, w world, o lab.MachineOptions) machineBox {
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
	need(t, m.Shell(within(t, 5*time.Minute)))
	return machineBox{shellBox{m.Run, "/etc/sidegate/sidegate.yaml"}, m}
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
	o := lab.MachineOptions{UEFI: true, Disks: []string{disk}}
	configured := drive(t, "SIDEGATE", map[string]string{
		"sidegate.yaml": strings.ReplaceAll(s.first(), "\n", "\r\n"), // as of Windows
		"network": fmt.Sprintf("# the box\r\ninterface = eth0\r\naddress = %s\r\naddress = %s\r\ngateway = %s\r\ngateway = %s\r\n",
			s.sidegate().Interface().Addr4, s.sidegate().Interface().Addr6, s.router().Addr4(), s.router().Addr6()),
	})
	if imageOfPC() {
		o.Stick = configured
	} else {
		o.Disks = append(o.Disks, configured)
	}
	s.sideRouter = startImage(t, s.world, o)
	s.playsAll(t, true)
}

// TestImageRefused: a configuration that is wrong at the start lets nothing out, and the console says what is wrong with it.
func TestImageRefused(t *testing.T) {
	disk := image(t)
	w := newWorld(t, lab.Options{})
	s := w.serve(t)
	b := bootImage(t, w, lab.MachineOptions{Disks: []string{disk, drive(t, "SIDEGATE", map[string]string{
		"sidegate.yaml": "default: tokyo\n",
		"network":       fmt.Sprintf("address = %s\ngateway = %s\n", w.sidegate().Interface().Addr4, w.router().Addr4()),
	})}})
	b.says(t, `/etc/sidegate/sidegate.yaml:1: default: unknown outbound "tokyo"`)
	b.shows(t, "  192.168.0.2/24 on eth0\n", "The gateway is not running", `unknown outbound "tokyo"`)
	if _, err := spoken(t, w.laptop(), "tcp", s.direct.Addr4(), patience(false)); err == nil {
		t.Error("something is forwarded")
	}
	_, err := b.try(t, "echo 'default: direct' >/etc/sidegate/sidegate.yaml")
	need(t, err)
	b.serves(t)
	if _, err := spoken(t, w.laptop(), "tcp", s.direct.Addr4(), forAnswer); err != nil {
		t.Errorf("with a right one: %v", err)
	}
}

// TestImageFirstStart: an image that nobody has configured, on a PC with BIOS and a second interface in a LAN with DHCP, forwards everything
// past itself, has its own connections decided, shows on its console how it is reached and configured, and serves within 5 s of the kernel's
// hand-over. Then it is configured by a drive that is plugged in, once what is on it is right.
func TestImageFirstStart(t *testing.T) {
	disk := image(t)
	w := newWorld(t, lab.Options{})
	s := w.serve(t)
	startProgram(t, w.router(), "dnsmasq-base", "dnsmasq", "-k", "-C", "/dev/null", "-p", "0", "--user=root", "--no-ping", "--interface=lan",
		"--bind-interfaces", "--dhcp-range=192.168.0.150,192.168.0.200,1h", "--dhcp-authoritative", "--dhcp-option=3,"+w.router().Addr4().String(),
		fmt.Sprintf("--dhcp-host=%s,%s", w.sidegate().MAC(), w.sidegate().Addr4()), "--dhcp-leasefile="+filepath.Join(w.Dir(), "leases"), "--pid-file=")
	b := startImage(t, w, lab.MachineOptions{Disks: []string{disk}, Counted: true, Spare: true})

	need(t, lab.Wait(within(t, 30*time.Second), "an address by DHCP", func() error {
		_, err := b.try(t, "ip route | grep -q 'default via 10.9.' && ip route get 192.0.2.1 | grep -q eth0 && sidegate status | grep -q 'LAN .*eth0'")
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
	limit := 5.0
	if imageOfPC() { // which waits for USB sticks, and has more drivers and a larger BTF to read
		limit = 8
	}
	if running-handover > limit {
		t.Errorf("that is more than %.0f s", limit)
	}

	b.shows(t, "  192.168.0.2/24 on eth0\n", "  10.9.0.15/24 on eth1\n", "default direct", "Serving since ", "labelled\nSIDEGATE", "partition SGBOOT")

	pull := b.plug(t, "default: direct\nrules: [ { name: closed, port: 7, outbound: tokyo } ]\n")
	b.says(t, "sidegate.yaml:2: rule \"closed\": unknown outbound \"tokyo\"")
	b.shows(t, ", labelled SIDEGATE, is refused, and what was before stays:", "Configured by /dev/", "labelled SGBOOT")
	if _, err := spoken(t, w.laptop(), "tcp", s.direct.Addr4(), forAnswer); err != nil {
		t.Errorf("with a drive that is refused: %v", err)
	}
	need(t, pull(within(t, time.Minute)))
	b.plug(t, "default: direct\nrules: [ { name: closed, port: 7, outbound: block } ]\n")
	b.says(t, "the configuration is that of the drive ")
	need(t, lab.Wait(within(t, time.Minute), "the rule of the drive to be in force", func() error {
		_, err := b.try(t, "sidegate rules | grep -q closed")
		return err
	}))
	if _, err := spoken(t, w.laptop(), "tcp", s.direct.Addr4(), patience(false)); err == nil {
		t.Error("the drive closes the port, and it is open")
	}
	b.shows(t, "labelled SIDEGATE.\n")
}

// plug puts a configuration on a drive that is plugged in: a USB stick, if the kernel knows such, and else a SCSI disk.
func (b machineBox) plug(t *testing.T, config string) (pull func(context.Context) error) {
	t.Helper()
	pull, err := b.Plug(within(t, time.Minute), drive(t, "SIDEGATE", map[string]string{"sidegate.yaml": config}), imageOfPC())
	need(t, err)
	return pull
}

// says waits until the machine's log has a text.
func (b machineBox) says(t *testing.T, text string) {
	t.Helper()
	need(t, lab.Wait(within(t, 2*time.Minute), "the log to say "+text, func() error {
		_, err := b.try(t, "dmesg | grep -qF '"+text+"' || { dmesg | tail -n 20; exit 1; }")
		return err
	}))
}

// shows looks at the console as it is by now.
func (b machineBox) shows(t *testing.T, texts ...string) {
	t.Helper()
	screen, err := b.try(t, "/usr/lib/sidegate/console.sh & sleep 5; kill $!")
	need(t, err)
	for _, want := range texts {
		if !strings.Contains(screen, want) {
			t.Errorf("the console does not say %q:\n%s", want, screen)
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
