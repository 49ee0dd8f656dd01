package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// identity is what registration gave this host. It lies in AGENT_TOKEN_FILE (the token alone) and beside
// it: .key, .crt and .ca, all PEM. The control plane renews token and certificate (see renew.go).
type identity struct {
	HostID string
	CA     *x509.CertPool

	file  string
	mu    sync.Mutex
	token string
	cert  *tls.Certificate
}

// controlPlane is the agent's HTTP client of wrenn-cp.
type controlPlane struct {
	url    string
	client *http.Client
}

func newControlPlane(url string) *controlPlane {
	return &controlPlane{url: url, client: &http.Client{Timeout: 15 * time.Second}}
}

type registration struct {
	Token string `json:"token"`
	specs
	Address string `json:"address"`
	CSR     string `json:"csr_pem"`
}

// register trades a one-time token for the host's identity and stores that. The private key is made
// here and stays here.
func (c *controlPlane) register(ctx context.Context, token, address, tokenFile string, size specs) error {
	key, csr, err := rpc.NewHostRequest()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(tokenFile), 0o700); err != nil {
		return fmt.Errorf("cannot make the directory of AGENT_TOKEN_FILE: %w", err)
	}
	// Written first: a token file that cannot be written must not cost the one-time token.
	if err := write(forGood, tokenFile+keySuffix, key); err != nil {
		return fmt.Errorf("cannot write beside AGENT_TOKEN_FILE: %w", err)
	}
	var answer struct {
		Token   string `json:"token"`
		CertPEM string `json:"cert_pem"`
		CAPEM   string `json:"ca_cert_pem"`
	}
	err = c.post(ctx, "/v1/hosts/register", "", registration{Token: token, specs: size, Address: address, CSR: string(csr)}, &answer)
	if err != nil {
		return fmt.Errorf("registration failed: %w", err)
	}
	return errors.Join(
		write(forGood, tokenFile+certSuffix, []byte(answer.CertPEM)),
		write(forGood, tokenFile+".ca", []byte(answer.CAPEM)),
		write(forGood, tokenFile, []byte(answer.Token+"\n")),
	)
}

// loadIdentity reads what register stored.
func loadIdentity(tokenFile string) (*identity, error) {
	raw, err := os.ReadFile(tokenFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("this host is not registered: %s does not exist; create a host in the control plane and start with --register TOKEN --address IP:PORT", tokenFile)
	}
	if err != nil {
		return nil, err
	}
	id := &identity{file: tokenFile, token: strings.TrimSpace(string(raw))}
	if id.HostID, err = hostOf(id.token); err != nil {
		return nil, fmt.Errorf("%s holds no host token: %w", tokenFile, err)
	}
	if id.cert, err = loadCertificate(tokenFile); err != nil {
		return nil, fmt.Errorf("the host's certificate: %w", err)
	}
	ca, err := os.ReadFile(tokenFile + ".ca")
	if err != nil {
		return nil, err
	}
	id.CA = x509.NewCertPool()
	if !id.CA.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s.ca holds no certificate", tokenFile)
	}
	return id, nil
}

// hostOf reads the host id from a host token without verifying it: only the control plane can, and does.
func hostOf(token string) (string, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", err
	}
	var claims struct {
		Sub string `json:"sub"`
		Typ string `json:"typ"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return "", err
	}
	if claims.Typ != "host" || !wrenn.ValidID(wrenn.PrefixHost, claims.Sub) {
		return "", errors.New("not a token of a host")
	}
	return claims.Sub, nil
}

// post sends JSON and reads JSON. A refusal is a *wrenn.Error with the control plane's words.
func (c *controlPlane) post(ctx context.Context, path, hostToken string, body, answer any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+path, bytes.NewReader(raw))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if hostToken != "" {
		req.Header.Set("X-Host-Token", hostToken)
	}
	res, err := c.client.Do(req)
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindHostUnavailable, "the control plane at %s cannot be reached", c.url)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		return refusal(res, text)
	}
	if answer == nil || len(text) == 0 {
		return nil
	}
	return json.Unmarshal(text, answer)
}

func refusal(res *http.Response, text []byte) error {
	var body struct {
		Error struct {
			Code    wrenn.Kind `json:"code"`
			Message string     `json:"message"`
		} `json:"error"`
	}
	if json.Unmarshal(text, &body) != nil || body.Error.Code == "" {
		return wrenn.Errorf(wrenn.KindInternal, "the control plane answered %s", res.Status)
	}
	return wrenn.Errorf(body.Error.Code, "%s", body.Error.Message)
}
