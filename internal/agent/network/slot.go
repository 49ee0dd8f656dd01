package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
)

// Slot is a namespace with a TAP, held by one VM.
type Slot struct {
	Index     int
	NetnsPath string // e.g. /run/netns/wrenn-x-3
	TAP       string
	UID       int // the VMM's, owner of the TAP

	dns *forwarder
}

func netnsPrefix(name string) string { return "wrenn-" + name + "-" }
func netnsPath(name string, index int) string {
	return filepath.Join(netnsDir, netnsPrefix(name)+strconv.Itoa(index))
}
func linkPrefix(name string) string          { return "w" + name + "-" }
func linkName(name string, index int) string { return linkPrefix(name) + strconv.Itoa(index) }

// make makes a slot's namespace and all that is in it; what a failed one made is removed again.
func (p *Pool) make(ctx context.Context, index int) (*Slot, error) {
	s := &Slot{Index: index, NetnsPath: netnsPath(p.opts.Name, index), TAP: tapName, UID: p.opts.BaseUID + index}
	err := p.makeNetns(ctx, s)
	if err == nil {
		err = p.serveNames(s)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make network slot %d: %w", index, err), p.remove(s))
	}
	return s, nil
}

func (p *Pool) makeNetns(ctx context.Context, s *Slot) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(s.NetnsPath, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := newNetns(s.NetnsPath, func() error { return makeTAP(s) }); err != nil {
		return err
	}
	if p.opts.Egress == EgressInternet {
		if err := p.makeUplink(s); err != nil {
			return err
		}
	}
	return netns.Do(s.NetnsPath, func() error { return applyRules(ctx, renderSlotRules(p.opts.Egress == EgressInternet)) })
}

// newNetns makes a namespace, bound to path, and calls fn in it, on a thread that ends afterwards.
func newNetns(path string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("new namespace: %w", err)
			return
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			done <- fmt.Errorf("bind namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// makeTAP prepares the guest's side of the namespace that the thread is in.
func makeTAP(s *Slot) error {
	for _, which := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6 is as good
			return err
		}
	}
	if err := persistentTAP(s.TAP, s.UID); err != nil {
		return fmt.Errorf("make %s: %w", s.TAP, err)
	}
	tap, err := netlink.LinkByName(s.TAP)
	if err != nil {
		return err
	}
	mac, err := net.ParseMAC(gatewayMAC)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetHardwareAddr(tap, mac); err != nil {
		return fmt.Errorf("address of %s: %w", s.TAP, err)
	}
	if err := configure(tap, netip.PrefixFrom(netip.MustParseAddr(GatewayIP), GuestPrefix)); err != nil {
		return err
	}
	return guestNeighbour(tap)
}

// guestNeighbour tells the guest's MAC once and for all: no packet to a guest waits for an ARP answer, and
// none of an earlier question is believed.
func guestNeighbour(tap netlink.Link) error {
	mac, err := net.ParseMAC(GuestMAC)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{
		LinkIndex: tap.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(GuestIP), HardwareAddr: mac,
	})
}

// persistentTAP makes a TAP that stays without a process, and that only uid may attach to.
func persistentTAP(name string, uid int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid); err != nil {
		return err
	}
	return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
}

func configure(link netlink.Link, prefix netip.Prefix) error {
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), 32)}}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

// check tells whether the slot's namespace is there and has its TAP.
func (s *Slot) check() (uplink bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.NetnsPath, &st); err != nil {
		return false, err
	}
	if st.Type != unix.NSFS_MAGIC {
		return false, fs.ErrNotExist // made, but its namespace was not bound before the agent died
	}
	err = netns.Do(s.NetnsPath, func() error {
		if _, err := netlink.LinkByName(s.TAP); err != nil {
			return err
		}
		_, err := netlink.LinkByName(uplinkName)
		uplink = err == nil
		return nil
	})
	return uplink, err
}

// remove removes the slot from the host. What is not there is success.
func (p *Pool) remove(s *Slot) error {
	if s.dns != nil {
		s.dns.close()
	}
	return errors.Join(removeLink(p.opts.hostNetns, linkName(p.opts.Name, s.Index)), removeNetns(s.NetnsPath))
}

func removeLink(hostNetns, name string) error {
	return netns.Do(hostNetns, func() error {
		link, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove %s: %w", name, err)
		}
		return nil
	})
}

func removeNetns(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// onHost lists the indexes of the slots of an instance that have a namespace on this host.
func onHost(name string) ([]int, error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var indexes []int
	for _, e := range entries {
		if i, ok := indexOf(e.Name(), netnsPrefix(name)); ok {
			indexes = append(indexes, i)
		}
	}
	return indexes, nil
}

// indexOf is the index in a name of ours; another instance's name does not have the prefix, because a
// name has no dash in it.
func indexOf(name, prefix string) (int, bool) {
	digits, ok := strings.CutPrefix(name, prefix)
	i, err := strconv.Atoi(digits)
	return i, ok && err == nil && i >= 0 && strconv.Itoa(i) == digits
}
