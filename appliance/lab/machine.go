package lab

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// MachineOptions say what a virtual machine is made of.
type MachineOptions struct {
	Disks []string // raw images, the one to start from first; what is written to them is forgotten with the machine
	Stick string   // a raw image that is in a USB port, for systems that know USB
	UEFI  bool     // start by UEFI, else by BIOS
	// Counted makes the machine's clock count its instructions, a thousand million a second, so that what it measures does
	// not depend on who else uses this processor. It slows the machine down.
	Counted bool
	// Spare is a second Ethernet interface, with a network of its own behind it that has a DHCP server and leads nowhere.
	Spare bool
}

// Machine is a virtual machine in the place of a host: the network sees it at the host's port, with the host's MAC address.
// Captures on the host's interface see its packets, in the direction that the machine sees them.
type Machine struct {
	*Process
	in  *os.File // its serial console
	out console

	monitor string // path of QEMU's socket

	mu       sync.Mutex
	sequence int // of scripts
}

// console is what the machine has written.
type console struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text.Write(bytes.ReplaceAll(b, []byte("\r"), nil))
	return len(b), nil
}

func (c *console) from(n int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text.Bytes()[min(n, c.text.Len()):])
}

// StartMachine starts an emulated machine (QEMU's TCG: it is slow, and needs nothing of this one's processor) in the host's place.
// From then on the host itself has no address. It returns at once; see Shell.
func (h *Host) StartMachine(ctx context.Context, o MachineOptions) (_ *Machine, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting a virtual machine in the place of %s: %w", h.name, err)
		}
	}()
	qemu, err := find("qemu-system-x86_64", "qemu-system-x86")
	if err != nil {
		return nil, err
	}
	if err := h.giveWay(ctx, "ip tuntap add machine mode tap vnet_hdr"); err != nil {
		return nil, err
	}
	accelerator, args := "tcg,thread=multi", []string{}
	if o.Counted {
		accelerator, args = "tcg", []string{"-icount", "shift=0"}
	}
	args = append(args, "-accel", accelerator, "-machine", "q35", "-cpu", "max", "-smp", "1", "-m", "512", "-nodefaults", "-display", "none",
		"-serial", "stdio",
		"-netdev", "tap,id=lan,ifname=machine,script=no,downscript=no,vhost=off", "-device", "virtio-net-pci,romfile=,netdev=lan,mac="+h.MAC().String())
	if o.UEFI {
		const code, variables = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
		if _, err := os.Stat(code); err != nil {
			return nil, MissingError{code, "ovmf"}
		}
		text, err := os.ReadFile(variables)
		own := h.lab.file(h.name, ".efivars")
		if err == nil {
			err = os.WriteFile(own, text, 0o600)
		}
		if err != nil {
			return nil, err
		}
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file="+code, "-drive", "if=pflash,format=raw,file="+own)
	}
	if o.Spare {
		args = append(args, "-netdev", "user,id=spare,net=10.9.0.0/24", "-device", "virtio-net-pci,romfile=,netdev=spare,mac=02:00:00:00:99:01")
	}
	monitor := h.lab.file(h.name, ".monitor")
	args = append(args, "-qmp", "unix:"+monitor+",server=on,wait=off", "-device", "virtio-scsi-pci,id=scsi", "-device", "qemu-xhci,id=usb")
	if o.Stick != "" {
		args = append(args, "-drive", "if=none,id=stick,format=raw,snapshot=on,file="+o.Stick, "-device", "usb-storage,bus=usb.0,drive=stick")
	}
	for _, disk := range o.Disks {
		args = append(args, "-drive", "if=virtio,format=raw,snapshot=on,file="+disk)
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close() // the machine has its own
	m := &Machine{in: write, monitor: monitor}
	command := h.Command(ctx, qemu, args...)
	command.Stdin, command.Stdout = read, &m.out
	if m.Process, err = command.Start(); err != nil {
		return nil, errors.Join(err, write.Close())
	}
	context.AfterFunc(m.life, func() { write.Close() })
	return m, nil
}

// Console is what the machine has written on its serial console so far.
func (m *Machine) Console() string { return m.out.from(0) }

// What the appliance's console says when it can be talked to.
const (
	offersShell = "Enter: a shell"
	inShell     = "exit closes the shell."
)

// Shell waits until the appliance's console offers a shell, for the first time since Shell was last used, and enters it.
func (m *Machine) Shell(ctx context.Context) error {
	seen := max(0, strings.LastIndex(m.Console(), inShell))
	if _, err := m.await(ctx, seen, regexp.MustCompile(offersShell)); err != nil {
		return err
	}
	ctx, end := m.whileAlive(ctx, func() error { return errEnded })
	defer end()
	seen = len(m.Console())
	for !strings.Contains(m.out.from(seen), inShell) { // what is typed while it writes may be lost
		if _, err := m.in.WriteString("\n"); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("entering the machine's shell: %w", context.Cause(ctx))
		case <-time.After(3 * time.Second):
		}
	}
	// Neither a prompt nor what is typed is to be between what is said. (tee, since cat would hold the pipe's lock while it waits.)
	if _, err := m.in.WriteString("stty -echo; echo no echo''es; tee | sh\n"); err != nil {
		return err
	}
	_, err := m.await(ctx, seen, regexp.MustCompile("no echoes\n"))
	return err
}

// Run has the machine's shell run a script, and returns what it wrote. That it fails is an error.
func (m *Machine) Run(ctx context.Context, script string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sequence++
	begin, end := fmt.Sprintf("<%d<", m.sequence), fmt.Sprintf(">%d>", m.sequence)
	seen := len(m.Console())
	text := base64.StdEncoding.EncodeToString([]byte(script))
	var lines strings.Builder
	for len(text) > 0 { // a terminal's line is bounded
		n := min(len(text), 1000)
		lines.WriteString(text[:n] + "\n")
		text = text[n:]
	}
	_, err := fmt.Fprintf(m.in, "base64 -d >/tmp/script <<END\n%sEND\necho '%s'; sh /tmp/script </dev/null 2>&1; echo '%s'$?\n", lines.String(), begin, end)
	if err != nil {
		return "", err
	}
	found, err := m.await(ctx, seen, regexp.MustCompile(`(?s)`+begin+`\n(.*)`+end+`(\d+)\n`))
	if err != nil {
		return "", fmt.Errorf("running %q: %w", script, err)
	}
	if code, err := strconv.Atoi(found[2]); err != nil || code != 0 {
		return found[1], fmt.Errorf("running %q: exit status %s:\n%s", script, found[2], found[1])
	}
	return found[1], nil
}

var errEnded = errors.New("the machine has ended")

// await waits until the console has written text behind its first bytes.
func (m *Machine) await(ctx context.Context, seen int, text *regexp.Regexp) (found []string, err error) {
	ctx, end := m.whileAlive(ctx, func() error { return errEnded })
	defer end()
	bounded, cancel := context.WithTimeoutCause(ctx, 150*time.Second, errors.New("it says nothing of that in 150 s"))
	defer cancel()
	err = Wait(bounded, fmt.Sprintf("the machine's console to say %q", text), func() error {
		if found = text.FindStringSubmatch(m.out.from(seen)); found == nil {
			return errors.New(m.out.from(max(seen, len(m.Console())-500)))
		}
		return nil
	})
	return found, err
}
