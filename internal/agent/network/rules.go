package network

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"text/template"
	"time"
)

// closedRanges are IPv4 destinations that no guest reaches by egress: everything that is not a public
// unicast address (IANA special-purpose registry), link-local metadata services and CGNAT included.
func closedRanges() []string {
	return []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
		"192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
		"198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	}
}

// maxFlows bounds the connections that one guest may have open through NAT: the host's connection table
// is shared.
const maxFlows = 4096

// slotRules is the whole packet filter of a slot's namespace. Its first line makes it idempotent: the
// table is there, removed and made again in one transaction.
var slotRules = template.Must(template.New("slot").Parse(`table inet wrenn
delete table inet wrenn
table inet wrenn {
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "{{.TAP}}" ip saddr {{.Guest}} jump guest
	}
	chain guest {
		ct state established,related accept
		ip daddr {{.Gateway}} icmp type echo-request limit rate 50/second accept
{{- if .Egress}}
		ip daddr {{.Gateway}} udp dport 53 accept
		ip daddr {{.Gateway}} tcp dport 53 accept
{{- end}}
	}
	chain output {
		type filter hook output priority filter; policy drop;
		ct state established,related accept
		oifname "{{.TAP}}" meta skuid 0 accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
{{- if .Egress}}
		iifname "{{.Uplink}}" oifname "{{.TAP}}" ct state established,related accept
		iifname "{{.TAP}}" oifname "{{.Uplink}}" ip saddr {{.Guest}} jump outgoing
{{- end}}
	}
{{- if .Egress}}
	chain outgoing {
		ip daddr { {{.Closed}} } drop
		ct state invalid drop
		ct state new ct count over {{.Flows}} drop
		accept
	}
	chain nat {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{{.Uplink}}" masquerade
	}
{{- end}}
}
`))

// hostRules is everything that the host filters for an instance: the same for any number of slots. It
// repeats what the slots' own rules say, so that a VMM which broke out into its namespace gets no further
// than its guest.
var hostRules = template.Must(template.New("host").Parse(`table inet {{.Table}}
delete table inet {{.Table}}
table inet {{.Table}} {
	chain input {
		type filter hook input priority filter - 5; policy accept;
		iifname "{{.Links}}*" drop
	}
	chain forward {
		type filter hook forward priority filter - 5; policy accept;
		oifname "{{.Links}}*" ct state established,related accept
		oifname "{{.Links}}*" drop
		iifname "{{.Links}}*" jump outgoing
	}
	chain outgoing {
		ip saddr != {{.Range}} drop
		meta nfproto != ipv4 drop
		ip daddr { {{.Closed}} } drop
		ct state invalid drop
		tcp flags syn tcp option maxseg size set rt mtu
	}
	chain nat {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {{.Range}} oifname != "{{.Links}}*" masquerade
	}
}
`))

func renderSlotRules(egress bool) string {
	return render(slotRules, map[string]any{
		"TAP": tapName, "Uplink": uplinkName, "Guest": GuestIP, "Gateway": GatewayIP,
		"Egress": egress, "Closed": strings.Join(closedRanges(), ", "), "Flows": maxFlows,
	})
}

func renderHostRules(name string, addresses netip.Prefix) string {
	return render(hostRules, map[string]any{
		"Table": hostTable(name), "Links": linkPrefix(name), "Range": addresses.String(),
		"Closed": strings.Join(closedRanges(), ", "),
	})
}

func render(t *template.Template, values map[string]any) string {
	var b strings.Builder
	if err := t.Execute(&b, values); err != nil {
		panic("network: template: " + err.Error()) // constant input: cannot happen after the package's tests
	}
	return b.String()
}

func hostTable(name string) string { return "wrenn_" + name }

const nftTimeout = 15 * time.Second

// applyRules loads a ruleset, whole or not at all, into the namespace of the calling thread.
func applyRules(ctx context.Context, rules string) error {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out[:min(len(out), 500)]))
	}
	return nil
}
