//go:build linux

package network

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"pgregory.net/rapid"
)

func TestRangesNeverOverlapWhatIsTaken(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var taken []netip.Prefix
		for range rapid.IntRange(0, 20).Draw(t, "routes") {
			addr := netip.AddrFrom4([4]byte{10, rapid.Byte().Draw(t, "b"), rapid.Byte().Draw(t, "c"), 0})
			taken = append(taken, netip.PrefixFrom(addr, rapid.IntRange(9, 32).Draw(t, "bits")).Masked())
		}
		got, err := pickRange(rapid.StringMatching(`[a-z0-9]{1,8}`).Draw(t, "name"), taken)
		if err != nil {
			whole := netip.MustParsePrefix("10.0.0.0/8")
			for _, p := range taken {
				if p.Bits() < rangeBits {
					return // large routes may well take all of it
				}
			}
			t.Fatalf("no range although the routes are small parts of %s: %v", whole, err)
		}
		if got.Bits() != rangeBits || got != got.Masked() {
			t.Fatalf("picked %s", got)
		}
		for _, p := range taken {
			if got.Overlaps(p) {
				t.Fatalf("picked %s, which overlaps %s", got, p)
			}
		}
	})
	if _, err := pickRange("x", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); err == nil {
		t.Error("picked a range where all are taken")
	}
}

func TestSlotsHaveAddressesOfTheirOwn(t *testing.T) {
	t.Parallel()
	addresses := netip.MustParsePrefix("10.200.64.0/18")
	seen := map[netip.Addr]bool{}
	for i := range maxSlots {
		host, slot := slotAddresses(addresses, i)
		for _, p := range []netip.Prefix{host, slot} {
			if seen[p.Addr()] || !addresses.Contains(p.Addr()) || p.Bits() != 31 {
				t.Fatalf("slot %d has %s", i, p)
			}
			seen[p.Addr()] = true
		}
		if host.Masked() != slot.Masked() {
			t.Fatalf("slot %d: %s and %s are no pair", i, host, slot)
		}
	}
}

func TestRulesWithoutEgressForwardNothing(t *testing.T) {
	t.Parallel()
	closed, open := renderSlotRules(false), renderSlotRules(true)
	for _, word := range []string{"masquerade", "dport 53", uplinkName} {
		if strings.Contains(closed, word) || !strings.Contains(open, word) {
			t.Errorf("%q must be in the rules with egress, and only there", word)
		}
	}
	for _, r := range []string{closed, open} {
		if strings.Count(r, "policy drop") != 3 {
			t.Errorf("input, output and forward must drop by default:\n%s", r)
		}
	}
	for _, must := range []string{"10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", "127.0.0.0/8"} {
		if !strings.Contains(open, must) || !strings.Contains(renderHostRules("x", netip.MustParsePrefix("10.0.0.0/18")), must) {
			t.Errorf("%s is not closed on both sides", must)
		}
	}
}

func TestResolvConf(t *testing.T) {
	t.Parallel()
	got := parseResolvConf("# nameserver 9.9.9.9\nnameserver 127.0.0.53\n nameserver\tfe80::1%eth0 # comment\nsearch x\nnameserver nonsense\nnameserver ::1\nnameserver 1.2.3.4\n")
	if want := "127.0.0.53:53 [fe80::1%eth0]:53 [::1]:53"; strings.Join(got, " ") != want {
		t.Errorf("%v, want %s", got, want)
	}
}

func TestNamesOfOthersAreNotOurs(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"wrenn-a-0": true, "wrenn-a-12": true, "wrenn-a1-0": false, "wrenn-a-": false, "wrenn-a-x": false, "wrenn-a-01": false, "wrenn-a--1": false, "other": false,
	} {
		if _, ok := indexOf(name, netnsPrefix("a")); ok != want {
			t.Errorf("%s: %v, want %v", name, ok, want)
		}
	}
}

