-- What the control plane itself does with checkpoints and snapshots. Not for requests: those go through team.sql.

-- name: FinishCheckpoint :one
-- The parent is the one that the host tells, or the nearest above it that is not deleted; one of another
-- sandbox is none.
UPDATE checkpoints c SET status = 'ready', has_memory = @has_memory, size_bytes = @size_bytes, own_bytes = @own_bytes, needs = sqlc.narg('needs'),
    created_at = @created_at, operation_until = NULL, missing_since = NULL,
    parent_id = (SELECT CASE WHEN p.deleted_at IS NULL AND p.status <> 'deleting' THEN p.id ELSE p.parent_id END
                 FROM checkpoints p WHERE p.id = @parent_id::text AND p.sandbox_id = c.sandbox_id AND p.id <> c.id)
WHERE c.id = @id AND c.status = 'saving' AND c.deleted_at IS NULL
RETURNING *;

-- name: DropCheckpoint :execrows
-- For one that did not come to be.
UPDATE checkpoints SET deleted_at = now(), operation_until = NULL
WHERE id = @id AND status = 'saving' AND deleted_at IS NULL AND (operation_until < now() OR @now::boolean);

-- name: AdoptCheckpoint :exec
-- One that a host has and nobody knows, of a sandbox that is known: it is the team's.
INSERT INTO checkpoints (id, team_id, sandbox_id, parent_id, status, has_memory, needs, created_by, created_at)
SELECT @id, s.team_id, s.id, (SELECT p.id FROM checkpoints p WHERE p.id = @parent_id::text AND p.sandbox_id = s.id AND p.deleted_at IS NULL),
    'ready', @has_memory, sqlc.narg('needs'), 'system', @created_at
FROM sandboxes s WHERE s.id = @sandbox_id AND s.host_id = @host_id AND s.deleted_at IS NULL
ON CONFLICT DO NOTHING;

-- name: FinishDeleteCheckpoint :one
UPDATE checkpoints SET deleted_at = now(), operation_until = NULL WHERE id = @id AND status = 'deleting' AND deleted_at IS NULL
RETURNING *;

-- name: ReparentCheckpoints :exec
UPDATE checkpoints c SET parent_id = d.parent_id FROM checkpoints d WHERE d.id = @deleted_id AND c.parent_id = d.id;

-- name: DropCheckpointsOf :exec
UPDATE checkpoints SET deleted_at = now(), operation_until = NULL WHERE sandbox_id = @sandbox_id AND deleted_at IS NULL;

-- name: PutOffCheckpoint :exec
UPDATE checkpoints SET operation_until = now() + @delay::interval WHERE id = @id AND deleted_at IS NULL AND status <> 'ready';

-- name: MarkCheckpoint :execrows
-- Whether its host has it.
UPDATE checkpoints SET missing_since = CASE WHEN @missing::boolean THEN now() END
WHERE id = @id AND status = 'ready' AND deleted_at IS NULL AND (missing_since IS NULL) = @missing::boolean;

-- name: CheckpointsOfHost :many
-- Those of its sandboxes, also deleted ones: they prove that what is left of them is ours to remove.
SELECT c.id, c.sandbox_id, c.status, (c.deleted_at IS NOT NULL)::boolean AS deleted, (c.missing_since IS NOT NULL)::boolean AS missing,
    coalesce(c.operation_until < now(), true)::boolean AS due
FROM checkpoints c JOIN sandboxes s ON s.id = c.sandbox_id WHERE s.host_id = @host_id;

-- name: SnapshotByID :one
SELECT * FROM snapshots WHERE id = @id;

-- name: FinishSnapshot :one
UPDATE snapshots SET status = 'ready', has_memory = @has_memory, size_bytes = @size_bytes, own_bytes = @own_bytes, needs = sqlc.narg('needs'),
    created_at = @created_at, operation_until = NULL
WHERE id = @id AND status = 'saving' AND deleted_at IS NULL
RETURNING *;

-- name: DropSnapshot :execrows
UPDATE snapshots SET deleted_at = now(), operation_until = NULL
WHERE id = @id AND status = 'saving' AND deleted_at IS NULL AND (operation_until < now() OR @now::boolean);

-- name: RetireSnapshot :execrows
-- It can be found by its name no more, and goes when no sandbox made from it is left.
UPDATE snapshots SET status = 'deleting', operation_until = now() + @lease::interval WHERE id = @id AND deleted_at IS NULL AND status <> 'deleting';

-- name: FinishDeleteSnapshot :one
UPDATE snapshots SET deleted_at = now(), operation_until = NULL WHERE id = @id AND status = 'deleting' AND deleted_at IS NULL
RETURNING *;

-- name: PutOffSnapshot :exec
UPDATE snapshots SET operation_until = now() + @delay::interval WHERE id = @id AND deleted_at IS NULL AND status <> 'ready';

-- name: MarkSnapshot :execrows
UPDATE snapshots SET missing_since = CASE WHEN @missing::boolean THEN now() END
WHERE id = @id AND status = 'ready' AND deleted_at IS NULL AND (missing_since IS NULL) = @missing::boolean;

-- name: SnapshotsOfHost :many
SELECT p.id, p.status, (p.deleted_at IS NOT NULL)::boolean AS deleted, (p.missing_since IS NOT NULL)::boolean AS missing,
    coalesce(p.operation_until < now(), true)::boolean AS due,
    EXISTS (SELECT 1 FROM sandboxes s WHERE s.from_snapshot = p.id AND s.deleted_at IS NULL)::boolean AS in_use
FROM snapshots p WHERE p.host_id = @host_id;

-- name: SnapshotCountOfHost :one
SELECT count(*) FROM snapshots WHERE host_id = @host_id AND deleted_at IS NULL;

-- name: HostsWithMoments :many
-- Hosts whose saved moments were not compared for long, or where one waits for its end to be found out.
SELECT h.id FROM hosts h
WHERE h.status = 'online' AND h.deleted_at IS NULL AND h.mtls_enabled
  AND (h.moments_compared_at IS NULL OR h.moments_compared_at < now() - @max_age::interval
       OR EXISTS (SELECT 1 FROM checkpoints c JOIN sandboxes s ON s.id = c.sandbox_id
                  WHERE s.host_id = h.id AND c.deleted_at IS NULL AND c.status <> 'ready' AND c.operation_until < now())
       OR EXISTS (SELECT 1 FROM snapshots p WHERE p.host_id = h.id AND p.deleted_at IS NULL AND p.operation_until < now()
                  AND (p.status = 'saving' OR p.status = 'deleting'
                       AND NOT EXISTS (SELECT 1 FROM sandboxes u WHERE u.from_snapshot = p.id AND u.deleted_at IS NULL))))
ORDER BY h.moments_compared_at NULLS FIRST
LIMIT @max_rows;

-- name: MarkMomentsCompared :exec
UPDATE hosts SET moments_compared_at = now() WHERE id = @id;
