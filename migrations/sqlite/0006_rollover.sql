-- The mesh CA's rollover. generation counts the mesh CAs from 1. vouched is, as concatenated DER, what makes those who know
-- only the former root accept the present one; empty: nothing.
ALTER TABLE ca ADD COLUMN generation BIGINT NOT NULL DEFAULT 1;
ALTER TABLE ca ADD COLUMN vouched BLOB NOT NULL DEFAULT x'';
ALTER TABLE agent_identity ADD COLUMN generation BIGINT NOT NULL DEFAULT 1;
-- One row, id 'mesh'. other is the CA that does not sign: the next one in phase Started, the former one in Activated.
CREATE TABLE mesh_rollover (
    id                 TEXT   NOT NULL PRIMARY KEY,
    revision           BIGINT NOT NULL, -- rises with each step; nodes look at it
    phase              TEXT   NOT NULL,
    other_chain        BLOB   NOT NULL,
    other_key_uri      TEXT   NOT NULL,
    other_root_key_uri TEXT   NOT NULL,
    vouched            BLOB   NOT NULL, -- of the next CA
    bundle             BIGINT NOT NULL, -- the first trust bundle that holds both roots
    started_at         BIGINT NOT NULL,
    activated_at       BIGINT NOT NULL,
    ended_at           BIGINT NOT NULL
);
-- The newest trust bundle that an agent says it has in force.
CREATE TABLE agent_trust (
    agent_id TEXT   NOT NULL PRIMARY KEY,
    version  BIGINT NOT NULL,
    at       BIGINT NOT NULL
);
