-- +goose Up
-- A certificate that was signed for a host that has one already. Until the host is seen to serve it both
-- are accepted, so that an answer that is lost on its way costs nothing.
ALTER TABLE hosts ADD COLUMN next_cert_fingerprint bytea CHECK (length(next_cert_fingerprint) = 32);

-- +goose Down
ALTER TABLE hosts DROP COLUMN next_cert_fingerprint;
