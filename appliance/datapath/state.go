package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// abiVersion is ABI_VERSION of bpf/types.h: the layout of what is pinned. Pins of another version are
// never read; they are removed once the new ones serve.
const abiVersion = 1

// state is what outlives a generation and the daemon: the maps that are declared pinned in bpf/maps.h.
type state struct {
	dir     string // StateDir
	mounted bool   // StateDir is a mount of its own
	maps    gatewayMaps
	rebuilt bool // pins of another layout were found
}

func openState(dir string) (*state, error) {
	s := &state{dir: dir}
	if err := s.mount(); err != nil {
		return nil, err
	}
	err := s.loadMaps()
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		s.rebuilt = true
		if err = os.RemoveAll(s.mapDir()); err == nil {
			err = s.loadMaps()
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.unmount())
	}
	others, err := s.others()
	s.rebuilt = s.rebuilt || len(others) > 0
	return s, err
}

func (s *state) mapDir() string {
	return filepath.Join(s.dir, fmt.Sprintf("maps-v%d", abiVersion))
}

// mount makes the state directory lie in a BPF file system, mounting one there if need be.
func (s *state) mount() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return err
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		if err := unix.Mount("bpf", s.dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mounting a bpf file system: %w", err)
		}
	}
	var self, parent unix.Stat_t
	if err := errors.Join(unix.Stat(s.dir, &self), unix.Stat(filepath.Dir(s.dir), &parent)); err != nil {
		return err
	}
	s.mounted = self.Dev != parent.Dev
	return nil
}

// loadMaps loads or creates every map that bpf/maps.h declares pinned, and no other.
func (s *state) loadMaps() error {
	if err := os.MkdirAll(s.mapDir(), 0o700); err != nil {
		return err
	}
	spec, err := loadGateway()
	if err != nil {
		return err
	}
	spec.Programs, spec.Variables = nil, nil
	for name, m := range spec.Maps {
		if m.Pinning != ebpf.PinByName {
			delete(spec.Maps, name)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Maps: ebpf.MapOptions{PinPath: s.mapDir()},
	})
	if err != nil {
		return err
	}
	defer coll.Close()
	for name, m := range map[string]**ebpf.Map{
		gatewayMapClients:        &s.maps.Clients,
		gatewayMapCrowdFlows:     &s.maps.CrowdFlows,
		gatewayMapDrops:          &s.maps.Drops,
		gatewayMapFlows:          &s.maps.Flows,
		gatewayMapFragments:      &s.maps.Fragments,
		gatewayMapLastGeneration: &s.maps.LastGeneration,
		gatewayMapOwnAddresses:   &s.maps.OwnAddresses,
		gatewayMapPublished:      &s.maps.Published,
		gatewayMapSockets:        &s.maps.Sockets,
	} {
		*m = coll.DetachMap(name)
	}
	return nil
}

// shared lists the pinned maps under their BPF names, for programs that are to use them.
func (m *gatewayMaps) shared() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		gatewayMapClients:        m.Clients,
		gatewayMapCrowdFlows:     m.CrowdFlows,
		gatewayMapDrops:          m.Drops,
		gatewayMapFlows:          m.Flows,
		gatewayMapFragments:      m.Fragments,
		gatewayMapLastGeneration: m.LastGeneration,
		gatewayMapOwnAddresses:   m.OwnAddresses,
		gatewayMapPublished:      m.Published,
		gatewayMapSockets:        m.Sockets,
	}
}

// others are the map directories of other versions.
func (s *state) others() ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(s.dir, "maps-v*"))
	var others []string
	for _, dir := range dirs {
		if dir != s.mapDir() {
			others = append(others, dir)
		}
	}
	return others, err
}

