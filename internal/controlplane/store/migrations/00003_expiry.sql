-- +goose Up
CREATE INDEX sandboxes_expiry ON sandboxes (last_active_at) WHERE status = 'running' AND timeout_sec > 0 AND deleted_at IS NULL;

-- +goose Down
DROP INDEX sandboxes_expiry;
