-- What belongs to a team. Every query here is bound to one team by team_id; store.Team is the only
-- caller and fills it in.

-- name: InsertAPIKey :one
INSERT INTO api_keys (id, team_id, name, key_hash, key_prefix, created_by)
VALUES (@id, @team_id, @name, @key_hash, @key_prefix, @created_by)
RETURNING *;

-- name: ListAPIKeys :many
SELECT * FROM api_keys
WHERE team_id = @team_id
  AND (sqlc.narg('after_at')::timestamptz IS NULL OR (created_at, id) < (sqlc.narg('after_at')::timestamptz, @after_id::text))
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: DeleteAPIKey :execrows
DELETE FROM api_keys WHERE team_id = @team_id AND id = @id;

-- name: ListTemplates :many
-- A team's own template hides the platform's of the same name.
SELECT DISTINCT ON (name) * FROM templates
WHERE team_id = @team_id::text OR team_id IS NULL
ORDER BY name, team_id NULLS LAST
LIMIT 1000;

-- name: GetTemplate :one
SELECT * FROM templates
WHERE (team_id = @team_id::text OR team_id IS NULL) AND name = @name
ORDER BY team_id NULLS LAST
LIMIT 1;

-- name: PlacementHosts :many
-- The registered hosts that the team may use, with what is reserved on each: a paused sandbox takes disk only.
SELECT sqlc.embed(h),
    coalesce(r.vcpus, 0)::bigint AS reserved_vcpus, coalesce(r.memory_mb, 0)::bigint AS reserved_memory_mb,
    coalesce(r.disk_mb, 0)::bigint AS reserved_disk_mb, coalesce(r.count, 0)::bigint AS reserved_count,
    EXISTS (SELECT 1 FROM host_templates t WHERE t.host_id = h.id AND t.name = @template::text)::boolean AS has_template
FROM hosts h
LEFT JOIN LATERAL (
    SELECT sum(s.vcpus) FILTER (WHERE s.status <> 'paused') AS vcpus, sum(s.memory_mb) FILTER (WHERE s.status <> 'paused') AS memory_mb,
        sum(s.disk_mb) AS disk_mb, count(*) FILTER (WHERE s.status <> 'paused') AS count
    FROM sandboxes s
    WHERE s.host_id = h.id AND s.deleted_at IS NULL AND (s.status <> 'error' OR s.cleanup_pending)
) r ON true
WHERE h.deleted_at IS NULL AND (h.team_id = @team_id::text OR h.team_id IS NULL)
  AND h.status = 'online' AND h.mtls_enabled
  AND (sqlc.narg('host_id')::text IS NULL OR h.id = sqlc.narg('host_id'));

-- name: InsertSandbox :one
INSERT INTO sandboxes (id, team_id, host_id, name, status, template, default_user, vcpus, memory_mb, disk_mb,
    timeout_sec, on_timeout, auto_resume, metadata, create_env, from_sandbox, from_checkpoint, from_snapshot, disk_only,
    operation_id, operation_until, created_by)
VALUES (@id, @team_id, @host_id, @name, 'creating', @template, @default_user, @vcpus, @memory_mb, @disk_mb,
    @timeout_sec, @on_timeout, @auto_resume, @metadata, @create_env, sqlc.narg('from_sandbox'), sqlc.narg('from_checkpoint'), sqlc.narg('from_snapshot'), @disk_only,
    @operation_id, now() + @lease::interval, @created_by)
ON CONFLICT (id) DO NOTHING
RETURNING *;

