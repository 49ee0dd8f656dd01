package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/firecracker"
)

// Config is how an agent runs. Every field is an environment variable; see variables.
type Config struct {
	ControlPlane  string
	TokenFile     string
	Listen        string
	Kernel        string
	Initrd        string
	Images        string
	Sandboxes     string
	Snapshots     string
	Storage       string
	VolumeSize    int64
	Egress        string
	Slots         int
	WarmSlots     int
	WarmVMs       int
	Instance      string
	BaseUID       int
	HeartbeatSecs int
	Firecracker   string
	Memory        string
	AllowUnjailed bool
	ProbeSecs     int
	DiskMBPerSec  int
	DiskOpsPerSec int
}

// variable documents one environment variable.
type variable struct{ name, fallback, meaning string }

// variables are all of them, as `wrenn-agent --help` shows them.
var variables = []variable{
	{"AGENT_CP_URL", "", "URL of the control plane, e.g. http://cp-host:8000"},
	{"AGENT_TOKEN_FILE", "/var/lib/wrenn/host-token", "where the host's token is kept; its key and certificates lie beside it"},
	{"AGENT_LISTEN_ADDR", ":50051", "address of the RPC port (mutual TLS)"},
	{"AGENT_KERNEL_PATH", "/var/lib/wrenn/kernels/vmlinux", "guest kernel, vmlinux or bzImage"},
	{"AGENT_INITRD_PATH", "", "initramfs; by default initramfs.img beside the kernel, if there"},
	{"AGENT_IMAGES_PATH", "/var/lib/wrenn/images", "root file systems, NAME.ext4"},
	{"AGENT_SANDBOXES_PATH", "/var/lib/wrenn/sandboxes", "disks, memory and records of sandboxes"},
	{"AGENT_SNAPSHOTS_PATH", "", "snapshots; by default snapshots/ in AGENT_SANDBOXES_PATH, whose file system it must share"},
	{"AGENT_STORAGE", storage.ModeAuto, "auto, reflink or copy: auto mounts an XFS volume file where the file system has no reflinks"},
	{"AGENT_VOLUME_SIZE", "", "size of that volume file, e.g. 50G; by default half of what is free"},
	{"AGENT_EGRESS", network.EgressInternet, "internet (public addresses by NAT) or none"},
	{"AGENT_MAX_SANDBOXES", "200", "most sandboxes that run at a time"},
	{"AGENT_WARM_SLOTS", "4", "network slots that are made ahead"},
	{"AGENT_WARM_VMS", "", "virtual machines that are kept ready, frozen, of each of the two templates used last; 0 keeps none; by default one for each 1.5 GB of the host's memory, from 2 to 16"},
	{"AGENT_INSTANCE", "", "1 to 8 of [a-z0-9], in the names of namespaces and cgroups; by default made from AGENT_SANDBOXES_PATH"},
	{"AGENT_BASE_UID", "", "first of the uids that VMMs run as; by default made from AGENT_SANDBOXES_PATH"},
	{"AGENT_HEARTBEAT_SEC", "30", "seconds between heartbeats"},
	{"AGENT_FIRECRACKER_DIR", "/usr/local/bin", "where firecracker and jailer are, of one or several releases; QEMU is used without"},
	{"AGENT_ALLOW_UNJAILED", "", "1 allows a Firecracker that has no jailer beside it: confined by the agent alone"},
	{"AGENT_FIRECRACKER_MEMORY", firecracker.MemoryFile, "file or uffd: whether the kernel maps a restored VM's memory, or a page server brings in first what was used the last time (Firecracker)"},
	{"AGENT_PROBE_SEC", "5", "most seconds of the boot that tells whether KVM runs our kernel"},
	{"AGENT_DISK_MB_PER_SEC", "0", "most MB a second of each disk of a sandbox, 0 for no limit"},
	{"AGENT_DISK_OPS_PER_SEC", "0", "most operations a second of each disk of a sandbox, 0 for no limit"},
}

