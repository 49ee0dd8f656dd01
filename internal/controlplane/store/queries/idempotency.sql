-- name: ClaimIdempotencyKey :one
-- Takes the key if it is new, or if the attempt that had it has died; else gives nothing.
INSERT INTO idempotency_keys AS k (scope, key, request_hash, resource_seed, holder, locked_until)
VALUES (@scope, @key, @request_hash, @resource_seed, @holder, now() + @lease::interval)
ON CONFLICT (scope, key) DO UPDATE
    SET holder = excluded.holder, locked_until = excluded.locked_until
    WHERE k.status = 'running' AND k.locked_until < now() AND k.request_hash = excluded.request_hash
RETURNING *;

-- name: IdempotencyKey :one
SELECT * FROM idempotency_keys WHERE scope = @scope AND key = @key;

-- name: ExtendIdempotencyKey :execrows
UPDATE idempotency_keys SET locked_until = now() + @lease::interval
WHERE scope = @scope AND key = @key AND holder = @holder AND status = 'running';

-- name: FinishIdempotencyKey :exec
UPDATE idempotency_keys SET status = 'done', status_code = @status_code, content_type = @content_type, body = @body
WHERE scope = @scope AND key = @key AND holder = @holder AND status = 'running';

-- name: ReleaseIdempotencyKey :exec
DELETE FROM idempotency_keys
WHERE scope = @scope AND key = @key AND holder = @holder AND status = 'running';

-- name: PurgeIdempotencyKeys :exec
DELETE FROM idempotency_keys WHERE created_at < now() - interval '24 hours' AND (status = 'done' OR locked_until < now());
