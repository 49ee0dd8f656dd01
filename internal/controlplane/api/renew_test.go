package api_test

import (
	"crypto/tls"
	"encoding/hex"
	"net/http"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/planetest"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

type instructions struct {
	Token            string `json:"token"`
	RenewCertificate bool   `json:"renew_certificate"`
	CertPEM          string `json:"cert_pem"`
	CACertPEM        string `json:"ca_cert_pem"`
}

// beat sends a heartbeat that says which certificate the host shows.
func beat(t *testing.T, p *planetest.Plane, h *planetest.Host, extra map[string]any) planetest.Answer {
	t.Helper()
	cert := h.Certificate().Leaf
	body := map[string]any{
		"certificate":         map[string]any{"sha256": hex.EncodeToString(rpc.Fingerprint(cert)), "expires_at": cert.NotAfter},
		"an_unheard_of_field": true,
	}
	for k, v := range extra {
		body[k] = v
	}
	return p.Do("POST", "/v1/hosts/"+h.ID+"/heartbeat", body, http.Header{"X-Host-Token": {h.Token}})
}

// What a host identifies itself with is renewed while a third of its life is left, and at no moment in
// between is the host out of reach.
func TestHostCredentialsAreRenewed(t *testing.T) {
	t.Parallel()
	shortLived := planetest.New(t, planetest.Options{Times: func(ts *fleet.Times) { ts.HostCredentials = time.Hour }, NoLoops: true})
	p := planetest.Start(t, planetest.Options{DatabaseURL: shortLived.Database}) // for it an hour is much less than a third
	h := shortLived.AddHost()
	u := shortLived.NewUser()
	former := *h.Certificate()
	beat(t, shortLived, h, nil).Want(t, http.StatusNoContent, nil)

	var todo instructions
	beat(t, p, h, nil).Want(t, http.StatusOK, &todo)
	if todo.Token == "" || !todo.RenewCertificate || todo.CertPEM != "" {
		t.Fatalf("instructions %+v, want a token and a request for a request", todo)
	}
	old := h.Token
	h.Token = todo.Token
	todo = instructions{}
	beat(t, p, h, nil).Want(t, http.StatusOK, &todo)
	if todo.Token != "" || !todo.RenewCertificate {
		t.Errorf("with the new token: %+v", todo)
	}

	beat(t, p, h, map[string]any{"csr_pem": "nonsense"}).WantError(t, 400, "invalid_request")
	key, csr, err := rpc.NewHostRequest()
	if err != nil {
		t.Fatal(err)
	}
	todo = instructions{}
	beat(t, p, h, map[string]any{"csr_pem": string(csr)}).Want(t, http.StatusOK, &todo)
	renewed, err := tls.X509KeyPair([]byte(todo.CertPEM), key)
	if err != nil || todo.CACertPEM == "" {
		t.Fatalf("%v: %+v", err, todo)
	}
	show := func(cert tls.Certificate) {
		h.Stop() // also its open connections
		h.Show(cert)
		h.Restart()
	}
	show(former)
	create(t, u, nil) // the answer was lost: the former certificate still does
	show(renewed)
	create(t, u, nil) // it arrived, but no heartbeat has told so yet
	beat(t, p, h, nil).Want(t, http.StatusNoContent, nil)
	create(t, u, nil)
	show(former)
	u.Do("POST", "/v1/sandboxes", nil).WantError(t, 503, "host_unavailable") // replaced for good
	show(renewed)

	h.Token = old // both tokens are this host's until they expire
	beat(t, shortLived, h, nil).Want(t, http.StatusNoContent, nil)
}

// An agent that was started with another address is reached there from its next heartbeat on.
func TestHostMoves(t *testing.T) {
	t.Parallel()
	p := planetest.New(t, planetest.Options{})
	h := p.AddHost()
	u := p.NewUser()
	sb := create(t, u, nil)
	former := h.Address
	h.Move()
	for _, bad := range []string{"0.0.0.0:1", "no-port", "127.0.0.1:0", "a b:1"} {
		beat(t, p, h, map[string]any{"address": bad}).WantError(t, 400, "invalid_request")
	}
	beat(t, p, h, map[string]any{"address": h.Address}).Want(t, http.StatusNoContent, nil)
	u.Do("POST", "/v1/sandboxes/"+sb.ID+"/exec", map[string]any{"cmd": "true"}).Want(t, 200, nil)
	var got struct{ Address string }
	p.Admin.Do("GET", "/v1/hosts/"+h.ID, nil).Want(t, 200, &got)
	if got.Address != h.Address || got.Address == former {
		t.Errorf("the host's address is %s, was %s, should be %s", got.Address, former, h.Address)
	}
	if n := query(t, p, `SELECT id::text FROM audit_log WHERE action = 'host.move' AND subject = $1`, h.ID); len(n) != 1 {
		t.Errorf("%d audit rows of the move", len(n))
	}
}
