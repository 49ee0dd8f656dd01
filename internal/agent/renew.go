package agent

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

// reporting is the line on which this host's heartbeats go, and on which its identity is renewed.
type reporting struct {
	cp      *controlPlane
	id      *identity
	address string // at which this host is reached, if it was said at this start; told until it was heard
	every   time.Duration
	limit   int
	renewal []byte // the certificate request to be sent, PEM
}

// certificateReport says which certificate this host serves.
type certificateReport struct {
	SHA256    string    `json:"sha256"`
	ExpiresAt time.Time `json:"expires_at"`
}

// instructions are the answer to a heartbeat; an older control plane sends none.
type instructions struct {
	Token            string `json:"token"`
	RenewCertificate bool   `json:"renew_certificate"`
	CertPEM          string `json:"cert_pem"`
}

// send sends one heartbeat and keeps what the answer brings. again tells that a certificate request is
// ready to be sent.
func (l *reporting) send(ctx context.Context, hb *heartbeat) (again bool, err error) {
	cert := l.id.certificate()
	hb.Address, hb.CSRPEM = l.address, string(l.renewal)
	hb.Certificate = certificateReport{hex.EncodeToString(rpc.Fingerprint(cert.Leaf)), cert.Leaf.NotAfter}
	var todo instructions
	if err := l.cp.post(ctx, "/v1/hosts/"+l.id.HostID+"/heartbeat", l.id.currentToken(), hb, &todo); err != nil {
		return false, err
	}
	l.address = ""
	if todo.Token != "" {
		err = l.id.keepToken(todo.Token)
	}
	switch {
	case todo.CertPEM != "":
		l.renewal = nil
		return false, errors.Join(err, l.id.keepCertificate([]byte(todo.CertPEM)))
	case todo.RenewCertificate:
		csr, keyErr := l.id.newKey()
		l.renewal = csr
		return keyErr == nil, errors.Join(err, keyErr)
	}
	return false, err
}

// certificate is the one to serve now.
func (id *identity) certificate() *tls.Certificate {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.cert
}

func (id *identity) currentToken() string {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.token
}

// keepToken uses another token of this host from now on.
func (id *identity) keepToken(token string) error {
	host, err := hostOf(token)
	if err == nil && host != id.HostID {
		err = errors.New("it is another host's")
	}
	if err != nil {
		return fmt.Errorf("the control plane sent a token that cannot be used: %w", err)
	}
	if err := write(forGood, id.file, []byte(token+"\n")); err != nil {
		return err
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	id.token = token
	return nil
}

// Names beside AGENT_TOKEN_FILE. The new key waits beside the old one until its certificate is there.
const (
	keySuffix     = ".key"
	nextKeySuffix = ".key.next"
	certSuffix    = ".crt"
)

// newKey makes the key of the next certificate and the request for it.
func (id *identity) newKey() (csr []byte, err error) {
	key, csr, err := rpc.NewHostRequest()
	if err != nil {
		return nil, err
	}
	return csr, write(forGood, id.file+nextKeySuffix, key)
}

// keepCertificate serves another certificate, of the key that newKey made, from now on.
func (id *identity) keepCertificate(cert []byte) error {
	key, err := os.ReadFile(id.file + nextKeySuffix)
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(cert, key); err != nil {
		return fmt.Errorf("the control plane sent a certificate that does not fit: %w", err)
	}
	if err := write(forGood, id.file+certSuffix, cert); err != nil {
		return err
	}
	next, err := loadCertificate(id.file)
	if err != nil {
		return err
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	id.cert = next
	return nil
}

// loadCertificate reads the certificate with its key. If an agent died between writing a renewed
// certificate and putting its key in place, that is done now.
func loadCertificate(tokenFile string) (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(tokenFile+certSuffix, tokenFile+keySuffix)
	if err == nil {
		return &cert, nil
	}
	next, nextErr := tls.LoadX509KeyPair(tokenFile+certSuffix, tokenFile+nextKeySuffix)
	if nextErr != nil {
		return nil, err
	}
	if err := os.Rename(tokenFile+nextKeySuffix, tokenFile+keySuffix); err != nil {
		return nil, err
	}
	return &next, nil
}
