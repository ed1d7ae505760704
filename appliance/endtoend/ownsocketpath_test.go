package endtoend

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOwnProcessPath: a rule on a program's path is for the path by which it was started, whatever its file is called elsewhere: below a
// bind mount, in an overlay, and when the file is gone. What breaks it is a walk to the root that does not cross mounts.
func TestOwnProcessPath(t *testing.T) {
	b := newBox(t)
	near := startWitness(t, b.server(), 7)
	dir := t.TempDir()
	below := func(name string) string {
		path := filepath.Join(dir, name)
		need(t, os.MkdirAll(path, 0o755))
		return path
	}
	mount := func(source, target, kind string, flags uintptr, data string) error {
		err := unix.Mount(source, target, kind, flags, data)
		if err == nil {
			t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
		}
		return err
	}
	b.start(t, b.config(`rules: [ { name: by path, process_path: [`+filepath.Join(dir, "plain/p")+`, `+filepath.Join(dir, "bound/deep/p")+
		`, `+filepath.Join(dir, "twice/again/p")+`, `+filepath.Join(dir, "merged/p")+`, `+filepath.Join(dir, "gone/p")+`], outbound: direct } ]
default: hk`))
	original := program(t, "/proc/self/exe", filepath.Join(below("files/deep"), "p"))
	need(t, mount(below("files"), below("bound"), "", unix.MS_BIND, ""))
	need(t, mount(below("files"), below("twice"), "", unix.MS_BIND, ""))
	need(t, os.Mkdir(filepath.Join(dir, "twice/again"), 0o755))
	need(t, mount(filepath.Join(dir, "files/deep"), filepath.Join(dir, "twice/again"), "", unix.MS_BIND, ""))
	goneFile := program(t, original, filepath.Join(below("gone"), "p"))
	for _, c := range []struct {
		path   string
		direct bool
	}{
		{program(t, original, filepath.Join(below("plain"), "p")), true},
		{original, false},
		{filepath.Join(dir, "bound/deep/p"), true},
		{filepath.Join(dir, "twice/again/p"), true},
		{filepath.Join(dir, "twice/deep/p"), false},
		{goneFile, true},
	} {
		a := b.agent(t, c.path, b.unit(t, "any.service"))
		if c.path == goneFile {
			need(t, os.Remove(goneFile))
		}
		if s := a.visit(t, 1, "tcp", near.addr4); s.Error != "" || is(b.upstream(), s.Seen.Addr()) == c.direct {
			t.Errorf("%s: the server saw %s, %s; direct: %v", c.path, s.Seen, s.Error, c.direct)
		}
	}
	t.Run("overlay", func(t *testing.T) {
		tmp := below("layers")
		need(t, mount("tmpfs", tmp, "tmpfs", 0, ""))
		for _, layer := range []string{"upper", "work"} {
			need(t, os.Mkdir(filepath.Join(tmp, layer), 0o755))
		}
		err := mount("overlay", below("merged"), "overlay", 0, "lowerdir="+filepath.Join(dir, "files/deep")+",upperdir="+tmp+"/upper,workdir="+tmp+"/work")
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
			t.Skipf("this machine has no overlays: %v", err)
		}
		need(t, err)
		s := b.agent(t, filepath.Join(dir, "merged/p"), b.unit(t, "any.service")).visit(t, 1, "tcp", near.addr4)
		if s.Error != "" || is(b.upstream(), s.Seen.Addr()) {
			t.Errorf("the server saw %s, %s", s.Seen, s.Error)
		}
	})
}
