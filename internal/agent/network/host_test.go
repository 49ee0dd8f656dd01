//go:build linux

package network

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
)

// host is a make-believe machine: a namespace that takes the part of the host, and one behind it that is
// the rest of the world, with public, private and link-local addresses that all answer.
type host struct {
	name           string // for one instance, unique on the machine
	netns, outside string
	private        []string // addresses of the world that guests must not reach
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft: install the package nftables")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	var random [3]byte
	_, _ = rand.Read(random[:])
	h := &host{name: fmt.Sprintf("t%x", random)}
	h.netns, h.outside = h.namespace(t, "host"), h.namespace(t, "world")
	h.connect(t)
	var world []string
	for _, ip := range []string{"10.1.2.3", "192.168.7.7", "172.20.1.1", "169.254.169.254", "100.64.1.1", "127.9.9.9", "198.18.1.1"} {
		if ip != "127.9.9.9" { // routed nowhere by the host itself
			h.private = append(h.private, ip+":80")
		}
		world = append(world, ip)
	}
	must(t, netns.Do(h.outside, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, ip := range append(world, "11.22.33.44") {
			if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(ip + "/32"))}); err != nil {
				return err
			}
		}
		return nil
	}))
	serve(t, h.outside, ":80", "world")
	serve(t, h.netns, ":80", "host")
	return h
}

// namespace makes a namespace with lo up.
func (h *host) namespace(t *testing.T, what string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), what)
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, newNetns(path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	t.Cleanup(func() { must(t, unix.Unmount(path, unix.MNT_DETACH)) })
	return path
}

// connect joins host and world by a veth pair, 11.0.0.2 and 11.0.0.1; the world knows no way to guests.
func (h *host) connect(t *testing.T) {
	t.Helper()
	world, err := os.Open(h.outside)
	must(t, err)
	defer world.Close()
	must(t, netns.Do(h.netns, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "wan", PeerNamespace: netlink.NsFd(world.Fd())}
		veth.Name = "wan"
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configure(veth, netip.MustParsePrefix("11.0.0.2/30"))
	}))
	must(t, netns.Do(h.outside, func() error {
		wan, err := netlink.LinkByName("wan")
		if err != nil {
			return err
		}
		return configure(wan, netip.MustParsePrefix("11.0.0.1/30"))
	}))
	must(t, netns.Do(h.netns, func() error { return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("11.0.0.1")}) }))
}

// open opens a pool on this host, and sees to it that nothing of it is left after the test.
func (h *host) open(t *testing.T, opts Options) *Pool {
	t.Helper()
	opts.hostNetns = h.netns
	if opts.Name == "" {
		opts.Name = h.name
	}
	p, err := Open(t.Context(), opts)
	must(t, err)
	t.Cleanup(func() {
		p.Close()
		must(t, removeAll(context.Background(), p.opts))
		if left := h.objects(t, opts.Name); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	})
	return p
}

// objects lists what an instance has on the host, without its table and range, which stay with egress.
func (h *host) objects(t *testing.T, name string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(netnsDir, netnsPrefix(name)+"*"))
	must(t, err)
	must(t, netns.Do(h.netns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, linkPrefix(name)) {
				found = append(found, l.Attrs().Name)
			}
		}
		return err
	}))
	return found
}

func (h *host) dial(addr string) error { return dialFrom(h.netns, addr, patience) }

func acquire(t *testing.T, p *Pool) *Slot {
	t.Helper()
	begun := time.Now()
	s, err := p.Acquire(t.Context())
	must(t, err)
	t.Logf("slot %d in %s", s.Index, time.Since(begun))
	return s
}

// guest is a make-believe VM: a namespace whose eth0 is joined, frame by frame, to a slot's TAP.
type guest struct {
	netns string
}

