-- Lists read their page from an index alone (docs/lists.md names the index of each). By owner alone the stretches of every
-- status are merged, so that certificate_owner_status does what certificate_owner did.
CREATE INDEX certificate_expiry ON certificate (status, not_after, id);
CREATE INDEX certificate_owner_status ON certificate (owner, status, id);
DROP INDEX IF EXISTS certificate_owner;
-- Written once a job: while it is open job_agent_open has it.
CREATE INDEX job_agent_finished ON job (agent_id, state, id) WHERE finished_at IS NOT NULL;
