-- name: InsertUser :one
INSERT INTO users (id, email, name, password_hash, is_admin)
VALUES (@id, @email, @name, @password_hash, @is_admin)
ON CONFLICT (email) DO NOTHING
RETURNING *;

-- name: InsertTeam :exec
INSERT INTO teams (id, name) VALUES (@id, @name);

-- name: InsertMembership :exec
INSERT INTO memberships (team_id, user_id, role) VALUES (@team_id, @user_id, @role);

-- name: UserByEmail :one
SELECT * FROM users WHERE email = @email;

-- name: MakeAdmin :exec
UPDATE users SET is_admin = true, password_hash = @password_hash, updated_at = now() WHERE id = @id;

-- name: FirstMembership :one
SELECT * FROM memberships WHERE user_id = @user_id ORDER BY created_at, team_id LIMIT 1;

-- name: MemberByID :one
SELECT u.id, u.email, u.name, u.is_admin, m.team_id, m.role
FROM users u JOIN memberships m ON m.user_id = u.id
WHERE u.id = @user_id AND m.team_id = @team_id;

-- name: TeamExists :one
SELECT EXISTS (SELECT 1 FROM teams WHERE id = @id);

-- name: APIKeyByHash :one
SELECT * FROM api_keys WHERE key_hash = @key_hash;

-- name: TouchAPIKey :exec
UPDATE api_keys SET last_used_at = now()
WHERE id = @id AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute');

-- name: InsertAudit :exec
INSERT INTO audit_log (actor_type, actor_id, team_id, action, subject, details, request_id)
VALUES (@actor_type, @actor_id, @team_id, @action, @subject, @details, @request_id);

-- name: InsertEvent :exec
INSERT INTO events (type, team_id, subject, data) VALUES (@type, @team_id, @subject, @data);

-- name: LockEventOrder :exec
-- One at a time gives events their order, so that it is also the order in which they can be seen.
SELECT pg_advisory_xact_lock(2004178276357);

-- name: OrderEvents :many
UPDATE events e SET seq = o.n
FROM (SELECT w.id, nextval('events_seq') AS n
      FROM (SELECT id FROM events WHERE seq IS NULL AND published_at IS NULL ORDER BY id LIMIT @max_rows) w) o
WHERE e.id = o.id
RETURNING e.id;

-- name: LastEvent :one
SELECT coalesce(max(seq), 0)::bigint FROM events;

-- name: UnpublishedEvents :many
SELECT * FROM events WHERE published_at IS NULL AND seq IS NOT NULL ORDER BY seq LIMIT @max_rows;

-- name: MarkPublished :exec
UPDATE events SET published_at = now() WHERE id = ANY(@ids::bigint[]);

-- name: PurgeEvents :exec
DELETE FROM events WHERE published_at IS NOT NULL AND created_at < now() - interval '7 days';

-- name: InsertSecret :exec
INSERT INTO secrets (name, value) VALUES (@name, @value) ON CONFLICT (name) DO NOTHING;

-- name: Secret :one
SELECT value FROM secrets WHERE name = @name;
