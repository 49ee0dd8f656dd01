package envd

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/envd/boot"
	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
)

// Bounds of /init.
const (
	maxInitBody    = 1 << 20
	maxToken       = 1024
	maxEntropy     = 4096
	maxNameservers = 3 // what resolv.conf takes
	maxInitEnvs    = 4096
)

// initBody is the body of POST /init. Fields of the contract that mean nothing to this guest
// (volumeMounts, hyperloopIP, …) are ignored, as unknown ones are: host and guest are upgraded in any order.
type initBody struct {
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    *string           `json:"accessToken"`
	Timestamp      *time.Time        `json:"timestamp"`
	DefaultUser    *string           `json:"defaultUser"`
	DefaultWorkdir *string           `json:"defaultWorkdir"`

	Hostname    string   `json:"hostname"`
	MachineID   string   `json:"machineId"`
	Entropy     string   `json:"entropy"` // base64
	Nameservers []string `json:"nameservers"`
	DiskBytes   int64    `json:"diskBytes"` // of the root disk, which may have grown
}

var (
	hostnamePattern  = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)
	machineIDPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

// parseInit reads and checks a body; an empty one sets nothing.
func parseInit(raw []byte) (initBody, boot.Identity, error) {
	var b initBody
	if len(bytes.TrimSpace(raw)) > 0 {
		if err := json.Unmarshal(raw, &b); err != nil {
			return b, boot.Identity{}, fmt.Errorf("the body is not the JSON that is expected: %w", err)
		}
	}
	id := boot.Identity{Hostname: b.Hostname, MachineID: b.MachineID, DiskBytes: b.DiskBytes}
	if b.Timestamp != nil {
		id.Time = *b.Timestamp
	}
	if len(b.EnvVars) > maxInitEnvs {
		return b, id, fmt.Errorf("envVars has %d entries; at most %d are taken", len(b.EnvVars), maxInitEnvs)
	}
	for k, v := range b.EnvVars {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return b, id, fmt.Errorf("envVars: %q is no environment variable", k)
		}
	}
	if b.AccessToken != nil && len(*b.AccessToken) > maxToken {
		return b, id, fmt.Errorf("accessToken is longer than %d bytes", maxToken)
	}
	if b.Hostname != "" && !hostnamePattern.MatchString(b.Hostname) {
		return b, id, fmt.Errorf("hostname %q is no host name", b.Hostname)
	}
	if b.MachineID != "" && !machineIDPattern.MatchString(b.MachineID) {
		return b, id, errors.New("machineId is not 32 hexadecimal digits")
	}
	entropy, err := base64.StdEncoding.DecodeString(b.Entropy)
	if err != nil || len(entropy) > maxEntropy {
		return b, id, fmt.Errorf("entropy is not base64 of at most %d bytes", maxEntropy)
	}
	id.Entropy = entropy
	if len(b.Nameservers) > maxNameservers {
		return b, id, fmt.Errorf("nameservers has %d entries; at most %d are taken", len(b.Nameservers), maxNameservers)
	}
	for _, ns := range b.Nameservers {
		addr, err := netip.ParseAddr(ns)
		if err != nil {
			return b, id, fmt.Errorf("nameservers: %q is no IP address", ns)
		}
		id.Nameservers = append(id.Nameservers, addr)
	}
	return b, id, nil
}

// init makes the guest who it is from now on: before any user code runs after a boot or a restore. That
// the caller may do so was checked by admit: with a token set, only who knows it.
func (s *server) init(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInitBody))
	if err != nil {
		writeError(w, http.StatusBadRequest, fmt.Sprintf("the body cannot be read, or is longer than %d bytes", maxInitBody))
		return
	}
	body, id, err := parseInit(raw)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	if body.DefaultUser != nil && *body.DefaultUser != "" {
		if _, err := s.Users.Lookup(*body.DefaultUser); err != nil {
			writeError(w, http.StatusBadRequest, "defaultUser: "+err.Error())
			return
		}
	}
	if err := s.assume(id); err != nil {
		s.Log.Error("init failed", "error", err)
		writeError(w, http.StatusInternalServerError, "the guest could not take its identity")
		return
	}
	if err := s.Settings.Update(body.apply); err != nil {
		s.Log.Error("init failed", "error", err)
		writeError(w, http.StatusInternalServerError, "the settings could not be kept")
		return
	}
	// Last: user code goes on only in the guest that this now is.
	if err := s.Cgroups.Thaw(); err != nil && !errors.Is(err, cgroup.ErrBusy) {
		s.Log.Warn("user processes could not be thawed", "error", err)
	}
	w.WriteHeader(http.StatusNoContent)
}

// assume gives the guest its identity. A file system still frozen for a snapshot is thawed first, or the
// new names could not be written.
func (s *server) assume(id boot.Identity) error {
	if s.Machine == nil {
		return nil
	}
	if err := s.Machine.ThawFS(); err != nil {
		return err
	}
	return s.Machine.Assume(id)
}

// apply merges what the body sets; what it leaves out stays.
func (b *initBody) apply(v *settings.Values) {
	if b.EnvVars != nil {
		env := make(map[string]string, len(v.Env)+len(b.EnvVars))
		for _, layer := range []map[string]string{v.Env, b.EnvVars} {
			for k, val := range layer {
				env[k] = val
			}
		}
		v.Env = env
	}
	if b.AccessToken != nil {
		v.AccessToken = *b.AccessToken
	}
	if b.DefaultUser != nil {
		v.User = *b.DefaultUser
		if v.User == "" {
			v.User = settings.DefaultUser
		}
	}
	if b.DefaultWorkdir != nil {
		v.Workdir = *b.DefaultWorkdir
	}
}
