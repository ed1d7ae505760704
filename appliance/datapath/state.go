package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sidegate/appliance/policy"
)

// abiVersion is ABI_VERSION of bpf/types.h: the layout of what is pinned. Pins of another version are
// never read; they are removed once the new ones serve.
const abiVersion = 3

// state is what outlives a generation and the daemon: the maps that are declared pinned in bpf/maps.h.
type state struct {
	dir     string // StateDir
	mounted bool   // StateDir is a mount of its own
	maps    gatewayMaps
	rebuilt bool // pins of another layout were found
}

func openState(dir string) (*state, error) {
	s := &state{dir: dir}
	mountedNow, err := s.mount()
	if err != nil {
		return nil, err
	}
	err = s.loadMaps()
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		s.rebuilt = true
		if err = os.RemoveAll(s.mapDir()); err == nil {
			err = s.loadMaps()
		}
	}
	if err != nil {
		if mountedNow {
			err = errors.Join(err, s.unmount())
		}
		return nil, err
	}
	others, err := s.others()
	s.rebuilt = s.rebuilt || len(others) > 0
	return s, err
}

func (s *state) mapDir() string {
	return filepath.Join(s.dir, fmt.Sprintf("maps-v%d", abiVersion))
}

// mountMarker is a directory in a BPF file system that we mounted: only such a one is unmounted by Close.
const mountMarker = "mounted-by-sidegate"

// mount makes the state directory lie in a BPF file system, mounting one there if need be.
func (s *state) mount() (now bool, err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return false, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return false, err
	}
	marker := filepath.Join(s.dir, mountMarker)
	if fs.Type == unix.BPF_FS_MAGIC {
		_, err := os.Stat(marker)
		s.mounted = err == nil
		return false, nil
	}
	err = unix.Mount("bpf", s.dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	if errors.Is(err, unix.EPERM) { // the capabilities that all else takes are not enough
		return false, errors.New("it lies in no BPF file system, and mounting one takes root (mount -t bpf bpf DIRECTORY, or --state-dir in one that is mounted)")
	}
	if err != nil {
		return false, fmt.Errorf("mounting a bpf file system: %w", err)
	}
	s.mounted = true
	return true, os.Mkdir(marker, 0o700)
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
	fields := s.maps.pinned()
	for name := range coll.Maps {
		field, ok := fields[name]
		if !ok {
			return fmt.Errorf("bpf/maps.h pins the map %s, which is not listed", name)
		}
		*field = coll.DetachMap(name)
	}
	return nil
}

// pinned lists the fields of the maps that bpf/maps.h declares pinned, under their BPF names.
func (m *gatewayMaps) pinned() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		gatewayMapAskers:         &m.Askers,
		gatewayMapClients:        &m.Clients,
		gatewayMapCrowdFlows:     &m.CrowdFlows,
		gatewayMapDrops:          &m.Drops,
		gatewayMapFlows:          &m.Flows,
		gatewayMapFragments:      &m.Fragments,
		gatewayMapLastGeneration: &m.LastGeneration,
		gatewayMapLearned:        &m.Learned,
		gatewayMapOrigins:        &m.Origins,
		gatewayMapOwnAddresses:   &m.OwnAddresses,
		gatewayMapOwnNumbers:     &m.OwnNumbers,
		gatewayMapOwnRecent:      &m.OwnRecent,
		gatewayMapOwnSockets:     &m.OwnSockets,
		gatewayMapPublished:      &m.Published,
		gatewayMapResolvers:      &m.Resolvers,
		gatewayMapSockets:        &m.Sockets,
	}
}

