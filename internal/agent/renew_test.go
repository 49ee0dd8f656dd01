package agent

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// unsigned is a host token as the agent sees it: only the control plane verifies it.
func unsigned(hostID, jti string) string {
	payload, _ := json.Marshal(map[string]string{"sub": hostID, "typ": "host", "jti": jti})
	return "e30." + base64.RawURLEncoding.EncodeToString(payload) + ".c2ln"
}

// registeredHost is the identity of a host whose certificate is good for an hour.
func registeredHost(t *testing.T, ca *rpc.CA) *identity {
	t.Helper()
	file, hostID := filepath.Join(t.TempDir(), "host-token"), wrenn.NewID(wrenn.PrefixHost)
	key, csr, err := rpc.NewHostRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert, _, err := ca.SignHost(csr, hostID, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string][]byte{file: []byte(unsigned(hostID, "1")), file + ".key": key, file + ".crt": cert, file + ".ca": ca.CertPEM()} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id, err := loadIdentity(file)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newCA(t *testing.T) *rpc.CA {
	t.Helper()
	ca, err := rpc.NewCA(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// A heartbeat's answer renews token and certificate, and what is renewed outlives the agent.
func TestRenewal(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	id := registeredHost(t, ca)
	newToken := unsigned(id.HostID, "2")
	var seen []heartbeat
	var tokens []string
	cp := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var hb heartbeat
		if err := json.NewDecoder(r.Body).Decode(&hb); err != nil {
			t.Error(err)
		}
		seen, tokens = append(seen, hb), append(tokens, r.Header.Get("X-Host-Token"))
		switch len(seen) {
		case 1:
			_ = json.NewEncoder(w).Encode(map[string]any{"token": newToken, "renew_certificate": true, "of_a_later_version": 1})
		case 2:
			cert, _, err := ca.SignHost([]byte(hb.CSRPEM), id.HostID, time.Now(), 24*time.Hour)
			if err != nil {
				t.Error(err)
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"cert_pem": string(cert)})
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	}))
	defer cp.Close()
	first := id.certificate()
	line := &reporting{cp: newControlPlane(cp.URL), id: id, address: "10.0.1.5:50051"}
	again, err := line.send(t.Context(), &heartbeat{})
	if err != nil || !again {
		t.Fatalf("again %v, %v", again, err)
	}
	for range 2 {
		if again, err = line.send(t.Context(), &heartbeat{}); err != nil || again {
			t.Fatalf("again %v, %v", again, err)
		}
	}
	if seen[0].Address == "" || seen[1].Address != "" {
		t.Errorf("the address was told as %q, then %q", seen[0].Address, seen[1].Address)
	}
	if tokens[0] == tokens[1] || tokens[1] != newToken || tokens[2] != newToken {
		t.Errorf("tokens %v", tokens)
	}
	if seen[1].Certificate != seen[0].Certificate || seen[2].Certificate == seen[0].Certificate || seen[2].CSRPEM != "" {
		t.Errorf("certificates told: %+v %+v %+v", seen[0].Certificate, seen[1].Certificate, seen[2].Certificate)
	}
	later, err := loadIdentity(id.file)
	if err != nil {
		t.Fatal(err)
	}
	if later.currentToken() != newToken || later.certificate().Leaf.Equal(first.Leaf) || !later.certificate().Leaf.Equal(id.certificate().Leaf) {
		t.Error("the next agent does not have what was renewed")
	}
}

// An agent that dies after the certificate was written and before its key is in place costs nothing; nor
// does one that dies before.
func TestRenewalIsCutOff(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	id := registeredHost(t, ca)
	csr, err := id.newKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := loadIdentity(id.file); err != nil {
		t.Errorf("with a key that has no certificate yet: %v", err)
	}
	cert, _, err := ca.SignHost(csr, id.HostID, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := write(forGood, id.file+certSuffix, cert); err != nil {
		t.Fatal(err)
	}
	for range 2 { // also the one after
		later, err := loadIdentity(id.file)
		if err != nil {
			t.Fatal(err)
		}
		if later.certificate().Leaf.Equal(id.certificate().Leaf) {
			t.Error("the former certificate is in use")
		}
	}
}

// What does not fit is refused, and what was there stays.
func TestRenewalRefusesWhatDoesNotFit(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	id := registeredHost(t, ca)
	first, token := id.certificate(), id.currentToken()
	if err := id.keepToken(unsigned(wrenn.NewID(wrenn.PrefixHost), "3")); err == nil || strings.Contains(err.Error(), "%!") {
		t.Errorf("another host's token: %v", err)
	}
	if _, err := id.newKey(); err != nil {
		t.Fatal(err)
	}
	_, foreign, err := rpc.NewHostRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert, _, err := ca.SignHost(foreign, id.HostID, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.keepCertificate(cert); err == nil {
		t.Error("a certificate of another key was taken")
	}
	later, err := loadIdentity(id.file)
	if err != nil || later.currentToken() != token || !later.certificate().Leaf.Equal(first.Leaf) {
		t.Errorf("after refusals: %v", err)
	}
}
