//go:build linux

package network

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func TestAcquireMakesASlotThatOnlyTheAgentCanReach(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open(t, Options{Slots: 4, Warm: 1, BaseUID: 700100})
	s := acquire(t, p)
	if s.TAP != "tap0" || s.UID != 700100+s.Index || s.NetnsPath != netnsPath(p.opts.Name, s.Index) {
		t.Errorf("slot is %+v", s)
	}
	g := h.guest(t, s)
	g.listen(t, ":7")
	conn, err := s.DialContext(t.Context(), "tcp", net.JoinHostPort(GuestIP, "7"))
	if err != nil {
		t.Fatalf("the agent cannot reach the guest: %v", err)
	}
	if got := greeting(t, conn); got != "guest" {
		t.Errorf("the guest said %q", got)
	}
	// A server of the agent's side, on the gateway's address, is closed to the guest.
	var gateway net.Listener
	must(t, netns.Do(s.NetnsPath, func() (err error) { gateway, err = net.Listen("tcp4", GatewayIP+":8080"); return err }))
	defer gateway.Close()
	g.cannotReach(t, GatewayIP+":8080", "11.22.33.44:80", "10.1.2.3:80", "169.254.169.254:80")
	must(t, netns.Do(s.NetnsPath, func() error {
		links, err := netlink.LinkList()
		if len(links) != 2 {
			t.Errorf("the namespace has %d links besides lo and the TAP", len(links)-2)
		}
		return err
	}))
}

func TestDialEndsWithItsContextAndAtAClosedPort(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	s := acquire(t, h.open(t, Options{Slots: 1}))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.DialContext(ctx, "tcp", GuestIP+":7"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialing a guest that is not there: %v", err)
	}
	h.guest(t, s)
	if _, err := s.DialContext(t.Context(), "tcp", GuestIP+":7"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dialing a closed port: %v", err)
	}
	for _, bad := range []string{"guest:7", GuestIP, "[::1]:7"} {
		if _, err := s.DialContext(t.Context(), "tcp", bad); err == nil {
			t.Errorf("dialing %q succeeded", bad)
		}
	}
}

func TestEgressReachesPublicAddressesAndNothingElse(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open(t, Options{Slots: 4, Warm: 2, Egress: EgressInternet})
	s, other := acquire(t, p), acquire(t, p)
	g := h.guest(t, s)
	h.guest(t, other).listen(t, ":80")
	hostEnd, slotEnd := slotAddresses(p.addresses, other.Index)
	ownEnd, _ := slotAddresses(p.addresses, s.Index)
	for _, addr := range h.private {
		if err := h.dial(addr); err != nil {
			t.Fatalf("the test proves nothing: the host itself cannot reach %s: %v", addr, err)
		}
	}
	for _, public := range []string{"11.22.33.44:80", "11.0.0.1:80"} {
		if err := g.dial(public); err != nil {
			t.Errorf("the guest cannot reach %s: %v", public, err)
		}
	}
	g.cannotReach(t, h.private...)
	g.cannotReach(t, "11.0.0.2:80", GatewayIP+":80",
		hostEnd.Addr().String()+":80", ownEnd.Addr().String()+":80", slotEnd.Addr().String()+":80")
	// Nothing comes in from outside either.
	route := netlink.Route{Dst: ipNet(p.addresses), Gw: net.ParseIP("11.0.0.2")}
	must(t, netns.Do(h.outside, func() error { return netlink.RouteAdd(&route) }))
	if err := dialFrom(h.outside, slotEnd.Addr().String()+":80", shortly); err == nil {
		t.Error("the outside can reach a slot")
	}
}

func TestGuestCannotForgeItsAddress(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open(t, Options{Slots: 2, Egress: EgressInternet})
	s := acquire(t, p)
	g := h.guest(t, s)
	forged := netip.MustParsePrefix("11.9.9.9/32")
	must(t, netns.Do(g.netns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(forged)})
	}))
	var err error
	_ = netns.Do(g.netns, func() error {
		d := net.Dialer{Timeout: 200 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: forged.Addr().AsSlice()}}
		var conn net.Conn
		if conn, err = d.Dial("tcp", "11.22.33.44:80"); err == nil {
			conn.Close()
		}
		return nil
	})
	if err == nil {
		t.Error("a packet with a forged source address came back answered")
	}
}

func TestVMMInItsNamespaceReachesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	s := acquire(t, h.open(t, Options{Slots: 2, Egress: EgressInternet}))
	h.guest(t, s).listen(t, ":7")
	if err := dialFrom(s.NetnsPath, "11.22.33.44:80", shortly); err == nil {
		t.Error("a process in the namespace, outside of the guest, reached the internet")
	}
}

func TestNamesAreResolvedByTheHostsResolvers(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	upstream := newUpstream(t, "11.22.33.44")
	p := h.open(t, Options{Slots: 2, Egress: EgressInternet, resolvers: func() []string { return []string{upstream} }})
	g := h.guest(t, acquire(t, p))
	for _, network := range []string{"udp", "tcp"} {
		got, err := g.lookup(network, "example.test")
		if err != nil || got != "11.22.33.44" {
			t.Errorf("over %s: %q, %v", network, got, err)
		}
	}
}

