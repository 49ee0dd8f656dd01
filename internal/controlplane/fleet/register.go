package fleet

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// RegisterRequest is what an agent registers with.
type RegisterRequest struct {
	Token    string
	Arch     string
	CPUCores int32
	MemoryMB int64
	DiskGB   int64
	Address  string
	CSRPEM   string // may be empty: then no certificate is issued, and nothing is ever placed on the host
}

// Registered is what an agent gets.
type Registered struct {
	Host      db.Host
	Token     string
	CertPEM   string
	CACertPEM string
}

func badToken() error {
	return wrenn.Errorf(wrenn.KindUnauthorized, "the registration token is wrong, expired or used; make a new one with POST /v1/hosts/{id}/token")
}

// Register spends a one-time token and makes its host online. All that can be refused is refused before
// the token is spent; the host's token is signed before anything is written, so that a host that is
// online in the database always has one. Of callers with the same token one succeeds: Redis gives the
// token to one, and the row changes only while it is pending.
func (f *Fleet) Register(ctx context.Context, requestID string, r RegisterRequest) (Registered, error) {
	if err := checkAddress(r.Address); err != nil {
		return Registered{}, err
	}
	if err := checkCSR(r.CSRPEM); err != nil {
		return Registered{}, err
	}
	hash := auth.HashRegistrationToken(r.Token)
	hostID, err := f.redis.TakeHostToken(ctx, hash)
	if err != nil {
		return Registered{}, err
	}
	if hostID == "" {
		return Registered{}, badToken()
	}
	out := Registered{}
	if out.Token, err = f.tokens.SignHost(hostID, f.times.HostCredentials); err != nil {
		return Registered{}, err
	}
	var fingerprint []byte
	if r.CSRPEM != "" {
		cert, fp, err := f.ca.SignHost([]byte(r.CSRPEM), hostID, time.Now(), f.times.HostCredentials)
		if err != nil {
			return Registered{}, err
		}
		out.CertPEM, out.CACertPEM, fingerprint = string(cert), string(f.ca.CertPEM()), fp
	}
	err = f.store.Tx(ctx, func(tx store.Tx) error {
		out.Host, err = registerRow(ctx, tx, Actor{"host", hostID, requestID}, hash, r, fingerprint)
		return err
	})
	if err != nil {
		return Registered{}, err
	}
	return out, nil
}

func registerRow(ctx context.Context, tx store.Tx, by Actor, hash []byte, r RegisterRequest, fingerprint []byte) (db.Host, error) {
	if n, err := tx.UseHostToken(ctx, db.UseHostTokenParams{TokenHash: hash, HostID: by.ID}); err != nil {
		return db.Host{}, err
	} else if n != 1 {
		return db.Host{}, badToken()
	}
	host, err := tx.RegisterHost(ctx, db.RegisterHostParams{
		ID: by.ID, Arch: &r.Arch, CPUCores: &r.CPUCores, MemoryMB: &r.MemoryMB, DiskGB: &r.DiskGB, Address: &r.Address,
		CertFingerprint: fingerprint, MTLSEnabled: fingerprint != nil,
	})
	if store.IsNotFound(err) { // not pending any more, or deleted
		return db.Host{}, badToken()
	} else if err != nil {
		return db.Host{}, err
	}
	if err := audit(ctx, tx, by, host.TeamID, "host.register", host.ID, map[string]any{"address": r.Address, "mtls": fingerprint != nil}); err != nil {
		return db.Host{}, err
	}
	return host, event(ctx, tx, "host.registered", host.TeamID, host.ID, map[string]any{"address": r.Address})
}

func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 || host == "" {
		return invalid("address", "must be ip:port, such as 10.0.1.5:50051")
	}
	if ip, err := netip.ParseAddr(host); err == nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		return invalid("address", "%s is not an address that the control plane can connect to", host)
	}
	return nil
}

func checkCSR(text string) error {
	if text == "" {
		return nil
	}
	bad := invalid("csr_pem", "must be a PKCS #10 certificate request in PEM form, signed by its own key")
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return bad
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		return bad
	}
	return nil
}

// EnsureFirstHost makes the regular host of CP_HOST_AGENT_ADDR, once, and logs its registration token;
// while it has not registered, each start logs a new one.
func (f *Fleet) EnsureFirstHost(ctx context.Context, agentAddr string) error {
	address := agentAddr
	if u, err := url.Parse(agentAddr); err == nil && u.Host != "" && strings.Contains(agentAddr, "://") {
		address = u.Host
	}
	if err := checkAddress(address); err != nil {
		return err
	}
	var reg Registration
	err := f.store.Tx(ctx, func(tx store.Tx) error {
		if err := tx.LockSystemHost(ctx); err != nil {
			return err
		}
		host, err := tx.SystemHost(ctx)
		switch {
		case store.IsNotFound(err):
			if host, err = tx.InsertHost(ctx, db.InsertHostParams{ID: wrenn.NewID(wrenn.PrefixHost), Type: string(wrenn.HostRegular), CreatedBy: "system"}); err != nil {
				return err
			}
			if err := audit(ctx, tx, systemActor(), nil, "host.create", host.ID, map[string]any{"address": address}); err != nil {
				return err
			}
			reg, err = f.issueToken(ctx, tx, systemActor(), host)
			return err
		case err != nil:
			return err
		case host.Status == string(wrenn.HostPending):
			return f.renewToken(ctx, tx, systemActor(), host.ID, nil, &reg)
		}
		return nil
	})
	if err != nil || reg.Token == "" {
		return err
	}
	f.log.Info("the first host waits for its agent; start it with: wrenn-agent --register "+reg.Token+" --address "+address,
		slog.String("host_id", reg.Host.ID), slog.String("registration_token", reg.Token), slog.Time("expires_at", reg.ExpiresAt))
	return nil
}
