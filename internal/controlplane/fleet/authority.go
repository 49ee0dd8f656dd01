package fleet

import (
	"context"
	"errors"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
)

const secretHostCA = "host-ca"

// ErrWrongKey tells that the CA was encrypted with another key.
var ErrWrongKey = errors.New("the host CA in the database was encrypted with another WRENN_ENCRYPTION_KEY; set the former key again")

// LoadAuthority gives the control plane's CA for hosts. The first replica that asks makes it; the rest
// get that one. It lies in the database encrypted with key (32 bytes).
func LoadAuthority(ctx context.Context, st *store.Store, key []byte) (*rpc.CA, error) {
	sealed, err := st.Secret(ctx, secretHostCA)
	if store.IsNotFound(err) {
		if err = makeAuthority(ctx, st, key); err == nil {
			sealed, err = st.Secret(ctx, secretHostCA)
		}
	}
	if err != nil {
		return nil, err
	}
	pemBytes, err := auth.Open(key, secretHostCA, sealed)
	if err != nil {
		return nil, ErrWrongKey
	}
	return rpc.ParseCA(pemBytes)
}

func makeAuthority(ctx context.Context, st *store.Store, key []byte) error {
	ca, err := rpc.NewCA(time.Now())
	if err != nil {
		return err
	}
	pemBytes, err := ca.PEM()
	if err != nil {
		return err
	}
	sealed, err := auth.Seal(key, secretHostCA, pemBytes)
	if err != nil {
		return err
	}
	return st.InsertSecret(ctx, db.InsertSecretParams{Name: secretHostCA, Value: sealed})
}