func TestReleaseRemovesTheSlotAndItsIndexIsUsedAgain(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open(t, Options{Slots: 1, Egress: EgressInternet})
	s := acquire(t, p)
	if _, err := p.Acquire(t.Context()); wrenn.KindOf(err) != wrenn.KindNoCapacity {
		t.Errorf("a second slot of one: %v", err)
	}
	p.Release(s)
	p.Release(s) // harmless
	again := acquire(t, p)
	p.Release(again)
	p.Close() // waits for the removal
	if left := h.objects(t, p.opts.Name); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestNextAgentAdoptsHeldSlotsAndSweepsTheRest(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	opts := Options{Name: h.name, Slots: 4, Egress: EgressInternet}
	first := h.open(t, opts)
	kept, lost := acquire(t, first), acquire(t, first)
	g := h.guest(t, kept)
	g.listen(t, ":7")
	first.Close() // an agent that is killed leaves at least as much

	second := h.open(t, opts)
	adopted, err := second.Adopt(kept.Index)
	if err != nil {
		t.Fatal(err)
	}
	if adopted.UID != kept.UID || adopted.NetnsPath != kept.NetnsPath {
		t.Errorf("adopted %+v, was %+v", adopted, kept)
	}
	if _, err := second.Adopt(kept.Index); wrenn.KindOf(err) != wrenn.KindInUse {
		t.Errorf("adopting twice: %v", err)
	}
	if _, err := second.Adopt(3000); wrenn.KindOf(err) != wrenn.KindNotFound {
		t.Errorf("adopting what is not there: %v", err)
	}
	fresh := acquire(t, second)
	if fresh.Index == kept.Index || fresh.Index == lost.Index {
		t.Errorf("slot %d was handed out while it may be in use", fresh.Index)
	}
	must(t, second.Sweep(t.Context()))
	if _, err := os.Stat(lost.NetnsPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leftover namespace is still there: %v", err)
	}
	conn, err := adopted.DialContext(t.Context(), "tcp", GuestIP+":7")
	if err != nil {
		t.Fatalf("the adopted guest is out of reach: %v", err)
	}
	conn.Close()
	if err := g.dial("11.22.33.44:80"); err != nil {
		t.Errorf("the adopted guest has no egress: %v", err)
	}
}

func TestEgressTurnedOffHoldsForAdoptedSlots(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	first := h.open(t, Options{Name: h.name, Slots: 2, Egress: EgressInternet})
	s := acquire(t, first)
	g := h.guest(t, s)
	if err := g.dial("11.22.33.44:80"); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second := h.open(t, Options{Name: h.name, Slots: 2, Egress: EgressNone})
	if _, err := second.Adopt(s.Index); err != nil {
		t.Fatal(err)
	}
	must(t, second.Sweep(t.Context()))
	g.cannotReach(t, "11.22.33.44:80")
}

func TestInstancesDoNotDisturbEachOther(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	a := h.open(t, Options{Name: h.name, Slots: 2, Egress: EgressInternet})
	b := h.open(t, Options{Name: h.name + "1", Slots: 2, Egress: EgressInternet})
	if a.addresses.Overlaps(b.addresses) {
		t.Errorf("both use %s and %s", a.addresses, b.addresses)
	}
	g := h.guest(t, acquire(t, a))
	s := acquire(t, b)
	must(t, a.Sweep(t.Context()))
	b.Release(s)
	b.Close()
	must(t, removeAll(t.Context(), b.opts))
	if err := g.dial("11.22.33.44:80"); err != nil {
		t.Errorf("removing one instance cut off the other: %v", err)
	}
}

func TestManyAcquireAtOnceGetDifferentSlots(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open(t, Options{Slots: 12, Warm: 3})
	var mu sync.Mutex
	seen := map[int]bool{}
	var wg sync.WaitGroup
	begun := time.Now()
	for range 12 {
		wg.Go(func() {
			s, err := p.Acquire(t.Context())
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[s.Index] {
				t.Errorf("slot %v, %v", s, err)
				return
			}
			seen[s.Index] = true
		})
	}
	wg.Wait()
	t.Logf("12 slots at once in %s", time.Since(begun))
}

func TestOpenRefusesBadOptions(t *testing.T) {
	t.Parallel()
	for _, o := range []Options{
		{Name: "", Slots: 1}, {Name: "much-too-long", Slots: 1}, {Name: "A", Slots: 1}, {Name: "a/b", Slots: 1},
		{Name: "a", Slots: 0}, {Name: "a", Slots: maxSlots + 1}, {Name: "a", Slots: 1, Warm: 2}, {Name: "a", Slots: 1, Egress: "some"},
	} {
		if p, err := Open(t.Context(), o); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
			t.Errorf("%+v: %v", o, err)
			if err == nil {
				p.Close()
			}
		}
	}
}

func greeting(t *testing.T, conn net.Conn) string {
	t.Helper()
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