// question packs an ordinary question for A records.
func question(t testing.TB, id uint16, name string) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func startForwarder(t *testing.T, resolvers ...string) string {
	t.Helper()
	f, err := newForwarder("", "127.0.0.1:0", func() []string { return resolvers }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	return f.udp.LocalAddr().String()
}

func askUDP(t *testing.T, addr string, query []byte) dnsmessage.Message {
	t.Helper()
	conn, err := net.Dial("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(query); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf[:n]); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestForwarderGoesOnToTheNextResolver(t *testing.T) {
	t.Parallel()
	dead, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}) // bound, and then closed: refuses
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	addr := startForwarder(t, dead.LocalAddr().String(), newUpstream(t, "11.22.33.44"))
	m := askUDP(t, addr, question(t, 4711, "example.test."))
	if m.ID != 4711 || m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 1 {
		t.Errorf("%+v", m)
	}
}

func TestForwarderSaysWhenNobodyAnswers(t *testing.T) {
	t.Parallel()
	m := askUDP(t, startForwarder(t), question(t, 4712, "example.test."))
	if m.ID != 4712 || m.RCode != dnsmessage.RCodeServerFailure || len(m.Questions) != 1 {
		t.Errorf("%+v", m)
	}
}

func TestForwarderBelievesNoForgedAnswer(t *testing.T) {
	t.Parallel()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 4096)
		n, from, err := udp.ReadFrom(buf)
		if err != nil {
			return
		}
		forged := answerA(t, buf[:n], "66.66.66.66")
		forged[0] ^= 0xff // another id
		_, _ = udp.WriteTo(forged, from)
		_, _ = udp.WriteTo(buf[:n], from) // a question is no answer
		_, _ = udp.WriteTo(answerA(t, buf[:n], "11.22.33.44"), from)
	})
	t.Cleanup(func() { udp.Close(); wg.Wait() })
	m := askUDP(t, startForwarder(t, udp.LocalAddr().String()), question(t, 1, "example.test."))
	if len(m.Answers) != 1 || m.Answers[0].Body.(*dnsmessage.AResource).A != [4]byte{11, 22, 33, 44} {
		t.Errorf("%+v", m)
	}
}

func TestForwarderDropsWhatIsNoQuestion(t *testing.T) {
	t.Parallel()
	query := question(t, 1, "example.test.")
	answer := bytes.Clone(query)
	answer[2] |= 0x80
	update := bytes.Clone(query)
	update[2] |= 5 << 3
	many := bytes.Clone(query)
	many[5] = 2
	for name, b := range map[string][]byte{"answer": answer, "update": update, "two questions": many, "short": query[:11], "nothing": nil} {
		if valid(b) {
			t.Errorf("%s is taken for a question", name)
		}
	}
	if !valid(query) {
		t.Error("a question is not")
	}
}

func TestForwarderOverTCPBoundsItsPeers(t *testing.T) {
	t.Parallel()
	addr := startForwarder(t, newUpstream(t, "11.22.33.44"))
	conn, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	for id := range uint16(3) { // several on one connection
		if err := writeFramed(conn, question(t, id, "example.test.")); err != nil {
			t.Fatal(err)
		}
		b, err := readFramed(conn, 4096)
		if err != nil || len(b) < dnsHeaderSize || b[1] != byte(id) {
			t.Fatalf("answer %x, %v", b, err)
		}
	}
	if _, err := conn.Write([]byte{0xff, 0xff}); err != nil { // a question of 64 KiB
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after a question that is too long: %v", err)
	}
}

func FuzzQuestion(f *testing.F) {
	f.Add(question(f, 7, "example.test."))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if !valid(b) {
			return
		}
		var m dnsmessage.Message
		answer := failure(b)
		if err := m.Unpack(answer); err != nil || !m.Response || m.RCode != dnsmessage.RCodeServerFailure {
			t.Errorf("the refusal of %x is %x: %v", b, answer, err)
		}
	})
}
