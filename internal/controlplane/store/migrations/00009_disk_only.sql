-- +goose Up
-- A sandbox that is made from a saved moment may leave the memory of that and boot its disk.
ALTER TABLE sandboxes ADD COLUMN disk_only boolean NOT NULL DEFAULT false;

-- +goose Down
ALTER TABLE sandboxes DROP COLUMN disk_only;
