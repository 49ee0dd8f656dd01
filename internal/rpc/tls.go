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

// ServerTLS is the agent's side: TLS 1.3, its own certificate, and a peer that must show a certificate
// of ca with the control plane's name.
func ServerTLS(cert tls.Certificate, ca *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca,
		NextProtos:   []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 || !slices.Contains(cs.PeerCertificates[0].DNSNames, ControlPlaneName) {
				return errors.New("peer is not the control plane")
			}
			return nil
		},
	}
}

// ClientTLS is the control plane's side towards one host: TLS 1.3, its own certificate, and a peer that
// must show a certificate of ca for that host id. If fingerprint (SHA-256 of the certificate's DER)
// is not nil, exactly that certificate is accepted, so a re-registered host's old one is not.
func ClientTLS(cert tls.Certificate, ca *x509.CertPool, hostID string, fingerprint []byte) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		RootCAs:      ca,
		ServerName:   hostID,
		NextProtos:   []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if fingerprint == nil {
				return nil
			}
			if got := Fingerprint(cs.PeerCertificates[0]); !bytes.Equal(got, fingerprint) {
				return fmt.Errorf("host %s shows certificate %x, registered was %x", hostID, got, fingerprint)
			}
			return nil
		},
	}
}