// shared are those maps, for programs that are to use them.
func (m *gatewayMaps) shared() map[string]*ebpf.Map {
	maps := map[string]*ebpf.Map{}
	for name, field := range m.pinned() {
		maps[name] = *field
	}
	return maps
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

// setOwnAddresses also forgets the flows towards an address that is newly ours: they were decided when it was
// somebody else's.
func (s *state) setOwnAddresses(addrs []netip.Addr) error {
	want, err := s.numberOwn(addrs)
	if err != nil {
		return err
	}
	fresh := false
	for key := range want {
		var there uint32
		fresh = fresh || s.maps.OwnAddresses.Lookup(key, &there) != nil
	}
	if err := replace(s.maps.OwnAddresses, want, "own addresses"); err != nil || !fresh {
		return err
	}
	for _, table := range s.flowTables() {
		var ours []gatewayFlowKey
		err := eachFlow(table, func(k gatewayFlowKey, _ gatewayFlow) {
			if want[k.Destination] != 0 {
				ours = append(ours, k)
			}
		})
		if err = errors.Join(err, deleteFlows(table, ours)); err != nil {
			return err
		}
	}
	return nil
}

// setResolvers names the DNS servers whose own questions are left alone.
func (s *state) setResolvers(addrs []netip.Addr) error {
	want := make(map[gatewayAddress]uint8, len(addrs))
	for _, a := range addrs {
		want[addressOf(a)] = 1
	}
	return replace(s.maps.Resolvers, want, "resolvers")
}

// setPublished: a service of the box itself may have a socket that is bound to no address.
func (s *state) setPublished(services []Service, own []netip.Addr) error {
	want := make(map[gatewayPublishedKey]uint8, len(services))
	for _, p := range services {
		addresses := []netip.Addr{p.Address}
		if slices.Contains(own, p.Address) {
			addresses = append(addresses, unspecified(p.Address))
		}
		for _, a := range addresses {
			want[gatewayPublishedKey{Address: addressOf(a), Port: bigEndian(p.Port), Protocol: uint8(p.Network)}] = 1
		}
	}
	return replace(s.maps.Published, want, "published services")
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
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

// setSockets gives the programs the listeners. The kernel removes a slot's entry with its socket; a socket that
// is there already is left alone.
func (s *state) setSockets(proxy, dns Sockets) error {
	for slot, conn := range map[gatewaySocketSlot]syscall.Conn{
		gatewaySocketSlotSOCKET_PROXY_TCP4: proxy.TCP4,
		gatewaySocketSlotSOCKET_PROXY_TCP6: proxy.TCP6,
		gatewaySocketSlotSOCKET_PROXY_UDP4: proxy.UDP4,
		gatewaySocketSlotSOCKET_PROXY_UDP6: proxy.UDP6,
		gatewaySocketSlotSOCKET_DNS_TCP4:   dns.TCP4,
		gatewaySocketSlotSOCKET_DNS_TCP6:   dns.TCP6,
		gatewaySocketSlotSOCKET_DNS_UDP4:   dns.UDP4,
		gatewaySocketSlotSOCKET_DNS_UDP6:   dns.UDP6,
	} {
		if conn == nil {
			continue
		}
		raw, err := conn.SyscallConn()
		if err != nil {
			return fmt.Errorf("listening socket: %w", err)
		}
		var put error
		err = raw.Control(func(fd uintptr) { put = s.setSocket(uint32(slot), int(fd)) })
		if err = errors.Join(err, put); err != nil {
			return fmt.Errorf("handing the listening socket to the kernel: %w", err)
		}
	}
	return nil
}

func (s *state) setSocket(slot uint32, fd int) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return err
	}
	var there uint64
	if s.maps.Sockets.Lookup(slot, &there) == nil && there == cookie {
		return nil
	}
	return s.maps.Sockets.Put(slot, uint64(fd))
}

// repin puts back the pins that somebody removed: a successor would start without what it held.
func (s *state) repin() (added []string, err error) {
	for name, m := range s.maps.shared() {
		path := filepath.Join(s.mapDir(), name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := os.MkdirAll(s.mapDir(), 0o700); err != nil {
			return added, err
		}
		m.Unpin() // forgets the path that is gone
		if err := m.Pin(path); err != nil {
			return added, fmt.Errorf("pinning the map %s: %w", name, err)
		}
		added = append(added, "the pin of the map "+name)
	}
	return added, nil
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
