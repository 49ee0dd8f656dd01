-- +goose Up
-- The operation by which an idle sandbox is being ended because its owner chose on_timeout: kill. Written
-- before its host is asked, so that whoever comes after a crash goes on; its host alone decides whether
-- the sandbox was idle.
ALTER TABLE sandboxes ADD COLUMN kill_operation_id text;
CREATE INDEX sandboxes_kill ON sandboxes (id) WHERE kill_operation_id IS NOT NULL AND deleted_at IS NULL;

-- +goose Down
ALTER TABLE sandboxes DROP COLUMN kill_operation_id;