// loadConfig reads the environment.
func loadConfig(getenv func(string) string) (Config, error) {
	env := func(name string) string {
		if v := getenv(name); v != "" {
			return v
		}
		for _, v := range variables {
			if v.name == name {
				return v.fallback
			}
		}
		return ""
	}
	c := Config{
		ControlPlane: strings.TrimRight(env("AGENT_CP_URL"), "/"), TokenFile: env("AGENT_TOKEN_FILE"), Listen: env("AGENT_LISTEN_ADDR"),
		Kernel: env("AGENT_KERNEL_PATH"), Initrd: env("AGENT_INITRD_PATH"), Images: env("AGENT_IMAGES_PATH"),
		Sandboxes: env("AGENT_SANDBOXES_PATH"), Snapshots: env("AGENT_SNAPSHOTS_PATH"),
		Storage: env("AGENT_STORAGE"), Egress: env("AGENT_EGRESS"), Instance: env("AGENT_INSTANCE"),
		Firecracker: env("AGENT_FIRECRACKER_DIR"), Memory: env("AGENT_FIRECRACKER_MEMORY"), AllowUnjailed: env("AGENT_ALLOW_UNJAILED") == "1",
	}
	var err error
	for _, p := range []*string{&c.TokenFile, &c.Kernel, &c.Images, &c.Sandboxes, &c.Firecracker} {
		if *p, err = filepath.Abs(*p); err != nil {
			return c, err
		}
	}
	sum := sha256.Sum256([]byte(c.Sandboxes))
	if c.Instance == "" {
		c.Instance = hex.EncodeToString(sum[:3])
	}
	if c.Initrd == "" {
		if beside := filepath.Join(filepath.Dir(c.Kernel), "initramfs.img"); exists(beside) {
			c.Initrd = beside
		}
	}
	if c.Snapshots == "" {
		c.Snapshots = filepath.Join(c.Sandboxes, "snapshots")
	}
	if c.VolumeSize, err = parseSize(env("AGENT_VOLUME_SIZE")); err != nil {
		return c, err
	}
	// Ranges of 10,000 uids from 1,000,000 up: two agents on one machine do not share uids.
	defaultUID := 1_000_000 + int(binary.BigEndian.Uint32(sum[4:8])%10_000)*10_000
	total, _, err := memoryMB()
	if err != nil {
		return c, err
	}
	numbers := []struct {
		name     string
		to       *int
		min, max int
		fallback int
	}{
		{"AGENT_MAX_SANDBOXES", &c.Slots, 1, 4000, 0},
		{"AGENT_WARM_SLOTS", &c.WarmSlots, 0, 256, 0},
		{"AGENT_WARM_VMS", &c.WarmVMs, 0, 64, warmVMsFor(total)},
		{"AGENT_BASE_UID", &c.BaseUID, 10_000, 2_000_000_000, defaultUID},
		{"AGENT_HEARTBEAT_SEC", &c.HeartbeatSecs, 1, 60, 0},
		{"AGENT_PROBE_SEC", &c.ProbeSecs, 1, 600, 0},
		{"AGENT_DISK_MB_PER_SEC", &c.DiskMBPerSec, 0, 1_000_000, 0},
		{"AGENT_DISK_OPS_PER_SEC", &c.DiskOpsPerSec, 0, 100_000_000, 0},
	}
	for _, n := range numbers {
		if *n.to = n.fallback; env(n.name) == "" {
			continue
		}
		if *n.to, err = strconv.Atoi(env(n.name)); err != nil || *n.to < n.min || *n.to > n.max {
			return c, fmt.Errorf("%s is %q; it must be a number from %d to %d", n.name, env(n.name), n.min, n.max)
		}
	}
	return c, c.validate()
}

// warmVMsFor is how many VMs a host with so much memory keeps ready: one takes about 55 MB of it.
func warmVMsFor(memoryMB int64) int { return int(min(max(memoryMB/1536, 2), 16)) }

func (c Config) validate() error {
	if c.ControlPlane != "" {
		if u, err := url.Parse(c.ControlPlane); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return fmt.Errorf("AGENT_CP_URL is %q; it must be like http://cp-host:8000", c.ControlPlane)
		}
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("AGENT_LISTEN_ADDR is %q; it must be like :50051 or 10.0.1.5:50051", c.Listen)
	}
	if c.Egress != network.EgressNone && c.Egress != network.EgressInternet {
		return fmt.Errorf("AGENT_EGRESS is %q; it must be internet or none", c.Egress)
	}
	if c.Memory != firecracker.MemoryFile && c.Memory != firecracker.MemoryUffd {
		return fmt.Errorf("AGENT_FIRECRACKER_MEMORY is %q; it must be file or uffd", c.Memory)
	}
	switch c.Storage {
	case storage.ModeAuto, storage.ModeReflink, storage.ModeCopy:
		return nil
	}
	return fmt.Errorf("AGENT_STORAGE is %q; it must be auto, reflink or copy", c.Storage)
}

// parseSize reads bytes with an optional unit K, M, G or T (powers of 1024); empty is 0.
func parseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	digits := strings.TrimRight(strings.ToUpper(s), "BIKMGT")
	unit := strings.TrimRight(strings.ToUpper(s)[len(digits):], "BI")
	shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n <= 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf("AGENT_VOLUME_SIZE is %q; it must be like 50G", s)
	}
	return n << shift, nil
}

// verdictFile keeps whether KVM works. It lies beside the sandboxes, not among them: `doctor` may come
// before the first start, and a volume is mounted over an empty directory only.
func (c Config) verdictFile() string { return c.Sandboxes + ".kvm.json" }

func (c Config) probeTimeout() time.Duration { return time.Duration(c.ProbeSecs) * time.Second }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
