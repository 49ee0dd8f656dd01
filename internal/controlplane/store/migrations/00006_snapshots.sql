-- +goose Up
ALTER TABLE sandboxes
    ADD COLUMN auto_resume boolean NOT NULL DEFAULT false,
    ADD COLUMN cold boolean NOT NULL DEFAULT false, -- it was booted, not restored
    ADD COLUMN durable_at timestamptz, -- since when its paused state survives a power cut
    ADD COLUMN needs jsonb, -- what can resume its saved memory, while it is paused
    -- What it was made from, if not from a template's image. Where only the sandbox is set it is a fork.
    ADD COLUMN from_sandbox text,
    ADD COLUMN from_checkpoint text,
    ADD COLUMN from_snapshot text;
CREATE INDEX sandboxes_from_snapshot ON sandboxes (from_snapshot) WHERE from_snapshot IS NOT NULL AND deleted_at IS NULL;
DROP INDEX sandboxes_work;
CREATE INDEX sandboxes_work ON sandboxes (operation_until)
    WHERE deleted_at IS NULL AND (status IN ('creating', 'deleting', 'pausing', 'resuming') OR cleanup_pending);

-- Saved moments of sandboxes. `saving` and `deleting` rows belong to an operation until operation_until;
-- then whoever comes asks the host what became of it. A deleted row stays as the proof that what a host may
-- still have under its id is ours to remove.
CREATE TABLE checkpoints (
    id              text PRIMARY KEY,
    team_id         text NOT NULL REFERENCES teams,
    sandbox_id      text NOT NULL REFERENCES sandboxes ON DELETE CASCADE,
    name            text CHECK (length(name) BETWEEN 1 AND 63),
    parent_id       text, -- the nearest one above that is not deleted
    status          text NOT NULL DEFAULT 'saving' CHECK (status IN ('saving', 'ready', 'deleting')),
    has_memory      boolean NOT NULL DEFAULT false,
    size_bytes      bigint NOT NULL DEFAULT 0, -- as last told
    own_bytes       bigint NOT NULL DEFAULT 0,
    needs           jsonb,
    operation_until timestamptz,
    missing_since   timestamptz, -- since when its host does not have it
    created_by      text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE INDEX checkpoints_sandbox ON checkpoints (sandbox_id, created_at);
CREATE UNIQUE INDEX checkpoints_name ON checkpoints (sandbox_id, name) WHERE deleted_at IS NULL AND status <> 'deleting';
CREATE INDEX checkpoints_work ON checkpoints (operation_until) WHERE deleted_at IS NULL AND status <> 'ready';

-- Moments that became templates of a team, each on the host it was taken on. A name is one's own once the
-- snapshot is ready; one that was overwritten is `deleting` until no sandbox made from it is left.
CREATE TABLE snapshots (
    id              text PRIMARY KEY,
    team_id         text NOT NULL REFERENCES teams,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    host_id         text NOT NULL REFERENCES hosts,
    sandbox_id      text NOT NULL,
    template        text NOT NULL,
    default_user    text NOT NULL,
    vcpus           integer NOT NULL CHECK (vcpus > 0),
    memory_mb       integer NOT NULL CHECK (memory_mb > 0),
    disk_mb         integer NOT NULL CHECK (disk_mb > 0),
    status          text NOT NULL DEFAULT 'saving' CHECK (status IN ('saving', 'ready', 'deleting')),
    has_memory      boolean NOT NULL DEFAULT false,
    size_bytes      bigint NOT NULL DEFAULT 0,
    own_bytes       bigint NOT NULL DEFAULT 0,
    needs           jsonb,
    operation_until timestamptz,
    missing_since   timestamptz,
    created_by      text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE UNIQUE INDEX snapshots_name ON snapshots (team_id, name) WHERE deleted_at IS NULL AND status = 'ready';
CREATE INDEX snapshots_host ON snapshots (host_id);
CREATE INDEX snapshots_work ON snapshots (operation_until) WHERE deleted_at IS NULL AND status <> 'ready';

ALTER TABLE hosts ADD COLUMN moments_compared_at timestamptz;

-- The order in which events are told. Ids do not give it: a lower one may be committed later.
CREATE SEQUENCE events_seq;
ALTER TABLE events ADD COLUMN seq bigint;
CREATE UNIQUE INDEX events_order ON events (seq) WHERE seq IS NOT NULL;
CREATE INDEX events_team ON events (team_id, seq) WHERE seq IS NOT NULL;

-- +goose Down
DROP INDEX events_team, events_order;
ALTER TABLE events DROP COLUMN seq;
DROP SEQUENCE events_seq;
ALTER TABLE hosts DROP COLUMN moments_compared_at;
DROP TABLE snapshots, checkpoints;
DROP INDEX sandboxes_work, sandboxes_from_snapshot;
CREATE INDEX sandboxes_work ON sandboxes (operation_until)
    WHERE deleted_at IS NULL AND (status IN ('creating', 'deleting') OR cleanup_pending);
ALTER TABLE sandboxes DROP COLUMN from_snapshot, DROP COLUMN from_checkpoint, DROP COLUMN from_sandbox, DROP COLUMN needs,
    DROP COLUMN durable_at, DROP COLUMN cold, DROP COLUMN auto_resume;