func (s *state) removeOther() error {
	others, err := s.others()
	for _, dir := range others {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

func (s *state) Close() error {
	return _GatewayClose(&s.maps)
}

// remove takes away the pins, the directory and the mount.
func (s *state) remove() error {
	err := errors.Join(s.Close(), os.RemoveAll(s.mapDir()), s.removeOther())
	err = errors.Join(err, s.unmount())
	if rm := os.Remove(s.dir); rm != nil && !errors.Is(rm, os.ErrNotExist) && !errors.Is(rm, syscall.EBUSY) {
		err = errors.Join(err, rm)
	}
	return err
}

func (s *state) unmount() error {
	if !s.mounted {
		return nil
	}
	if err := unix.Unmount(s.dir, 0); err != nil {
		return fmt.Errorf("unmounting %s: %w", s.dir, err)
	}
	return nil
}

// nextGeneration counts on from the predecessor, so that a generation's number is never used twice.
func (s *state) nextGeneration() (uint32, error) {
	var n uint32
	if err := s.maps.LastGeneration.Lookup(uint32(0), &n); err != nil {
		return 0, fmt.Errorf("reading the last generation: %w", err)
	}
	n++
	if err := s.maps.LastGeneration.Put(uint32(0), n); err != nil {
		return 0, fmt.Errorf("counting generations: %w", err)
	}
	return n, nil
}

func (s *state) setOwnAddresses(addrs []netip.Addr) error {
	want := make(map[gatewayAddress]uint8, len(addrs))
	for _, a := range addrs {
		want[addressOf(a)] = 1
	}
	return replace(s.maps.OwnAddresses, want, "own addresses")
}

func (s *state) setPublished(services []Service) error {
	want := make(map[gatewayPublishedKey]uint8, len(services))
	for _, p := range services {
		key := gatewayPublishedKey{Address: addressOf(p.Address), Port: bigEndian(p.Port), Protocol: uint8(p.Network)}
		want[key] = 1
	}
	return replace(s.maps.Published, want, "published services")
}

// replace makes the map hold want: additions first, so that nothing wanted is ever missing.
func replace[K comparable, V comparable](m *ebpf.Map, want map[K]V, what string) error {
	have := map[K]V{}
	var key K
	var value V
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		have[key] = value
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("reading the %s: %w", what, err)
	}
	for k, v := range want {
		if old, ok := have[k]; ok && old == v {
			continue
		}
		if err := m.Put(k, v); err != nil {
			return fmt.Errorf("writing the %s: %w", what, err)
		}
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("removing from the %s: %w", what, err)
		}
	}
	return nil
}

// setSockets gives the programs the listeners. The kernel removes a slot's entry with its socket.
func (s *state) setSockets(sockets Sockets) error {
	for slot, conn := range map[gatewaySocketSlot]syscall.Conn{
		gatewaySocketSlotSOCKET_PROXY_TCP4: sockets.TCP4,
		gatewaySocketSlotSOCKET_PROXY_TCP6: sockets.TCP6,
		gatewaySocketSlotSOCKET_PROXY_UDP4: sockets.UDP4,
		gatewaySocketSlotSOCKET_PROXY_UDP6: sockets.UDP6,
	} {
		if conn == nil {
			continue
		}
		raw, err := conn.SyscallConn()
		if err != nil {
			return fmt.Errorf("listening socket: %w", err)
		}
		var put error
		err = raw.Control(func(fd uintptr) { put = s.maps.Sockets.Put(uint32(slot), uint64(fd)) })
		if err = errors.Join(err, put); err != nil {
			return fmt.Errorf("handing the listening socket to the kernel: %w", err)
		}
	}
	return nil
}

// addressOf is the address as the maps store it: IPv4 mapped, network byte order.
func addressOf(a netip.Addr) gatewayAddress {
	b := a.As16()
	var out gatewayAddress
	for i := range out.W {
		out.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}

func (a gatewayAddress) addr() netip.Addr {
	var b [16]byte
	for i, w := range a.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

func bigEndian(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

func networkOf(protocol uint8) policy.Network {
	if n := policy.Network(protocol); n == policy.TCP || n == policy.UDP {
		return n
	}
	return 0
}
