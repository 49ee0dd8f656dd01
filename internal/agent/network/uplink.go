package network

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// An instance with egress takes one range for its veth pairs, two addresses for each slot. Which one is
// written below /run, so that it lives exactly as long as the namespaces do, and instances see each
// other's.
const (
	rangeBits = 18 // 2 addresses for each of maxSlots
	rangeFile = "/run/wrenn-network-"
	rangeLock = "/run/wrenn-network.lock"
)

// slotAddresses are the host's and the namespace's end of slot i's pair, a /31 (RFC 3021).
func slotAddresses(addresses netip.Prefix, i int) (host, slot netip.Prefix) {
	b := addresses.Masked().Addr().As4()
	n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	at := func(n uint32) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}), 31)
	}
	return at(n + uint32(2*i)), at(n + uint32(2*i) + 1)
}

// pickRange chooses a range that overlaps none of the taken ones. Where it begins to look depends on the
// name, so that hosts and instances rarely share one.
func pickRange(name string, taken []netip.Prefix) (netip.Prefix, error) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	const candidates = 256 * (1 << (rangeBits - 16)) // all of 10.0.0.0/8
	for i := range uint32(candidates) {
		n := (h.Sum32() + i) % candidates
		c := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> (rangeBits - 16)), byte(n << (24 - rangeBits)), 0}), rangeBits)
		free := true
		for _, t := range taken {
			free = free && !c.Overlaps(t)
		}
		if free {
			return c, nil
		}
	}
	return netip.Prefix{}, wrenn.Errorf(wrenn.KindInternal, "the host's routes take all of 10.0.0.0/8; set AGENT_EGRESS=none")
}

// ensureRange returns the instance's range, choosing one if it has none.
func ensureRange(opts Options) (netip.Prefix, error) {
	lock, err := os.OpenFile(rangeLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return netip.Prefix{}, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return netip.Prefix{}, err
	}
	if b, err := os.ReadFile(rangeFile + opts.Name); err == nil {
		if p, err := netip.ParsePrefix(strings.TrimSpace(string(b))); err == nil && p.Bits() == rangeBits {
			return p, nil
		}
	}
	taken, err := takenRanges(opts.hostNetns)
	if err != nil {
		return netip.Prefix{}, err
	}
	p, err := pickRange(opts.Name, taken)
	if err != nil {
		return netip.Prefix{}, err
	}
	return p, os.WriteFile(rangeFile+opts.Name, []byte(p.String()+"\n"), 0o600)
}

// takenRanges are the ranges that the host has routes to, in any table, and those of other instances.
func takenRanges(hostNetns string) ([]netip.Prefix, error) {
	var taken []netip.Prefix
	files, err := filepath.Glob(rangeFile + "*")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			if p, err := netip.ParsePrefix(strings.TrimSpace(string(b))); err == nil {
				taken = append(taken, p)
			}
		}
	}
	err = netns.Do(hostNetns, func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			ip, ok := netip.AddrFromSlice(r.Dst.IP.To4())
			ones, _ := r.Dst.Mask.Size()
			if ok && ones > 0 { // the default route leads everywhere
				taken = append(taken, netip.PrefixFrom(ip, ones))
			}
		}
		return err
	})
	return taken, err
}

// ensureHost makes the host forward the guests' packets, and filter them.
func (p *Pool) ensureHost(apply func(rules string) error) error {
	var err error
	if p.addresses, err = ensureRange(p.opts); err != nil {
		return err
	}
	return netns.Do(p.opts.hostNetns, func() error {
		// The filter comes first: nothing is forwarded unfiltered, not even for a moment.
		if err := apply(renderHostRules(p.opts.Name, p.addresses)); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	})
}

// makeUplink joins a slot's namespace to the host.
func (p *Pool) makeUplink(s *Slot) error {
	host, slot := slotAddresses(p.addresses, s.Index)
	ns, err := os.Open(s.NetnsPath)
	if err != nil {
		return err
	}
	defer ns.Close()
	name := linkName(p.opts.Name, s.Index)
	err = netns.Do(p.opts.hostNetns, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: uplinkName, PeerNamespace: netlink.NsFd(ns.Fd())}
		veth.Name = name
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
		if err := noIPv6(name); err != nil {
			return err
		}
		return configure(veth, host)
	})
	if err != nil {
		return err
	}
	return netns.Do(s.NetnsPath, func() error {
		link, err := netlink.LinkByName(uplinkName)
		if err != nil {
			return err
		}
		if err := configure(link, slot); err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IP(host.Addr().AsSlice())})
	})
}

func noIPv6(link string) error {
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+link+"/disable_ipv6", []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
