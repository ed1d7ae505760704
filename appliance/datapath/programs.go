package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
)

// programs are pins of what the links run, each named by the program's number. The kernel hands out a program by its number to
// CAP_SYS_ADMIN alone; a pin is opened by whoever may read it. They lie beside the pinned maps, whose layout they were made for, and go
// with them: a sidegate that knows of no such pins removes them, too.
type programs struct{ state *state }

func (p programs) dir() string { return filepath.Join(p.state.mapDir(), "programs") }

// keep pins a program that a link is about to run, or runs. Added reports whether it was not pinned.
func (p programs) keep(program *ebpf.Program) (added bool, err error) {
	id, err := programID(program)
	if err != nil {
		return false, err
	}
	path := filepath.Join(p.dir(), strconv.FormatUint(uint64(id), 10))
	if _, err := os.Stat(path); err == nil {
		return false, nil
	}
	if err := os.MkdirAll(p.dir(), 0o700); err != nil {
		return false, fmt.Errorf("making the directory of programs: %w", err)
	}
	program.Unpin() // forgets a pin that somebody removed
	if err := program.Pin(path); err != nil {
		return false, fmt.Errorf("pinning the program: %w", err)
	}
	return true, nil
}

// open finds a program that was kept, by this daemon or a predecessor; nil if none is.
func (p programs) open(id ebpf.ProgramID) (*ebpf.Program, error) {
	pins, err := filepath.Glob(filepath.Join(p.state.dir, "maps-v*", "programs", strconv.FormatUint(uint64(id), 10)))
	if err != nil || len(pins) == 0 {
		return nil, err
	}
	program, err := ebpf.LoadPinnedProgram(pins[0], nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening program %d: %w", id, err)
	}
	return program, nil
}

// removeExcept takes away the pins of all others, which would keep their generation's maps.
func (p programs) removeExcept(running map[ebpf.ProgramID]bool) error {
	pins, err := os.ReadDir(p.dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the pinned programs: %w", err)
	}
	for _, pin := range pins {
		if id, err := strconv.ParseUint(pin.Name(), 10, 32); err == nil && running[ebpf.ProgramID(id)] {
			continue
		}
		if err := os.Remove(filepath.Join(p.dir(), pin.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the pin of program %s: %w", pin.Name(), err)
		}
	}
	return nil
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("asking for a program's number: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("asking for a program's number: the kernel does not tell")
	}
	return id, nil
}
