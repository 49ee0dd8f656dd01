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
-- The registered hosts that the team may use, with what is reserved on each.
SELECT sqlc.embed(h),
    coalesce(r.vcpus, 0)::bigint AS reserved_vcpus, coalesce(r.memory_mb, 0)::bigint AS reserved_memory_mb,
    coalesce(r.disk_mb, 0)::bigint AS reserved_disk_mb, coalesce(r.count, 0)::bigint AS reserved_count,
    EXISTS (SELECT 1 FROM host_templates t WHERE t.host_id = h.id AND t.name = @template::text)::boolean AS has_template
FROM hosts h
LEFT JOIN LATERAL (
    SELECT sum(s.vcpus) AS vcpus, sum(s.memory_mb) AS memory_mb, sum(s.disk_mb) AS disk_mb, count(*) AS count
    FROM sandboxes s
    WHERE s.host_id = h.id AND s.deleted_at IS NULL AND (s.status <> 'error' OR s.cleanup_pending)
) r ON true
WHERE h.deleted_at IS NULL AND (h.team_id = @team_id::text OR h.team_id IS NULL)
  AND h.status = 'online' AND h.mtls_enabled
  AND (sqlc.narg('host_id')::text IS NULL OR h.id = sqlc.narg('host_id'));

-- name: InsertSandbox :one
INSERT INTO sandboxes (id, team_id, host_id, name, status, template, default_user, vcpus, memory_mb, disk_mb,
    timeout_sec, on_timeout, metadata, create_env, operation_id, operation_until, created_by)
VALUES (@id, @team_id, @host_id, @name, 'creating', @template, @default_user, @vcpus, @memory_mb, @disk_mb,
    @timeout_sec, @on_timeout, @metadata, @create_env, @operation_id, now() + @lease::interval, @created_by)
ON CONFLICT (id) DO NOTHING
RETURNING *;

-- name: GetSandbox :one
SELECT sqlc.embed(s), (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.id = @id AND s.deleted_at IS NULL;

-- name: SandboxRoute :one
-- Where requests into a sandbox go.
SELECT s.id, s.status, s.default_user, s.host_id, h.address, h.cert_fingerprint, h.next_cert_fingerprint, h.mtls_enabled,
    (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.id = @id AND s.deleted_at IS NULL;

-- name: ListSandboxes :many
SELECT sqlc.embed(s), (h.status = 'online' AND h.deleted_at IS NULL)::boolean AS host_online
FROM sandboxes s JOIN hosts h ON h.id = s.host_id
WHERE s.team_id = @team_id AND s.deleted_at IS NULL
  AND (sqlc.narg('status')::text IS NULL OR s.status = sqlc.narg('status'))
  AND (sqlc.narg('template')::text IS NULL OR s.template = sqlc.narg('template'))
  AND (sqlc.narg('host_id')::text IS NULL OR s.host_id = sqlc.narg('host_id'))
  AND (sqlc.narg('name')::text IS NULL OR s.name = sqlc.narg('name'))
  AND (sqlc.narg('metadata')::jsonb IS NULL OR s.metadata @> sqlc.narg('metadata')::jsonb)
  AND (sqlc.narg('after_at')::timestamptz IS NULL OR (s.created_at, s.id) < (sqlc.narg('after_at')::timestamptz, @after_id::text))
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
