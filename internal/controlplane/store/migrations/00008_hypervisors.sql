-- +goose Up
-- What the host can run saved memory on: a host may have several hypervisors, and saved memory runs on the
-- very one that made it.
ALTER TABLE hosts ADD COLUMN hypervisors jsonb;

-- +goose Down
ALTER TABLE hosts DROP COLUMN hypervisors;
