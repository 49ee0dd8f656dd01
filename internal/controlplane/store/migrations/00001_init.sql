-- +goose Up
CREATE TABLE users (
    id            text PRIMARY KEY,
    email         text NOT NULL UNIQUE CHECK (email = lower(email) AND length(email) BETWEEN 3 AND 254),
    name          text NOT NULL DEFAULT '' CHECK (length(name) <= 128),
    password_hash text NOT NULL,
    is_admin      boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE teams (
    id         text PRIMARY KEY,
    name       text NOT NULL CHECK (length(name) BETWEEN 1 AND 256),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE memberships (
    team_id    text NOT NULL REFERENCES teams ON DELETE CASCADE,
    user_id    text NOT NULL REFERENCES users ON DELETE CASCADE,
    role       text NOT NULL CHECK (role IN ('owner', 'member')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, user_id)
);
CREATE INDEX memberships_user ON memberships (user_id, created_at);

CREATE TABLE api_keys (
    id           text PRIMARY KEY,
    team_id      text NOT NULL REFERENCES teams ON DELETE CASCADE,
    name         text NOT NULL CHECK (length(name) BETWEEN 1 AND 128),
    key_hash     bytea NOT NULL UNIQUE CHECK (length(key_hash) = 32),
    key_prefix   text NOT NULL,
    created_by   text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
CREATE INDEX api_keys_team ON api_keys (team_id, created_at DESC, id DESC);

-- A deleted host keeps its row, so that the history of tokens and sandboxes stays whole.
CREATE TABLE hosts (
    id                 text PRIMARY KEY,
    type               text NOT NULL CHECK (type IN ('regular', 'byoc')),
    team_id            text REFERENCES teams,
    provider           text,
    availability_zone  text,
    arch               text,
    cpu_cores          integer CHECK (cpu_cores > 0),
    memory_mb          bigint CHECK (memory_mb > 0),
    disk_gb            bigint CHECK (disk_gb >= 0),
    address            text,
    status             text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'online', 'offline')),
    last_heartbeat_at  timestamptz,
    created_by         text NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    deleted_at         timestamptz,
    -- what heartbeats report
    draining           boolean NOT NULL DEFAULT false,
    versions           jsonb NOT NULL DEFAULT '{}',
    driver             text,
    acceleration       text,
    cpu_model          text,
    capacity_vcpus     integer,
    capacity_memory_mb bigint,
    capacity_disk_mb   bigint,
    free_memory_mb     bigint,
    free_disk_mb       bigint,
    load1              double precision,
    running            integer,
    sandboxes_limit    integer NOT NULL DEFAULT 0,
    state_revision     bigint NOT NULL DEFAULT 0,
    -- which of those the control plane has compared with its own rows, and when
    applied_revision   bigint NOT NULL DEFAULT -1,
    reconciled_at      timestamptz,
    CHECK ((type = 'byoc') = (team_id IS NOT NULL)),
    CHECK (status = 'pending' OR address IS NOT NULL)
);
CREATE INDEX hosts_live ON hosts (created_at DESC, id DESC) WHERE deleted_at IS NULL;
CREATE INDEX hosts_team ON hosts (team_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;
CREATE INDEX hosts_online ON hosts (last_heartbeat_at) WHERE status = 'online' AND deleted_at IS NULL;

-- The audit trail of one-time tokens; the tokens themselves live in Redis for an hour.
CREATE TABLE host_tokens (
    id         text PRIMARY KEY,
    host_id    text NOT NULL REFERENCES hosts,
    token_hash bytea NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    status     text NOT NULL DEFAULT 'issued' CHECK (status IN ('issued', 'used', 'superseded')),
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz,
    CHECK ((status = 'used') = (used_at IS NOT NULL))
);
CREATE INDEX host_tokens_host ON host_tokens (host_id, created_at);

CREATE TABLE host_tags (
    host_id    text NOT NULL REFERENCES hosts,
    tag        text NOT NULL CHECK (length(tag) BETWEEN 1 AND 63),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (host_id, tag)
);

-- team_id is null for the platform's own.
CREATE TABLE templates (
    id           text PRIMARY KEY,
    team_id      text REFERENCES teams,
    name         text NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    sha256       text NOT NULL DEFAULT '',
    disk_mb      bigint NOT NULL DEFAULT 0 CHECK (disk_mb >= 0),
    default_user text NOT NULL DEFAULT 'user',
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX templates_name ON templates (coalesce(team_id, ''), name);

-- Which templates a host has now, as its last heartbeat said.
CREATE TABLE host_templates (
    host_id text NOT NULL REFERENCES hosts,
    name    text NOT NULL,
    sha256  text NOT NULL DEFAULT '',
    PRIMARY KEY (host_id, name)
);

-- A live row is also the reservation of its resources on its host. A deleted sandbox keeps its row as
-- the proof that what a host may still report under its id is ours to remove.
CREATE TABLE sandboxes (
    id              text PRIMARY KEY,
    team_id         text NOT NULL REFERENCES teams,
    host_id         text NOT NULL REFERENCES hosts,
    name            text,
    status          text NOT NULL CHECK (status IN ('creating', 'running', 'pausing', 'paused', 'resuming', 'deleting', 'error')),
    reason          text,
    template        text NOT NULL,
    default_user    text NOT NULL,
    vcpus           integer NOT NULL CHECK (vcpus > 0),
    memory_mb       integer NOT NULL CHECK (memory_mb > 0),
    disk_mb         integer NOT NULL CHECK (disk_mb > 0),
    timeout_sec     integer NOT NULL DEFAULT 0 CHECK (timeout_sec >= 0),
    on_timeout      text NOT NULL DEFAULT 'pause' CHECK (on_timeout IN ('pause', 'kill')),
    metadata        jsonb NOT NULL DEFAULT '{}',
    create_env      jsonb, -- only while creating, so that a create can be repeated
    revision        bigint NOT NULL DEFAULT 0,
    operation_id    text NOT NULL,
    operation_until timestamptz, -- until then the replica that works on it has it; later anyone may go on
    cleanup_pending boolean NOT NULL DEFAULT false, -- a failed create that its host may still have something of
    missing_since   timestamptz, -- since when its host does not report it
    created_by      text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    started_at      timestamptz,
    last_active_at  timestamptz,
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE INDEX sandboxes_team ON sandboxes (team_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;
CREATE INDEX sandboxes_host ON sandboxes (host_id) WHERE deleted_at IS NULL;
CREATE INDEX sandboxes_metadata ON sandboxes USING gin (metadata jsonb_path_ops) WHERE deleted_at IS NULL;
CREATE INDEX sandboxes_work ON sandboxes (operation_until)
    WHERE deleted_at IS NULL AND (status IN ('creating', 'deleting') OR cleanup_pending);
CREATE INDEX sandboxes_deleted ON sandboxes (deleted_at) WHERE deleted_at IS NOT NULL;

-- The outbox: written in the transaction of the change it tells of.
CREATE TABLE events (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    type         text NOT NULL,
    team_id      text,
    subject      text NOT NULL,
    data         jsonb NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT now(),
    published_at timestamptz
);
CREATE INDEX events_unpublished ON events (id) WHERE published_at IS NULL;
CREATE INDEX events_created ON events (created_at);

CREATE TABLE audit_log (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT now(),
    actor_type text NOT NULL CHECK (actor_type IN ('user', 'api_key', 'host', 'system', 'anonymous')),
    actor_id   text NOT NULL,
    team_id    text,
    action     text NOT NULL,
    subject    text NOT NULL,
    details    jsonb NOT NULL DEFAULT '{}',
    request_id text NOT NULL DEFAULT ''
);
CREATE INDEX audit_log_subject ON audit_log (subject, id);

-- What the control plane keeps for itself, encrypted with WRENN_ENCRYPTION_KEY.
CREATE TABLE secrets (
    name       text PRIMARY KEY,
    value      bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE idempotency_keys (
    scope         text NOT NULL,
    key           text NOT NULL CHECK (length(key) BETWEEN 1 AND 128),
    request_hash  bytea NOT NULL,
    resource_seed text NOT NULL, -- ids that the request makes are derived from it, so that a repetition finds them
    status        text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'done')),
    holder        text NOT NULL, -- which attempt works on it
    locked_until  timestamptz NOT NULL,
    status_code   integer,
    content_type  text,
    body          bytea,
    created_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, key)
);
CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);

-- +goose Down
DROP TABLE idempotency_keys, secrets, audit_log, events, sandboxes, host_templates, templates, host_tags,
    host_tokens, hosts, api_keys, memberships, teams, users;
