// Package agents connects the control plane to the host agents: one pooled HTTP/2 transport with mutual
// TLS per host, pinned to the certificate the host registered with, and over it the clients of the
// agent's own service and of the guests behind it. It knows no rows and retries nothing.
package agents

import (
	"bytes"
	"crypto/tls"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1/agentv1connect"
	"github.com/wrenn-sandbox/wrenn/internal/gen/filesystem/filesystemconnect"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

// Target is a host to connect to.
type Target struct {
	HostID      string
	Address     string // ip:port
	Fingerprint []byte // SHA-256 of its certificate
	Next        []byte // of the one that replaces it, if one was signed
}

const (
	dialTimeout     = 5 * time.Second
	pingAfter       = 15 * time.Second // of silence on a connection with open streams
	pingTimeout     = 10 * time.Second
	idleTimeout     = 90 * time.Second
	continueTimeout = 10 * time.Second // for the host to let an upload through; it is sent then all the same
	streamWindow    = 4 << 20          // receive buffer of one stream: bounds what a slow reader holds in memory
	connWindow      = 16 << 20
	clientCertRenew = 12 * time.Hour // half its life
)

// Pool holds the connections.
type Pool struct {
	ca  *rpc.CA
	now func() time.Time

	mu     sync.Mutex
	hosts  map[string]*host
	cert   *tls.Certificate
	certAt time.Time
}

type host struct {
	target    Target
	transport *http.Transport
	client    *http.Client
}

// NewPool makes a pool whose connections show certificates of ca.
func NewPool(ca *rpc.CA, now func() time.Time) *Pool {
	return &Pool{ca: ca, now: now, hosts: map[string]*host{}}
}

// Close drops idle connections; streams under way go on.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, h := range p.hosts {
		h.transport.CloseIdleConnections()
		delete(p.hosts, id)
	}
}

// Forget drops the connections to a host.
func (p *Pool) Forget(hostID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h, ok := p.hosts[hostID]; ok {
		h.transport.CloseIdleConnections()
		delete(p.hosts, hostID)
	}
}

// Client is an HTTP client for the host; its requests go to https://<t.Address>.
func (p *Pool) Client(t Target) *http.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h, ok := p.hosts[t.HostID]; ok {
		if h.target.Address == t.Address && bytes.Equal(h.target.Fingerprint, t.Fingerprint) && bytes.Equal(h.target.Next, t.Next) {
			return h.client
		}
		h.transport.CloseIdleConnections()
	}
	h := p.connect(t)
	p.hosts[t.HostID] = h
	return h.client
}

// Service is the agent's own service.
func (p *Pool) Service(t Target) agentv1connect.AgentServiceClient {
	return agentv1connect.NewAgentServiceClient(p.Client(t), "https://"+t.Address)
}

// Process is the process service of the guest of a sandbox.
func (p *Pool) Process(t Target, sandboxID string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(p.Client(t), GuestURL(t, sandboxID))
}

// Filesystem is the filesystem service of the guest of a sandbox.
func (p *Pool) Filesystem(t Target, sandboxID string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(p.Client(t), GuestURL(t, sandboxID))
}

// GuestURL is where the agent passes requests through to a sandbox's guest agent.
func GuestURL(t Target, sandboxID string) string {
	return "https://" + t.Address + "/sandboxes/" + url.PathEscape(sandboxID) + "/envd"
}

func (p *Pool) connect(t Target) *host {
	cfg := rpc.ClientTLS(tls.Certificate{}, p.ca.Pool(), t.HostID, t.Fingerprint, t.Next)
	cfg.Certificates = nil
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.clientCert() }
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:     cfg,
		TLSHandshakeTimeout: dialTimeout,
		ForceAttemptHTTP2:   true,
		DisableCompression:  true,
		IdleConnTimeout:     idleTimeout,

		ExpectContinueTimeout: continueTimeout,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout:               pingAfter,
			PingTimeout:                   pingTimeout,
			MaxReceiveBufferPerStream:     streamWindow,
			MaxReceiveBufferPerConnection: connWindow,
		},
	}
	return &host{t, transport, &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// clientCert is the control plane's own certificate, made again before it runs out.
func (p *Pool) clientCert() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if p.cert == nil || now.Sub(p.certAt) > clientCertRenew {
		cert, err := p.ca.ClientCert(now)
		if err != nil {
			return nil, err
		}
		p.cert, p.certAt = &cert, now
	}
	return p.cert, nil
}
