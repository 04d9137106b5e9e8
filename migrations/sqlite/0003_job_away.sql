-- Microseconds for which the job's agent was away since updated_at: the reaper's clock stands still meanwhile.
ALTER TABLE job ADD COLUMN away BIGINT NOT NULL DEFAULT 0;
