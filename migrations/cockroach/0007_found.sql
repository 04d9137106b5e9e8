-- Leaves of our own CAs that agents hold and that no version could be made of: after a restore from a backup older than they
-- are, with an order that was lost with it. They are revocable, and listed.
CREATE TABLE found_leaf (
    issuer_id         TEXT   NOT NULL,
    serial            TEXT   NOT NULL,
    agent_id          TEXT   NOT NULL, -- who reported it
    certificate_id    TEXT   NOT NULL, -- as the agent says
    generation        BIGINT NOT NULL, -- as the agent says
    der               BYTEA  NOT NULL,
    fingerprint       TEXT   NOT NULL,
    not_after         BIGINT NOT NULL,
    reason            TEXT   NOT NULL, -- why it is no version
    revoked_at        BIGINT,
    revocation_reason BIGINT NOT NULL,
    found_at          BIGINT NOT NULL,
    PRIMARY KEY (issuer_id, serial)
);
CREATE INDEX found_leaf_revoked ON found_leaf (issuer_id, revoked_at) WHERE revoked_at IS NOT NULL;
