package rpc

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// ControlPlaneName is the DNS name in the control plane's client certificate. A host's certificate has
// the host id as its only DNS name, so neither can stand in for the other.
const ControlPlaneName = "control-plane.wrenn"

// ServerTLS is the agent's side: TLS 1.3, the certificate that cert gives at the time (it may be renewed),
// and a peer that must show a certificate of ca with the control plane's name.
func ServerTLS(cert func() *tls.Certificate, ca *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert(), nil },
		ClientAuth:     tls.RequireAndVerifyClientCert,
		ClientCAs:      ca,
		NextProtos:     []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 || !slices.Contains(cs.PeerCertificates[0].DNSNames, ControlPlaneName) {
				return errors.New("peer is not the control plane")
			}
			return nil
		},
	}
}

// ClientTLS is the control plane's side towards one host: TLS 1.3, its own certificate, and a peer that
// must show a certificate of ca for that host id, and of those only one with one of the fingerprints (SHA-256
// of the certificate's DER), so a re-registered host's old one is not accepted.
func ClientTLS(cert tls.Certificate, ca *x509.CertPool, hostID string, fingerprints ...[]byte) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		RootCAs:      ca,
		ServerName:   hostID,
		NextProtos:   []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			got := Fingerprint(cs.PeerCertificates[0])
			if !slices.ContainsFunc(fingerprints, func(f []byte) bool { return bytes.Equal(f, got) }) {
				return fmt.Errorf("host %s shows certificate %x, registered was %x", hostID, got, fingerprints)
			}
			return nil
		},
	}
}
