-- Hosts. `team_id` narrows to one team's hosts; null (admins and the control plane itself) sees all.

-- name: InsertHost :one
INSERT INTO hosts (id, type, team_id, provider, availability_zone, created_by)
VALUES (@id, @type, @team_id, @provider, @availability_zone, @created_by)
RETURNING *;

-- name: InsertHostToken :exec
INSERT INTO host_tokens (id, host_id, token_hash, created_by, expires_at)
VALUES (@id, @host_id, @token_hash, @created_by, @expires_at);

-- name: SupersedeHostTokens :many
UPDATE host_tokens SET status = 'superseded' WHERE host_id = @host_id AND status = 'issued' RETURNING token_hash;

-- name: UseHostToken :execrows
UPDATE host_tokens SET status = 'used', used_at = now()
WHERE token_hash = @token_hash AND host_id = @host_id AND status = 'issued' AND expires_at > now();

-- name: GetHost :one
SELECT * FROM hosts
WHERE id = @id AND deleted_at IS NULL AND (sqlc.narg('team_id')::text IS NULL OR team_id = sqlc.narg('team_id'));

-- name: LockHost :one
SELECT * FROM hosts
WHERE id = @id AND deleted_at IS NULL AND (sqlc.narg('team_id')::text IS NULL OR team_id = sqlc.narg('team_id'))
FOR NO KEY UPDATE;

-- name: SandboxCount :one
SELECT count(*) FROM sandboxes WHERE host_id = @host_id AND deleted_at IS NULL;

-- name: ListHosts :many
SELECT sqlc.embed(h), (SELECT count(*) FROM sandboxes s WHERE s.host_id = h.id AND s.deleted_at IS NULL) AS sandboxes
FROM hosts h
WHERE h.deleted_at IS NULL
  AND (sqlc.narg('team_id')::text IS NULL OR h.team_id = sqlc.narg('team_id'))
  AND (sqlc.narg('status')::text IS NULL OR h.status = sqlc.narg('status'))
  AND (sqlc.narg('type')::text IS NULL OR h.type = sqlc.narg('type'))
  AND (sqlc.narg('tag')::text IS NULL OR EXISTS (SELECT 1 FROM host_tags t WHERE t.host_id = h.id AND t.tag = sqlc.narg('tag')))
  AND (sqlc.narg('after_at')::timestamptz IS NULL OR (h.created_at, h.id) < (sqlc.narg('after_at')::timestamptz, @after_id::text))
ORDER BY h.created_at DESC, h.id DESC
LIMIT @max_rows;

-- name: RegisterHost :one
UPDATE hosts SET
    status = 'online', arch = @arch, cpu_cores = @cpu_cores, memory_mb = @memory_mb, disk_gb = @disk_gb, address = @address,
    cert_fingerprint = @cert_fingerprint, mtls_enabled = @mtls_enabled, last_heartbeat_at = now(), updated_at = now()
WHERE id = @id AND status = 'pending' AND deleted_at IS NULL
RETURNING *;

-- name: Heartbeat :one
UPDATE hosts SET
    status = 'online', last_heartbeat_at = now(),
    updated_at = CASE WHEN status = 'online' AND NOT @has_specs::boolean THEN updated_at ELSE now() END,
    arch = coalesce(sqlc.narg('arch'), arch),
    cpu_cores = coalesce(sqlc.narg('cpu_cores'), cpu_cores),
    memory_mb = coalesce(sqlc.narg('memory_mb'), memory_mb),
    disk_gb = coalesce(sqlc.narg('disk_gb'), disk_gb),
    draining = coalesce(sqlc.narg('draining'), draining),
    versions = coalesce(sqlc.narg('versions'), versions),
    driver = coalesce(sqlc.narg('driver'), driver),
    acceleration = coalesce(sqlc.narg('acceleration'), acceleration),
    cpu_model = coalesce(sqlc.narg('cpu_model'), cpu_model),
    hypervisors = coalesce(sqlc.narg('hypervisors'), hypervisors),
    capacity_vcpus = coalesce(sqlc.narg('capacity_vcpus'), capacity_vcpus),
    capacity_memory_mb = coalesce(sqlc.narg('capacity_memory_mb'), capacity_memory_mb),
    capacity_disk_mb = coalesce(sqlc.narg('capacity_disk_mb'), capacity_disk_mb),
    free_memory_mb = coalesce(sqlc.narg('free_memory_mb'), free_memory_mb),
    free_disk_mb = coalesce(sqlc.narg('free_disk_mb'), free_disk_mb),
    load1 = coalesce(sqlc.narg('load1'), load1),
    running = coalesce(sqlc.narg('running'), running),
    sandboxes_limit = coalesce(sqlc.narg('sandboxes_limit'), sandboxes_limit),
    state_revision = coalesce(sqlc.narg('state_revision'), state_revision),
    cert_fingerprint = CASE WHEN next_cert_fingerprint = sqlc.narg('served') THEN next_cert_fingerprint ELSE cert_fingerprint END,
    next_cert_fingerprint = CASE WHEN next_cert_fingerprint = sqlc.narg('served') THEN NULL ELSE next_cert_fingerprint END
