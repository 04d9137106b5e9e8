-- When an agent last found the target changed by others; 0: as the last deployment left it.
ALTER TABLE placement ADD COLUMN drifted_at BIGINT NOT NULL DEFAULT 0;
