package controlplane

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
)

// Config is the configuration of the process, from the environment.
type Config struct {
	Listen         string
	DatabaseURL    string
	RedisURL       string
	JWTSecret      []byte
	EncryptionKey  []byte // nil if CAFile is given
	CAFile         string
	HostAgentAddr  string
	PublicURL      string
	LogLevel       slog.Level
	SignupClosed   bool
	TrustedProxies []netip.Prefix
	Policy         fleet.Policy
	Times          fleet.Times
}

// settings documents the environment, for --help, in the order in which it is read.
var settings = [...][2]string{
	{"DATABASE_URL", "PostgreSQL, e.g. postgres://wrenn:wrenn@localhost:5432/wrenn?sslmode=disable (required)"},
	{"REDIS_URL", "Redis, e.g. redis://localhost:6379/0 (required)"},
	{"JWT_SECRET", "signs user and host tokens; at least 32 bytes, the same on every replica (required); make one: openssl rand -hex 32"},
	{"WRENN_ENCRYPTION_KEY", "64 hex digits, the same on every replica; encrypts the host CA in the database (required unless CP_CA_FILE is set); make one: openssl rand -hex 32"},
	{"CP_CA_FILE", "PEM file with the host CA's certificate and PKCS #8 private key, instead of one kept in the database"},
	{"CP_LISTEN_ADDR", "where to listen (default :8000)"},
	{"CP_PUBLIC_URL", "how users reach this control plane, for messages (default http://localhost:PORT)"},
	{"CP_HOST_AGENT_ADDR", "if set, makes a first regular host for the agent at this address and logs its registration token"},
	{"CP_SIGNUP", "open: anyone may make an account and team of their own; closed: only `wrenn-cp admin create` makes accounts (default open)"},
	{"CP_TRUSTED_PROXIES", "CIDRs, comma-separated, whose X-Forwarded-For is believed (default none)"},
	{"CP_CPU_OVERCOMMIT", "vCPUs per core of a host that does not say itself (default 4)"},
	{"CP_DISK_OVERCOMMIT", "disk promised per disk there is: disks of sandboxes are sparse (default 2)"},
	{"CP_MEMORY_RESERVE_MB", "memory kept for a host that does not say itself (default 512)"},
	{"CP_HOST_CREDENTIALS", "how long a host's token and certificate are good; its heartbeats renew them when a third is left (default 8760h, a year)"},
	{"LOG_LEVEL", "debug, info, warn or error (default info)"},
}

// loadConfig reads and checks the environment. The error names every variable that is wrong and how to
// mend it.
func loadConfig(env func(string) string) (Config, error) {
	c := Config{Policy: fleet.DefaultPolicy(), Times: fleet.DefaultTimes(), HostAgentAddr: env("CP_HOST_AGENT_ADDR"), CAFile: env("CP_CA_FILE"), JWTSecret: []byte(env("JWT_SECRET"))}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	var err error
	if c.DatabaseURL, err = databaseURL(env); err != nil {
		errs = append(errs, err)
	}
	if c.RedisURL = env("REDIS_URL"); c.RedisURL == "" {
		bad("REDIS_URL is not set; set it to a Redis, e.g. redis://localhost:6379/0")
	}
	if len(c.JWTSecret) < auth.MinSecret {
		bad("JWT_SECRET has %d bytes, needs at least %d; make one: openssl rand -hex 32", len(c.JWTSecret), auth.MinSecret)
	}
	if c.CAFile == "" {
		if c.EncryptionKey, err = hex.DecodeString(env("WRENN_ENCRYPTION_KEY")); err != nil || len(c.EncryptionKey) != 32 {
			bad("WRENN_ENCRYPTION_KEY must be 64 hex digits (or set CP_CA_FILE); make one: openssl rand -hex 32")
		}
	} else if _, err := os.Stat(c.CAFile); err != nil {
		bad("CP_CA_FILE: %w", err)
	}
	c.Listen = cmp.Or(env("CP_LISTEN_ADDR"), ":8000")
	_, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		bad("CP_LISTEN_ADDR %q must be host:port or :port", c.Listen)
	}
	c.PublicURL = cmp.Or(env("CP_PUBLIC_URL"), "http://localhost:"+port)
	if u, err := url.Parse(c.PublicURL); err != nil || u.Host == "" {
		bad("CP_PUBLIC_URL %q must be a URL such as https://wrenn.example.com", c.PublicURL)
	}
	if err := c.LogLevel.UnmarshalText([]byte(cmp.Or(env("LOG_LEVEL"), "info"))); err != nil {
		bad("LOG_LEVEL %q must be debug, info, warn or error", env("LOG_LEVEL"))
	}
	errs = append(errs, c.readAccess(env)...)
	errs = append(errs, c.readPolicy(env)...)
	return c, errors.Join(errs...)
}

func databaseURL(env func(string) string) (string, error) {
	u := env("DATABASE_URL")
	if u == "" {
		return "", errors.New("DATABASE_URL is not set; set it to a PostgreSQL database, e.g. postgres://wrenn:wrenn@localhost:5432/wrenn?sslmode=disable")
	}
	return u, nil
}

func (c *Config) readAccess(env func(string) string) (errs []error) {
	switch v := cmp.Or(env("CP_SIGNUP"), "open"); v {
	case "open", "closed":
		c.SignupClosed = v == "closed"
	default:
		errs = append(errs, fmt.Errorf("CP_SIGNUP %q must be open or closed", v))
	}
	for _, cidr := range strings.FieldsFunc(env("CP_TRUSTED_PROXIES"), func(r rune) bool { return r == ',' || r == ' ' }) {
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			errs = append(errs, fmt.Errorf("CP_TRUSTED_PROXIES: %q is not a CIDR such as 10.0.0.0/8", cidr))
			continue
		}
		c.TrustedProxies = append(c.TrustedProxies, p)
	}
	return errs
}

// leastCredentials leaves a host of some seconds between heartbeats time to renew what it has.
const leastCredentials = 30 * time.Second

func (c *Config) readPolicy(env func(string) string) (errs []error) {
	for name, dst := range map[string]*float64{"CP_CPU_OVERCOMMIT": &c.Policy.CPUOvercommit, "CP_DISK_OVERCOMMIT": &c.Policy.DiskOvercommit} {
		if v := env(name); v != "" {
			f, err := strconv.ParseFloat(v, 64)
			if err != nil || f < 0.1 || f > 1000 {
				errs = append(errs, fmt.Errorf("%s %q must be a number from 0.1 to 1000", name, v))
			}
			*dst = f
		}
	}
	if v := env("CP_MEMORY_RESERVE_MB"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			errs = append(errs, fmt.Errorf("CP_MEMORY_RESERVE_MB %q must be a number of megabytes", v))
		}
		c.Policy.MemoryReserveMB = n
	}
	if v := env("CP_HOST_CREDENTIALS"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil || d < leastCredentials {
			errs = append(errs, fmt.Errorf("CP_HOST_CREDENTIALS %q must be a duration of at least %s, such as 8760h", v, leastCredentials))
		}
		c.Times.HostCredentials = d
	}
	return errs
}
