package endtoend

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOldKernelIsRefused: by one line that says which kernel this is and which it must be.
func TestOldKernelIsRefused(t *testing.T) {
	var uts unix.Utsname
	need(t, unix.Uname(&uts))
	release := unix.ByteSliceToString(uts.Release[:])
	if !strings.HasPrefix(release, "6.1.") {
		t.Skipf("needs a kernel that is too old, such as 6.1, and this is %s: make vmtest", release)
	}
	config := filepath.Join(t.TempDir(), "sidegate.yaml")
	need(t, os.WriteFile(config, []byte("default: direct\n"), 0o600))
	out, err := exec.CommandContext(t.Context(), binary, "run", "-c", config).CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("it ends with %v, want exit code 1", err)
	}
	if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); len(lines) != 1 ||
		!strings.Contains(lines[0], "Linux "+release) || !strings.Contains(lines[0], "needs 6.6 or newer") {
		t.Errorf("it says:\n%s", out)
	}
}
