// Package network owns the network of VMs on this host: a pool of pre-made network namespaces, one per
// VM, each with one TAP and its own packet filter, and what joins them to the outside when egress is
// on. It knows slots, not sandboxes: it must not import the agent's core or a hypervisor driver. Every
// object it makes on the host carries the instance's Name, and it touches no other.
//
// # What a guest can reach
//
// Every slot looks the same from inside (GuestIP, GatewayIP, GuestMAC), so a snapshot fits any slot. A
// guest's packets reach its namespace and are dropped there, besides answers to the agent, echo requests
// to the gateway and, when egress is on, the name server on the gateway and public IPv4 addresses.
// Slots' addresses exist only inside their namespaces: the agent dials a guest with Slot.DialContext.
package network

import (
	"log/slog"
	"regexp"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// What every guest sees.
const (
	GuestIP     = "172.31.255.2"
	GatewayIP   = "172.31.255.1"
	GuestPrefix = 30
	GuestMAC    = "02:00:5e:00:00:02"
)

// Values of Options.Egress.
const (
	EgressNone     = "none"     // no link out of the namespace at all
	EgressInternet = "internet" // NAT to public IPv4 addresses, names by a forwarder on the gateway
)

const (
	gatewayMAC     = "02:00:5e:00:00:01"
	tapName        = "tap0"
	uplinkName     = "eth0" // the namespace's end of the veth pair
	netnsDir       = "/run/netns"
	maxSlots       = 8192
	defaultBaseUID = 700000 // above what distributions and systemd hand out by themselves
)

// Options of Open.
type Options struct {
	Name    string // of the instance, [a-z0-9]{1,8}: part of the name of every object on the host
	Slots   int    // most VMs at a time
	Warm    int    // slots to keep made ahead
	Egress  string // EgressNone if empty
	BaseUID int    // slot i's VMM runs as BaseUID+i; 700000 if 0
	Log     *slog.Logger

	// ResolvConf names the file with the resolvers that guests' questions go to; /etc/resolv.conf if empty.
	ResolvConf string

	// Tests give another namespace the part of the host, and other resolvers.
	hostNetns string
	resolvers func() []string
}

var instanceName = regexp.MustCompile(`^[a-z0-9]{1,8}$`)

func (o Options) normal() (Options, error) {
	if !instanceName.MatchString(o.Name) {
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "network instance name %q must be 1 to 8 characters a-z, 0-9", o.Name)
	}
	if o.Slots < 1 || o.Slots > maxSlots {
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "network slots must be 1 to %d, not %d", maxSlots, o.Slots)
	}
	if o.Warm < 0 || o.Warm > o.Slots {
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "warm network slots must be 0 to %d, not %d", o.Slots, o.Warm)
	}
	switch o.Egress {
	case "":
		o.Egress = EgressNone
	case EgressNone, EgressInternet:
	default:
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "AGENT_EGRESS must be none or internet, not %q", o.Egress)
	}
	if o.BaseUID == 0 {
		o.BaseUID = defaultBaseUID
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.resolvers == nil {
		o.resolvers = resolversOf(o.ResolvConf)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}
