package endtoend

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sidegate/appliance/lab"
)

// allowBPF is the README's change to a filter of system calls, by jq.
const allowBPF = `.syscalls |= map(.names -= ["bpf"]) + [{names: ["bpf"], action: "SCMP_ACT_ALLOW"}]`

// TestContainer plays with the OCI image, run by podman and crun with host networking and the capabilities of appliance.json, and no others.
func TestContainer(t *testing.T) {
	image := os.Getenv("SIDEGATE_OCI")
	if image == "" {
		t.Skip("needs an OCI image of the gateway, in SIDEGATE_OCI: make vmtest")
	}
	for _, program := range []string{"podman", "crun", "jq"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %[1]s: install the package %[1]s", program)
		}
	}
	readme, err := os.ReadFile("../../README.md")
	need(t, err)
	if !strings.Contains(string(readme), "jq '"+allowBPF+"'") {
		t.Errorf("the README does not say: jq '%s'", allowBPF)
	}

	s := newStage(t)
	dir := t.TempDir()
	need(t, errors.Join(os.Mkdir(dir+"/configuration", 0o755), os.Mkdir(dir+"/run", 0o755)))
	config := dir + "/configuration/sidegate.yaml"
	need(t, os.WriteFile(config, []byte(s.first()), 0o600))
	state, err := s.sidegate().MountBPF()
	need(t, err)
	// Podman's own filter of system calls has bpf(2) for CAP_SYS_ADMIN only.
	seccomp, err := exec.CommandContext(t.Context(), "jq", allowBPF, "/usr/share/containers/seccomp.json").Output()
	need(t, err)
	need(t, os.WriteFile(dir+"/seccomp.json", seccomp, 0o600))
	podman := []string{
		"exec", "podman", "--root", dir + "/root", "--runroot", dir + "/runroot", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs",
		"--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "crun", "run", "--rm", "--network", "host",
		"--cgroups", "disabled", "--cgroupns", "host", "--ulimit", "nofile=10000:10000", "--ulimit", "nproc=10000:10000", "--security-opt", "apparmor=unconfined",
		"--security-opt", "seccomp=" + dir + "/seccomp.json",
		"-v", state + ":/sys/fs/bpf", "-v", "/sys/fs/cgroup:/sys/fs/cgroup", "-v", dir + "/configuration:/etc/sidegate", "-v", dir + "/run:/run",
		"--cap-drop", "all",
	}
	for _, c := range applianceCapabilities(t) {
		podman = append(podman, "--cap-add", strings.TrimPrefix(c, "CAP_"))
	}
	// Crun refuses a machine that has cgroups of both versions; the container sees the second.
	script := "mount --make-rprivate /; [ ! -d /sys/fs/cgroup/unified ] || mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup\n" +
		"cd " + filepath.Dir(image) + "\n" + // as its user does: podman takes no path with capital letters
		strings.Join(append(podman, "oci:"+filepath.Base(image)), " ")
	p, err := s.sidegate().Command(t.Context(), "unshare", "-m", "sh", "-c", script).Start()
	need(t, err)
	s.gateway = &lab.Gateway{Process: p, Config: config, Socket: filepath.Join(dir, "run/sidegate/admin.sock")}
	b := &namespaceBox{s, t}
	s.sideRouter = b
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the container's last words:\n%s", p.Tail(30))
		}
	})
	need(t, lab.Wait(within(t, time.Minute), "the container to serve", func() error {
		select {
		case <-p.Done():
			return fmt.Errorf("it has ended: %w", p.Wait())
		default:
		}
		_, err := b.try(t, "sidegate status >/dev/null")
		return err
	}))
	s.playsAll(t, false)
}

// applianceCapabilities are those that every way to run the gateway gives it.
func applianceCapabilities(t *testing.T) []string {
	t.Helper()
	var appliance struct{ Capabilities []string }
	text, err := os.ReadFile("../../images/appliance.json")
	need(t, err)
	need(t, json.Unmarshal(text, &appliance))
	return appliance.Capabilities
}