WHERE id = @id AND deleted_at IS NULL AND status <> 'pending'
RETURNING id, type, team_id, mtls_enabled;

-- name: MoveHost :execrows
UPDATE hosts SET address = @address::text, updated_at = now()
WHERE id = @id AND deleted_at IS NULL AND status <> 'pending' AND address IS DISTINCT FROM @address::text;

-- name: OfferCertificate :exec
UPDATE hosts SET next_cert_fingerprint = @fingerprint WHERE id = @id AND deleted_at IS NULL AND mtls_enabled;

-- name: DeleteHost :execrows
UPDATE hosts SET deleted_at = now(), updated_at = now() WHERE id = @id AND deleted_at IS NULL;

-- name: HostTags :many
SELECT tag FROM host_tags WHERE host_id = @host_id ORDER BY tag;

-- name: AddHostTag :exec
INSERT INTO host_tags (host_id, tag) VALUES (@host_id, @tag) ON CONFLICT DO NOTHING;

-- name: RemoveHostTag :execrows
DELETE FROM host_tags WHERE host_id = @host_id AND tag = @tag;

-- name: ClearHost :exec
WITH tags AS (DELETE FROM host_tags t WHERE t.host_id = @host_id)
DELETE FROM host_templates p WHERE p.host_id = @host_id;

-- name: MarkSilentHostsOffline :many
UPDATE hosts SET status = 'offline', updated_at = now()
WHERE status = 'online' AND deleted_at IS NULL AND last_heartbeat_at < now() - @silence::interval
RETURNING id, team_id;

-- name: HostsByStatus :many
SELECT status, type, count(*) FROM hosts WHERE deleted_at IS NULL GROUP BY status, type;

-- name: HostsToReconcile :many
-- Hosts whose state has moved since it was last compared, or that were not compared for long.
SELECT id, address, cert_fingerprint, next_cert_fingerprint, state_revision FROM hosts
WHERE status = 'online' AND deleted_at IS NULL AND mtls_enabled
  AND (applied_revision <> state_revision OR reconciled_at IS NULL OR reconciled_at < now() - @max_age::interval)
ORDER BY reconciled_at NULLS FIRST
LIMIT @max_rows;

-- name: MarkReconciled :exec
-- The host's own list is newer than what its last heartbeat said, unless another came meanwhile.
UPDATE hosts SET applied_revision = @revision, reconciled_at = now(),
    state_revision = CASE WHEN state_revision = @seen_revision THEN @revision ELSE state_revision END
WHERE id = @id;

-- name: UpsertTemplates :exec
INSERT INTO templates AS t (id, team_id, name, sha256, disk_mb, default_user)
SELECT unnest(@ids::text[]), sqlc.narg('team_id')::text, unnest(@names::text[]), unnest(@sha256s::text[]),
    unnest(@disk_mbs::bigint[]), unnest(@default_users::text[])
ON CONFLICT (coalesce(team_id, ''), name) DO UPDATE
    SET sha256 = excluded.sha256, disk_mb = excluded.disk_mb, default_user = excluded.default_user, updated_at = now()
    WHERE (t.sha256, t.disk_mb, t.default_user) IS DISTINCT FROM (excluded.sha256, excluded.disk_mb, excluded.default_user);

-- name: HostTemplates :many
SELECT name, sha256 FROM host_templates WHERE host_id = @host_id ORDER BY name;

-- name: DropHostTemplates :exec
DELETE FROM host_templates WHERE host_id = @host_id AND NOT (name = ANY(@names::text[]));

-- name: SetHostTemplates :exec
INSERT INTO host_templates AS t (host_id, name, sha256)
SELECT @host_id::text, unnest(@names::text[]), unnest(@sha256s::text[])
ON CONFLICT (host_id, name) DO UPDATE SET sha256 = excluded.sha256 WHERE t.sha256 <> excluded.sha256;

-- name: LockSystemHost :exec
SELECT pg_advisory_xact_lock(2004178276356);

-- name: SystemHost :one
SELECT * FROM hosts WHERE created_by = 'system' AND deleted_at IS NULL ORDER BY created_at LIMIT 1;

-- name: AbandonSandboxes :execrows
-- For a host that goes away for good: what its owners had decided to delete, and what never came to be.
UPDATE sandboxes SET deleted_at = now(), status = 'deleting', operation_until = NULL, cleanup_pending = false, updated_at = now()
WHERE host_id = @host_id AND deleted_at IS NULL AND status IN ('deleting', 'error');
