package network

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	maxResolvers  = 3 // as libc
	maxResolvConf = 64 << 10
	resolvConfAge = 5 * time.Second // how long a reading of the file holds
)

// resolversOf returns a function that gives the name servers of a resolv.conf, which is read again when
// the last reading is old: hosts change networks.
func resolversOf(path string) func() []string {
	var mu sync.Mutex
	var read time.Time
	var servers []string
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(read) < resolvConfAge {
			return servers
		}
		b, err := os.ReadFile(path)
		if err == nil && len(b) <= maxResolvConf {
			servers = parseResolvConf(string(b))
		}
		read = time.Now()
		return servers
	}
}

// parseResolvConf returns host:port of the nameserver lines (resolv.conf(5)).
func parseResolvConf(text string) []string {
	var servers []string
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil && len(servers) < maxResolvers {
			servers = append(servers, net.JoinHostPort(addr.String(), dnsPort))
		}
	}
	return servers
}
