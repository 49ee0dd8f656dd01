-- +goose Up
-- A heartbeat is the most frequent write. Without an index on what it changes, and with room left in each
-- page, it touches one page and no index (a heap-only tuple).
DROP INDEX hosts_online;
ALTER TABLE hosts SET (fillfactor = 50);

-- +goose Down
ALTER TABLE hosts RESET (fillfactor);
CREATE INDEX hosts_online ON hosts (last_heartbeat_at) WHERE status = 'online' AND deleted_at IS NULL;