-- name: GetSandbox :one
SELECT sqlc.embed(s), (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.id = @id AND s.deleted_at IS NULL;

-- name: SandboxRoute :one
-- Where requests into a sandbox go.
SELECT s.id, s.status, s.auto_resume, s.default_user, s.host_id, h.address, h.cert_fingerprint, h.next_cert_fingerprint, h.mtls_enabled,
    (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.id = @id AND s.deleted_at IS NULL;

-- name: ListSandboxes :many
-- A page of all, newest first: always the same walk along an index, however many there are.
SELECT sqlc.embed(s), (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.deleted_at IS NULL AND (s.created_at, s.id) < (@before_at::timestamptz, @before_id::text)
ORDER BY s.created_at DESC, s.id DESC
LIMIT @max_rows;

-- name: FindSandboxes :many
-- A page of those that match; which index helps depends on what is asked (see Team.FindSandboxes).
SELECT sqlc.embed(s), (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.deleted_at IS NULL AND (s.created_at, s.id) < (@before_at::timestamptz, @before_id::text)
  AND (sqlc.narg('status')::text IS NULL OR s.status = sqlc.narg('status'))
  AND (sqlc.narg('template')::text IS NULL OR s.template = sqlc.narg('template'))
  AND (sqlc.narg('host_id')::text IS NULL OR s.host_id = sqlc.narg('host_id'))
  AND (sqlc.narg('name')::text IS NULL OR s.name = sqlc.narg('name'))
  AND (sqlc.narg('metadata')::jsonb IS NULL OR s.metadata @> sqlc.narg('metadata')::jsonb)
ORDER BY s.created_at DESC, s.id DESC
LIMIT @max_rows;

-- name: TouchSandbox :execrows
UPDATE sandboxes SET last_active_at = greatest(last_active_at, now()), kill_operation_id = NULL, updated_at = now()
WHERE team_id = @team_id AND id = @id AND deleted_at IS NULL AND status = 'running';

-- name: SetSandboxTimeout :execrows
UPDATE sandboxes SET timeout_sec = @timeout_sec, on_timeout = coalesce(sqlc.narg('on_timeout'), on_timeout),
    kill_operation_id = NULL, updated_at = now()
WHERE team_id = @team_id AND id = @id AND deleted_at IS NULL AND status <> 'deleting';

-- name: BeginDelete :one
-- Decides the end of a sandbox, whatever is done to it now: its host does one thing after the other. With
-- kill_operation_id only if that is still intended.
UPDATE sandboxes SET status = 'deleting', operation_id = @operation_id, operation_until = now() + @lease::interval,
    create_env = NULL, updated_at = now()
WHERE team_id = @team_id AND id = @id AND deleted_at IS NULL
  AND (status <> 'deleting' OR operation_until < now())
  AND (sqlc.narg('kill_operation_id')::text IS NULL OR kill_operation_id = sqlc.narg('kill_operation_id'))
RETURNING *;

-- name: BeginChange :one
-- Takes a sandbox whose host is online for a pause or resume, and tells the audit log and the events, in one statement.
WITH taken AS (
    UPDATE sandboxes SET status = @status, operation_id = @operation_id, operation_until = now() + @lease::interval, updated_at = now()
    WHERE sandboxes.team_id = @team_id AND sandboxes.id = @id AND sandboxes.deleted_at IS NULL AND sandboxes.status = @former_status
      AND EXISTS (SELECT 1 FROM hosts WHERE hosts.id = sandboxes.host_id AND hosts.status = 'online' AND hosts.deleted_at IS NULL)
    RETURNING *
), audited AS (
    INSERT INTO audit_log (actor_type, actor_id, team_id, action, subject, request_id)
    SELECT @actor_type, @actor_id, taken.team_id, @action, taken.id, @request_id FROM taken
), told AS (
    INSERT INTO events (type, team_id, subject) SELECT 'sandbox.' || taken.status, taken.team_id, taken.id FROM taken
)
SELECT * FROM taken;

-- name: InsertCheckpoint :execrows
-- Not if the name is taken or the sandbox has as many as it may.
INSERT INTO checkpoints (id, team_id, sandbox_id, name, operation_until, created_by)
SELECT @id, @team_id, @sandbox_id, @name, now() + @lease::interval, @created_by
WHERE (SELECT count(*) FROM checkpoints c WHERE c.team_id = @team_id AND c.sandbox_id = @sandbox_id AND c.deleted_at IS NULL) < @most::bigint
ON CONFLICT DO NOTHING;

-- name: GetCheckpoint :one
SELECT sqlc.embed(c), s.host_id FROM checkpoints c JOIN sandboxes s ON s.id = c.sandbox_id
WHERE c.team_id = @team_id AND c.id = @id;

-- name: ListCheckpoints :many
SELECT * FROM checkpoints
WHERE team_id = @team_id AND sandbox_id = @sandbox_id AND deleted_at IS NULL AND status = 'ready'
ORDER BY created_at, id;

-- name: BeginDeleteCheckpoint :one
UPDATE checkpoints SET status = 'deleting', operation_until = now() + @lease::interval
WHERE team_id = @team_id AND sandbox_id = @sandbox_id AND id = @id AND deleted_at IS NULL AND status IN ('ready', 'deleting')
RETURNING *;

-- name: InsertSnapshot :exec
INSERT INTO snapshots (id, team_id, name, host_id, sandbox_id, template, default_user, vcpus, memory_mb, disk_mb, operation_until, created_by)
VALUES (@id, @team_id, @name, @host_id, @sandbox_id, @template, @default_user, @vcpus, @memory_mb, @disk_mb, now() + @lease::interval, @created_by);

-- name: SnapshotCount :one
SELECT count(*) FROM snapshots WHERE team_id = @team_id AND deleted_at IS NULL;

-- name: GetSnapshot :one
SELECT * FROM snapshots WHERE team_id = @team_id AND id = @id;

-- name: SnapshotByName :one
SELECT * FROM snapshots WHERE team_id = @team_id AND name = @name AND deleted_at IS NULL AND status = 'ready';

-- name: LockSnapshotByName :one
SELECT * FROM snapshots WHERE team_id = @team_id AND name = @name AND deleted_at IS NULL AND status = 'ready' FOR UPDATE;

-- name: ListSnapshots :many
-- Images and the team's snapshots in one list, newest first.
SELECT id, name, type, scope, sandbox_id, template, host_id, vcpus, memory_mb, disk_mb, default_user, has_memory, size_bytes, own_bytes, created_at
FROM (
    SELECT t.id, t.name, 'base'::text AS type, (CASE WHEN t.team_id IS NULL THEN 'platform' ELSE 'team' END)::text AS scope, ''::text AS sandbox_id,
        ''::text AS template, ''::text AS host_id, 0::integer AS vcpus, 0::integer AS memory_mb, t.disk_mb::bigint AS disk_mb, t.default_user,
        false AS has_memory, 0::bigint AS size_bytes, 0::bigint AS own_bytes, t.created_at
    FROM templates t WHERE t.team_id = @team_id::text OR t.team_id IS NULL
    UNION ALL
    SELECT s.id, s.name, 'snapshot', 'team', s.sandbox_id, s.template, s.host_id, s.vcpus, s.memory_mb, s.disk_mb, s.default_user,
        s.has_memory, s.size_bytes, s.own_bytes, s.created_at
    FROM snapshots s WHERE s.team_id = @team_id::text AND s.deleted_at IS NULL AND s.status = 'ready'
) AS all_of_them
WHERE (sqlc.narg('type')::text IS NULL OR type = sqlc.narg('type'))
  AND (sqlc.narg('after_at')::timestamptz IS NULL OR (created_at, id) < (sqlc.narg('after_at')::timestamptz, @after_id::text))
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: SnapshotDependents :many
SELECT id FROM sandboxes WHERE team_id = @team_id AND from_snapshot = @from_snapshot AND deleted_at IS NULL ORDER BY created_at LIMIT @max_rows;

-- name: EventsAfter :many
SELECT * FROM events WHERE team_id = @team_id AND seq > @after ORDER BY seq LIMIT @max_rows;
