-- +goose Up
-- The certificate that the control plane's CA signed for the host's agent: SHA-256 of its DER form. Only
-- a host with one is ever connected to.
ALTER TABLE hosts
    ADD COLUMN cert_fingerprint bytea CHECK (length(cert_fingerprint) = 32),
    ADD COLUMN mtls_enabled boolean NOT NULL DEFAULT false,
    ADD CHECK (mtls_enabled = (cert_fingerprint IS NOT NULL));

-- +goose Down
ALTER TABLE hosts DROP COLUMN mtls_enabled, DROP COLUMN cert_fingerprint;
