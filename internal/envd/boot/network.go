package boot

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// configureNetwork brings up lo, and eth0 as the command line says:
// wrenn.addr=ADDRESS/PREFIX wrenn.gw=ADDRESS wrenn.dns=ADDRESS[,ADDRESS…]
func configureNetwork(cmdline map[string]string) error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	var servers []netip.Addr
	for _, s := range strings.Split(cmdline["wrenn.dns"], ",") {
		if addr, perr := netip.ParseAddr(s); perr == nil {
			servers = append(servers, addr)
		}
	}
	return errors.Join(err, setResolvers(servers), configureEth0(cmdline["wrenn.addr"], cmdline["wrenn.gw"]))
}

func configureEth0(address, gateway string) error {
	if address == "" {
		return nil
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("eth0: %w", err)
	}
	// The guest's network is IPv4 only: no address that nobody gave, no router solicitations.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("switch IPv6 off: %w", err)
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("wrenn.addr: %w", err)
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("set %s: %w", address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up eth0: %w", err)
	}
	gw := net.ParseIP(gateway)
	if gw == nil {
		return nil
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw})
}

// setResolvers writes resolv.conf. Without a server no name is asked of anybody: lookups fail at once.
func setResolvers(servers []netip.Addr) error {
	var b strings.Builder
	b.WriteString("# Written by the guest's init from what the host says.\n")
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return replaceFile("/etc/resolv.conf", b.String(), 0o644)
}

// replaceFile writes a file of the system in one step. A link that an image left there is replaced, not
// followed.
func replaceFile(path, content string, mode os.FileMode) error {
	tmp := path + ".wrenn"
	if err := os.WriteFile(tmp, []byte(content), mode); err != nil {
		return err
	}
	if err := os.Chmod(tmp, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
