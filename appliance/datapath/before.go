package datapath

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Program is somebody's program at a place where ours are attached.
type Program struct {
	ID   uint32
	Name string
}

// ProgramsBefore returns the programs that packets from an interface meet before ours, or would if ours was attached now. One that
// returns TCX_PASS keeps packets from ours.
func ProgramsBefore(index int) ([]Program, error) {
	all, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENODEV) {
		return nil, nil // an older kernel, or the interface is gone: others say so
	}
	if err != nil {
		return nil, fmt.Errorf("listing the programs on the interface: %w", err)
	}
	var found []Program
	for _, attached := range all.Programs {
		name, err := programName(attached.ID)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just gone
		}
		if err != nil {
			return nil, err
		}
		if name == "lan_ethernet" || name == "lan_ip" {
			return found, nil
		}
		found = append(found, Program{uint32(attached.ID), name})
	}
	return found, nil
}

func programName(id ebpf.ProgramID) (string, error) {
	p, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrPermission) {
		return "", fmt.Errorf("opening program %d: %w; it takes root, or CAP_SYS_ADMIN", id, err)
	}
	if err != nil {
		return "", fmt.Errorf("opening program %d: %w", id, err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", fmt.Errorf("asking for the name of program %d: %w", id, err)
	}
	return info.Name, nil
}
