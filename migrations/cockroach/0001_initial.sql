-- Times are BIGINT microseconds since 1970 (UTC), computed by the program; NULL or 0 means never.

CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE sealed_key (
    id          TEXT   NOT NULL PRIMARY KEY,
    purpose     TEXT   NOT NULL,
    kek_id      TEXT   NOT NULL,
    wrapped_dek BYTEA  NOT NULL,
    ciphertext  BYTEA  NOT NULL,
    created_at  BIGINT NOT NULL
);

CREATE TABLE ca (
    id           TEXT   NOT NULL PRIMARY KEY,
    chain        BYTEA  NOT NULL, -- concatenated DER, the signing certificate first, the root last
    key_uri      TEXT   NOT NULL,
    root_key_uri TEXT   NOT NULL,
    public_url   TEXT   NOT NULL,
    created_at   BIGINT NOT NULL
);

CREATE TABLE trust_bundle (
    version    BIGINT NOT NULL PRIMARY KEY,
    roots      BYTEA  NOT NULL, -- concatenated DER
    created_at BIGINT NOT NULL
);

CREATE TABLE join_token (
    id         TEXT   NOT NULL PRIMARY KEY,
    hash       BYTEA  NOT NULL, -- SHA-256 of the secret
    labels     TEXT   NOT NULL,
    max_uses   BIGINT NOT NULL,
    uses       BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT NOT NULL,
    created_by TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE enrollment (
    token_id   TEXT   NOT NULL,
    spki       TEXT   NOT NULL,
    agent_id   TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (token_id, spki)
);

CREATE TABLE agent (
    id            TEXT   NOT NULL PRIMARY KEY,
    name          TEXT   NOT NULL UNIQUE,
    state         TEXT   NOT NULL,
    labels        TEXT   NOT NULL,
    facts         TEXT   NOT NULL,
    capabilities  TEXT   NOT NULL,
    protocol      BIGINT NOT NULL,
    reason        TEXT   NOT NULL,
    created_at    BIGINT NOT NULL,
    last_seen     BIGINT NOT NULL,
    offline_since BIGINT NOT NULL
);
CREATE INDEX agent_state ON agent (state, id);

CREATE TABLE agent_identity (
    serial        TEXT   NOT NULL PRIMARY KEY,
    agent_id      TEXT   NOT NULL,
    spki          TEXT   NOT NULL,
    not_before    BIGINT NOT NULL,
    not_after     BIGINT NOT NULL,
    revoked_at    BIGINT NOT NULL,
    first_used_at BIGINT NOT NULL,
    created_at    BIGINT NOT NULL
);
CREATE INDEX agent_identity_agent ON agent_identity (agent_id, not_after);

CREATE TABLE agent_session (
    agent_id  TEXT   NOT NULL PRIMARY KEY,
    epoch     BIGINT NOT NULL,
    holder    TEXT   NOT NULL,
    boot_id   TEXT   NOT NULL,
    opened_at BIGINT NOT NULL
);

CREATE TABLE agent_rejection (
    agent_id TEXT   NOT NULL,
    kind     TEXT   NOT NULL,
    name     TEXT   NOT NULL,
    version  BIGINT NOT NULL,
    reason   TEXT   NOT NULL,
    at       BIGINT NOT NULL,
    PRIMARY KEY (agent_id, kind, name)
);

CREATE TABLE duty_fence (
    duty     TEXT   NOT NULL PRIMARY KEY,
    epoch    BIGINT NOT NULL,
    holder   TEXT   NOT NULL,
    taken_at BIGINT NOT NULL
);

CREATE TABLE issuer (
    id         TEXT   NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL UNIQUE,
    kind       TEXT   NOT NULL,
    settings   TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE profile (
    id            TEXT   NOT NULL PRIMARY KEY,
    name          TEXT   NOT NULL UNIQUE,
    key_algorithm TEXT   NOT NULL,
    allowed       TEXT   NOT NULL,
    ekus          TEXT   NOT NULL,
    ttl           BIGINT NOT NULL, -- microseconds
    max_ttl       BIGINT NOT NULL,
    created_at    BIGINT NOT NULL
);

CREATE TABLE target (
    id             TEXT    NOT NULL PRIMARY KEY,
    name           TEXT    NOT NULL UNIQUE,
    agent_id       TEXT    NOT NULL,
    kind           TEXT    NOT NULL,
    settings       TEXT    NOT NULL,
    verify_address TEXT    NOT NULL,
    server_name    TEXT    NOT NULL,
    enabled        BOOLEAN NOT NULL,
    created_at     BIGINT  NOT NULL,
    revision       BIGINT  NOT NULL
);
CREATE INDEX target_agent ON target (agent_id, id);

CREATE TABLE certificate (
    id          TEXT   NOT NULL PRIMARY KEY,
    name        TEXT   NOT NULL UNIQUE,
    common_name TEXT   NOT NULL,
    issuer_id   TEXT   NOT NULL,
    profile_id  TEXT   NOT NULL,
    owner       TEXT   NOT NULL,
    policy      TEXT   NOT NULL,
    status      TEXT   NOT NULL,
    not_after   BIGINT NOT NULL,
    status_at   BIGINT, -- when the status may change by time alone; NULL: never
    shard       BIGINT NOT NULL,
    request_id  TEXT UNIQUE, -- NULL: the order cannot be repeated
    created_by  TEXT   NOT NULL,
    created_at  BIGINT NOT NULL,
    updated_at  BIGINT NOT NULL,
    revision    BIGINT NOT NULL
);
CREATE INDEX certificate_status ON certificate (status, id);
CREATE INDEX certificate_issuer ON certificate (issuer_id, id);
CREATE INDEX certificate_profile ON certificate (profile_id, id);
CREATE INDEX certificate_owner ON certificate (owner, id);
CREATE INDEX certificate_status_at ON certificate (shard, status_at) WHERE status_at IS NOT NULL;

CREATE TABLE certificate_san (
    certificate_id TEXT NOT NULL,
    kind           TEXT NOT NULL, -- dns, ip, email, uri
    value          TEXT NOT NULL,
    PRIMARY KEY (certificate_id, kind, value)
);
CREATE INDEX certificate_san_value ON certificate_san (value, certificate_id);

CREATE TABLE leaf (
    certificate_id     TEXT    NOT NULL,
    agent_id           TEXT    NOT NULL,
    generation         BIGINT  NOT NULL, -- highest ordered
    current_generation BIGINT  NOT NULL, -- last issued, 0: none
    serial             TEXT    NOT NULL,
    not_before         BIGINT  NOT NULL,
    not_after          BIGINT  NOT NULL,
    due_at             BIGINT,           -- when the renewal duty looks again; NULL while a job is open, or never
    failures           BIGINT  NOT NULL,
    backoff_until      BIGINT  NOT NULL,
    last_error         TEXT    NOT NULL,
    revoked            BOOLEAN NOT NULL,
    shard              BIGINT  NOT NULL,
    PRIMARY KEY (certificate_id, agent_id)
);
CREATE INDEX leaf_due ON leaf (shard, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX leaf_agent ON leaf (agent_id, certificate_id);

CREATE TABLE placement (
    certificate_id        TEXT   NOT NULL,
    target_id             TEXT   NOT NULL,
    agent_id              TEXT   NOT NULL,
    state                 TEXT   NOT NULL,
    installed_generation  BIGINT NOT NULL,
    served_generation     BIGINT NOT NULL,
    installed_fingerprint TEXT   NOT NULL,
    served_fingerprint    TEXT   NOT NULL,
    served_at             BIGINT NOT NULL,
    due_at                BIGINT,          -- when "desired is not actual" is looked at; NULL: it is as desired
    failures              BIGINT NOT NULL,
    backoff_until         BIGINT NOT NULL,
    last_error            TEXT   NOT NULL,
    shard                 BIGINT NOT NULL,
    updated_at            BIGINT NOT NULL,
    PRIMARY KEY (certificate_id, target_id)
);
CREATE INDEX placement_due ON placement (shard, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX placement_agent ON placement (agent_id, certificate_id);
CREATE INDEX placement_target ON placement (target_id, certificate_id);

CREATE TABLE intent (
    id             TEXT   NOT NULL PRIMARY KEY,
    certificate_id TEXT   NOT NULL,
    agent_id       TEXT   NOT NULL,
    generation     BIGINT NOT NULL,
    job_id         TEXT   NOT NULL,
    attempt        BIGINT NOT NULL,
    issuer_id      TEXT   NOT NULL,
    serial         TEXT,  -- NULL: chosen by an external CA
    tbs            BYTEA,
    order_key      TEXT   NOT NULL,
    ref            TEXT   NOT NULL,
    spki           TEXT   NOT NULL,
    state          TEXT   NOT NULL,
    recovery       BIGINT NOT NULL,
    created_at     BIGINT NOT NULL,
    UNIQUE (certificate_id, agent_id, generation),
    UNIQUE (issuer_id, serial)
);

CREATE TABLE version (
    issuer_id         TEXT   NOT NULL,
    serial            TEXT   NOT NULL,
    certificate_id    TEXT   NOT NULL,
    agent_id          TEXT   NOT NULL,
    generation        BIGINT NOT NULL,
    der               BYTEA  NOT NULL,
    chain             BYTEA  NOT NULL, -- concatenated DER without leaf and root
    fingerprint       TEXT   NOT NULL,
    spki              TEXT   NOT NULL,
    key_algorithm     TEXT   NOT NULL,
    not_before        BIGINT NOT NULL,
    not_after         BIGINT NOT NULL,
    revoked_at        BIGINT,
    revocation_reason BIGINT NOT NULL,
    created_at        BIGINT NOT NULL,
    PRIMARY KEY (issuer_id, serial),
    UNIQUE (certificate_id, agent_id, generation)
);
CREATE INDEX version_fingerprint ON version (fingerprint);
CREATE INDEX version_revoked ON version (issuer_id, revoked_at) WHERE revoked_at IS NOT NULL;

CREATE TABLE job (
    id             TEXT   NOT NULL PRIMARY KEY,
    kind           TEXT   NOT NULL,
    state          TEXT   NOT NULL,
    certificate_id TEXT   NOT NULL,
    agent_id       TEXT   NOT NULL,
    target_id      TEXT   NOT NULL,
    generation     BIGINT NOT NULL,
    attempt        BIGINT NOT NULL,
    tries          BIGINT NOT NULL,
    max_tries      BIGINT NOT NULL,
    run_at         BIGINT NOT NULL,
    accepted_at    BIGINT NOT NULL,
    error_class    TEXT   NOT NULL,
    error          TEXT   NOT NULL,
    reason         TEXT   NOT NULL,
    request_id     TEXT   NOT NULL,
    -- open_key holds at most one open job per key: "leaf:<certificate>:<agent>" for issuance and renewal,
    -- "placement:<certificate>:<target>" for deployment and validation. NULL once finished. A nullable unique column
    -- says the same as a unique partial index and needs no predicate repeated in ON CONFLICT.
    open_key       TEXT UNIQUE,
    shard          BIGINT NOT NULL,
    created_at     BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    finished_at    BIGINT
);
CREATE INDEX job_agent_open ON job (agent_id, id) WHERE finished_at IS NULL;
CREATE INDEX job_certificate ON job (certificate_id, id);
CREATE INDEX job_state ON job (state, id);
CREATE INDEX job_finished ON job (shard, finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE crl (
    issuer_id   TEXT   NOT NULL,
    shard       BIGINT NOT NULL,
    number      BIGINT NOT NULL,
    der         BYTEA  NOT NULL,
    this_update BIGINT NOT NULL,
    next_update BIGINT NOT NULL,
    revoked     BIGINT NOT NULL,
    PRIMARY KEY (issuer_id, shard)
);

CREATE TABLE api_key (
    id         TEXT   NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL UNIQUE,
    role       TEXT   NOT NULL,
    hash       BYTEA  NOT NULL UNIQUE, -- SHA-256 of the secret
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE audit (
    id          TEXT   NOT NULL PRIMARY KEY,
    at          BIGINT NOT NULL,
    actor       TEXT   NOT NULL,
    action      TEXT   NOT NULL,
    resource    TEXT   NOT NULL,
    outcome     TEXT   NOT NULL,
    request_id  TEXT   NOT NULL,
    remote_addr TEXT   NOT NULL,
    detail      TEXT   NOT NULL
);
CREATE INDEX audit_resource ON audit (resource, id);
