-- Whose certificate the job is for, as it was when the job was made; '' in jobs of before: they are a lane of their own until
-- they have ended, so that nothing is filled in.
ALTER TABLE job ADD COLUMN owner TEXT NOT NULL DEFAULT '';
-- A window of an agent's open work is read from it: by owner and kind, what is due first.
CREATE INDEX job_lane ON job (agent_id, owner, kind, run_at, id) WHERE finished_at IS NULL AND state <> 'AwaitingApproval';
