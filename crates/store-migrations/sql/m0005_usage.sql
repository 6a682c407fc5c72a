-- How much a project may use per period, as the operator's configuration says.
CREATE TABLE project_quotas (
  project_id {int} NOT NULL PRIMARY KEY,
  -- hour, day or month, in UTC.
  period TEXT NOT NULL,
  -- Null = no limit.
  jobs {int},
  tokens {int}
);

-- What a project with a quota has used. `told`: bit 1 = 80 % was told, 2 = 95 %, 4 = the limit was met.
CREATE TABLE usage_counters (
  project_id {int} NOT NULL,
  -- jobs or tokens.
  metric TEXT NOT NULL,
  period_start_ms {int} NOT NULL,
  used {int} NOT NULL,
  told {int} NOT NULL,
  PRIMARY KEY (project_id, metric, period_start_ms)
) {keyed};

-- The id that the client gave its request, on endpoints of kind completion.
ALTER TABLE jobs ADD COLUMN request_id TEXT;

-- Whether webhooks heard that the first job of the batch started.
ALTER TABLE batches ADD COLUMN processing_told {int} NOT NULL DEFAULT 0;

-- What was told of a live job between its transitions, and what waits to be told.
CREATE TABLE progress_notices (
  job_id {bytes} NOT NULL PRIMARY KEY,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  told_at_ms {int} NOT NULL,
  -- Bit 1: progress, 2: text of a completion.
  waiting {int} NOT NULL,
  -- The completion's text so far, and the number of the next piece.
  content TEXT NOT NULL,
  next_n {int} NOT NULL,
  -- The last event of each target, 4 + 16 bytes each: while it is pending, that target gets no further one.
  last {bytes} NOT NULL
) {keyed};

CREATE INDEX progress_notices_waiting ON progress_notices (told_at_ms) WHERE waiting > 0;

-- Events that go on (job.progress, completion.streaming) are many and kept for a shorter time.
CREATE INDEX events_passing ON events (created_at_ms) WHERE type IN (7, 21);
