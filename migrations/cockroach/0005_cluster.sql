-- Who may be a node. A row is made by the first node of an empty store, or against a token; who starts again shows its secret.
CREATE TABLE cluster_node (
    id          TEXT   NOT NULL PRIMARY KEY,
    secret_hash TEXT   NOT NULL, -- SHA-256 of the secret in the node's data directory, hex
    epoch       BIGINT NOT NULL, -- rises with each start: a process with an older one is not this node any more
    instance    TEXT   NOT NULL, -- random per start
    enrolled_at BIGINT NOT NULL,
    started_at  BIGINT NOT NULL,
    removed_at  BIGINT NOT NULL
);
CREATE TABLE cluster_token (
    id         TEXT   NOT NULL PRIMARY KEY,
    hash       BYTEA  NOT NULL, -- SHA-256 of the secret
    node_id    TEXT   NOT NULL, -- who used it; empty: nobody yet
    expires_at BIGINT NOT NULL,
    created_by TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);