func (h *host) guest(t *testing.T, s *Slot) *guest {
	t.Helper()
	g := &guest{netns: h.namespace(t, fmt.Sprintf("guest%d", s.Index))}
	inside := attach(t, g.netns, "eth0")
	outside := attach(t, s.NetnsPath, s.TAP)
	must(t, netns.Do(g.netns, func() error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(GuestMAC)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(eth, mac); err != nil {
			return err
		}
		if err := configure(eth, netip.MustParsePrefix(fmt.Sprintf("%s/%d", GuestIP, GuestPrefix))); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(GatewayIP)})
	}))
	var wg sync.WaitGroup
	for _, pair := range [][2]*os.File{{inside, outside}, {outside, inside}} {
		wg.Go(func() {
			buf := make([]byte, 1<<17)
			for {
				n, err := pair[0].Read(buf)
				if err != nil {
					return
				}
				_, _ = pair[1].Write(buf[:n])
			}
		})
	}
	t.Cleanup(func() { inside.Close(); outside.Close(); wg.Wait() })
	return g
}

func attach(t *testing.T, path, tap string) *os.File {
	t.Helper()
	var f *os.File
	must(t, netns.Do(path, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(tap)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), tap) // only now: the poller wants an attached queue
		return nil
	}))
	return f
}

func (g *guest) listen(t *testing.T, addr string) { t.Helper(); serve(t, g.netns, addr, "guest") }
func (g *guest) dial(addr string) error           { return dialFrom(g.netns, addr, patience) }

// cannotReach dials all addresses at once: a dropped packet shows only by its time limit.
func (g *guest) cannotReach(t *testing.T, addrs ...string) {
	t.Helper()
	var wg sync.WaitGroup
	for _, addr := range addrs {
		wg.Go(func() {
			if err := dialFrom(g.netns, addr, shortly); err == nil {
				t.Errorf("the guest can reach %s", addr)
			}
		})
	}
	wg.Wait()
}

func (g *guest) lookup(network, name string) (string, error) {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		err = netns.Do(g.netns, func() (err error) {
			conn, err = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, network, GatewayIP+":53")
			return err
		})
		return conn, err
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ips, err := r.LookupNetIP(ctx, "ip4", name)
	if err != nil || len(ips) != 1 {
		return "", fmt.Errorf("%v: %w", ips, err)
	}
	return ips[0].String(), nil
}

// What shall be reached gets the time for a lost packet to be sent again; what shall not is dropped, and
// shows only by the end of the wait.
const (
	patience = 10 * time.Second
	shortly  = 300 * time.Millisecond
)

func dialFrom(path, addr string, limit time.Duration) error {
	return netns.Do(path, func() error {
		conn, err := net.DialTimeout("tcp4", addr, limit)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// serve greets everybody who connects to addr in a namespace.
func serve(t *testing.T, path, addr, greeting string) {
	t.Helper()
	var ln net.Listener
	must(t, netns.Do(path, func() (err error) { ln, err = net.Listen("tcp4", addr); return err }))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, greeting)
			conn.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
}

// newUpstream is a DNS server on the loopback that answers every A question with one address.
func newUpstream(t *testing.T, address string) string {
	t.Helper()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	tcp, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: udp.LocalAddr().(*net.UDPAddr).Port})
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(answerA(t, buf[:n], address), from)
		}
	})
	wg.Go(func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			if q, err := readFramed(conn, 4096); err == nil {
				_ = writeFramed(conn, answerA(t, q, address))
			}
			conn.Close()
		}
	})
	t.Cleanup(func() { udp.Close(); tcp.Close(); wg.Wait() })
	return udp.LocalAddr().String()
}

func answerA(t *testing.T, query []byte, address string) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		t.Errorf("the resolver was asked nonsense: %v", err)
		return nil
	}
	m.Response, m.Additionals = true, nil
	q := m.Questions[0]
	if q.Type == dnsmessage.TypeA {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
			Body:   &dnsmessage.AResource{A: netip.MustParseAddr(address).As4()},
		}}
	}
	b, err := m.Pack()
	if err != nil {
		t.Error(err)
	}
	return b
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
