-- What the control plane itself does with sandboxes, whoever owns them. Not for requests: those go
-- through team.sql.

-- name: PlanAnew :exec
-- From here to the end of the transaction every statement is planned for its parameters.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true);

-- name: SandboxByID :one
SELECT * FROM sandboxes WHERE id = @id;

-- name: FinishCreate :one
UPDATE sandboxes SET status = 'running', reason = NULL, revision = @revision, started_at = @started_at, last_active_at = @started_at,
    cold = @cold, create_env = NULL, operation_until = NULL, missing_since = NULL, updated_at = now()
WHERE id = @id AND status = 'creating' AND operation_id = @operation_id AND deleted_at IS NULL
RETURNING *;

-- name: FailCreate :one
UPDATE sandboxes SET status = 'error', reason = @reason, create_env = NULL, cleanup_pending = true,
    operation_until = now() + @lease::interval, updated_at = now()
WHERE id = @id AND status = 'creating' AND operation_id = @operation_id AND deleted_at IS NULL
RETURNING *;

-- name: FinishCleanup :exec
UPDATE sandboxes SET cleanup_pending = false, operation_until = NULL, updated_at = now()
WHERE id = @id AND status = 'error' AND deleted_at IS NULL;

-- name: FinishDelete :one
UPDATE sandboxes SET deleted_at = now(), operation_until = NULL, cleanup_pending = false, updated_at = now()
WHERE id = @id AND status = 'deleting' AND deleted_at IS NULL
RETURNING *;

-- name: TakeWork :many
-- Operations whose replica has gone away, taken over for the length of a lease. A host that is not
-- online is left alone: its work waits.
UPDATE sandboxes SET operation_until = now() + @lease::interval
WHERE id IN (
    SELECT s.id FROM sandboxes s JOIN hosts h ON h.id = s.host_id
    WHERE s.deleted_at IS NULL AND (s.status IN ('creating', 'deleting', 'pausing', 'resuming') OR s.cleanup_pending)
      AND s.operation_until < now() AND h.status = 'online'
    ORDER BY s.operation_until LIMIT @max_rows FOR UPDATE OF s SKIP LOCKED)
RETURNING *;

-- name: ReleaseWork :exec
-- Puts the next attempt off.
UPDATE sandboxes SET operation_until = now() + @delay::interval
WHERE id = @id AND operation_id = @operation_id AND deleted_at IS NULL AND operation_until IS NOT NULL;

-- name: ExtendWork :execrows
UPDATE sandboxes SET operation_until = now() + @lease::interval
WHERE id = @id AND operation_id = @operation_id AND deleted_at IS NULL AND operation_until IS NOT NULL;

-- name: SandboxesOfHost :many
-- The rows that a host should know of: live ones of the host, and any row (also deleted ones, also of
-- another host) of an id that it reports.
SELECT * FROM sandboxes WHERE (host_id = @host_id AND deleted_at IS NULL) OR id = ANY(@reported::text[]);

-- name: ApplyReport :one
UPDATE sandboxes SET status = @status, reason = sqlc.narg('reason'), revision = @revision,
    last_active_at = greatest(last_active_at, sqlc.narg('last_active_at')), missing_since = NULL,
    durable_at = sqlc.narg('durable_at'), needs = sqlc.narg('needs'),
    operation_until = CASE WHEN @status IN ('pausing', 'resuming') THEN operation_until END, updated_at = now()
WHERE id = @id AND host_id = @host_id AND deleted_at IS NULL AND status = @former_status AND revision < @revision
  AND status IN ('running', 'pausing', 'paused', 'resuming') -- a create or delete that was decided is not taken back
RETURNING *;

-- name: ApplyActivity :exec
UPDATE sandboxes SET last_active_at = greatest(last_active_at, @last_active_at::timestamptz),
    durable_at = CASE WHEN status = 'paused' AND revision = @revision THEN coalesce(sqlc.narg('durable_at'), durable_at) ELSE durable_at END,
    reason = CASE WHEN missing_since IS NULL THEN reason END, missing_since = NULL
WHERE id = @id AND host_id = @host_id AND deleted_at IS NULL
  AND (missing_since IS NOT NULL OR last_active_at IS NULL OR last_active_at < @last_active_at::timestamptz
       OR status = 'paused' AND revision = @revision AND durable_at IS DISTINCT FROM sqlc.narg('durable_at'));

-- name: SettleChange :one
-- Writes what a host says became of a pause or resume, whether or not that is news, with its event.
WITH settled AS (
    UPDATE sandboxes SET status = @status, reason = sqlc.narg('reason'), revision = @revision,
        last_active_at = greatest(sandboxes.last_active_at, sqlc.narg('last_active_at')), missing_since = NULL,
        durable_at = sqlc.narg('durable_at'), needs = sqlc.narg('needs'), operation_until = NULL, updated_at = now()
    WHERE sandboxes.id = @id AND sandboxes.operation_id = @operation_id AND sandboxes.deleted_at IS NULL
      AND (sandboxes.status IN ('pausing', 'resuming') AND sandboxes.revision <= @revision
        OR sandboxes.status IN ('running', 'paused') AND sandboxes.revision < @revision)
    RETURNING *
), told AS (
    INSERT INTO events (type, team_id, subject) SELECT 'sandbox.' || settled.status, settled.team_id, settled.id FROM settled
)
SELECT * FROM settled;

-- name: MarkMissing :execrows
UPDATE sandboxes SET missing_since = now(), reason = @reason, updated_at = now()
WHERE id = @id AND host_id = @host_id AND deleted_at IS NULL AND missing_since IS NULL AND status = @former_status AND revision = @revision;

-- name: SandboxesByStatus :many
SELECT status, count(*) FROM sandboxes WHERE deleted_at IS NULL GROUP BY status;

-- name: MissingCount :one
SELECT count(*) FROM sandboxes WHERE deleted_at IS NULL AND missing_since IS NOT NULL;

-- name: PurgeDeleted :exec
-- After a month no host can still have anything of it that it would not have reported.
DELETE FROM sandboxes WHERE deleted_at < now() - interval '90 days';

-- name: ExpiredSandboxes :many
-- Running sandboxes that, as far as the rows know, were idle for their timeout, and those whose end was
-- begun. Their hosts know better.
SELECT s.* FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.deleted_at IS NULL
  AND (s.status = 'running' AND s.timeout_sec > 0 AND s.missing_since IS NULL AND s.last_active_at + make_interval(secs => s.timeout_sec) < now()
    OR s.kill_operation_id IS NOT NULL AND s.status <> 'deleting')
  AND h.status = 'online' AND h.deleted_at IS NULL AND NOT (s.id = ANY(@not_now::text[]))
ORDER BY s.last_active_at LIMIT @max_rows;

-- name: IntendKill :one
-- Nothing comes back if it was used meanwhile.
UPDATE sandboxes SET kill_operation_id = coalesce(kill_operation_id, @operation_id::text)
WHERE id = @id AND deleted_at IS NULL AND on_timeout = 'kill' AND (kill_operation_id IS NOT NULL
    OR status = 'running' AND timeout_sec > 0 AND last_active_at + make_interval(secs => timeout_sec) < now())
RETURNING *;

-- name: DropKill :exec
UPDATE sandboxes SET kill_operation_id = NULL WHERE id = @id AND kill_operation_id = @operation_id::text;
