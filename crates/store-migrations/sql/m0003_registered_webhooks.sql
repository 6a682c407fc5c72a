-- Places that hear of many jobs. Written by api-ingest only; what the dispatcher finds out about a webhook lies in
-- `webhook_health`. The number of a registered target in `deliveries.target` is 65536 + id.
CREATE TABLE webhooks (
  id {id},
  public_id TEXT NOT NULL UNIQUE,
  project_id {int} NOT NULL,
  label TEXT NOT NULL,
  -- Null: nothing is sent, its deliveries are read from the feed.
  url TEXT,
  -- 0 standard, 1 runflow, 2 runpod.
  format {int} NOT NULL,
  -- JSON: event patterns, endpoints, metadata.
  filter TEXT NOT NULL,
  -- JSON object of further headers, encrypted with the key file.
  headers_encrypted {bytes},
  -- JSON: profile or own waits; null = the operator's profile.
  retry TEXT,
  rate_per_second {int},
  deadline_ms {int},
  strict_order {int} NOT NULL,
  paused {int} NOT NULL,
  -- Rises when a person enables it again: a disabling is true for one epoch only.
  enable_epoch {int} NOT NULL,
  expires_at_ms {int},
  created_at_ms {int} NOT NULL,
  updated_at_ms {int} NOT NULL,
  -- Deleted ones stay until no delivery names them.
  deleted_at_ms {int}
);

CREATE INDEX webhooks_project ON webhooks (project_id, id);

-- Secrets that sign for one webhook. All that have not expired sign, newest first.
CREATE TABLE webhook_secrets (
  id {id},
  webhook_id {int} NOT NULL,
  secret_encrypted {bytes} NOT NULL,
  created_at_ms {int} NOT NULL,
  expires_at_ms {int}
);

CREATE INDEX webhook_secrets_webhook ON webhook_secrets (webhook_id, id);

-- What the dispatcher knows of a webhook. Disabled = disabled_epoch equals webhooks.enable_epoch.
CREATE TABLE webhook_health (
  webhook_id {int} NOT NULL PRIMARY KEY,
  failing_since_ms {int},
  -- The same of the failures that ended in the last disabling.
  last_failing_since_ms {int},
  last_success_at_ms {int},
  disabled_epoch {int},
  disabled_at_ms {int},
  disabled_reason TEXT
);

-- Events that are not a transition of a job or batch: they own their deliveries, with seq 1.
CREATE TABLE events (
  id {bytes} NOT NULL PRIMARY KEY,
  project_id {int} NOT NULL,
  type {int} NOT NULL,
  -- What it is about: job, batch, artefact, webhook or delivery, as text.
  subject TEXT NOT NULL,
  created_at_ms {int} NOT NULL,
  owed {int} NOT NULL
) {keyed};

CREATE INDEX events_created ON events (created_at_ms);

-- What the client wants to find again in events; small.
ALTER TABLE jobs ADD COLUMN metadata {bytes};

-- Place in the order of commits: the cursor of the feed.
ALTER TABLE deliveries ADD COLUMN position {int};
-- Equal bytes are stored once per transition: the target whose row holds them. `body` is empty then.
ALTER TABLE deliveries ADD COLUMN body_target {int};
-- Replays so far, and the tries made before the last one: they do not count for the ladder.
ALTER TABLE deliveries ADD COLUMN replays {int} NOT NULL DEFAULT 0;
ALTER TABLE deliveries ADD COLUMN attempts_before {int} NOT NULL DEFAULT 0;
-- 1: Runflow's body, which carries Runflow's signature too.
ALTER TABLE deliveries ADD COLUMN format {int} NOT NULL DEFAULT 0;
-- How long the try that succeeded took, and who answered.
ALTER TABLE deliveries ADD COLUMN duration_ms {int};
ALTER TABLE deliveries ADD COLUMN address TEXT;

-- Where the time of a failed try went: name; name, TCP and TLS of a new connection; until the answer's headers.
ALTER TABLE delivery_attempts ADD COLUMN dns_ms {int};
ALTER TABLE delivery_attempts ADD COLUMN connect_ms {int};
ALTER TABLE delivery_attempts ADD COLUMN first_byte_ms {int};

-- The owner's name for a secret.
ALTER TABLE project_secrets ADD COLUMN label TEXT;
-- 1: the batch's one body is Runflow's.
ALTER TABLE batches ADD COLUMN callback_format {int} NOT NULL DEFAULT 0;

CREATE INDEX deliveries_feed ON deliveries (project_id, position);
CREATE INDEX deliveries_dead ON deliveries (project_id, ended_at_ms) WHERE state = 2;

-- Deliveries sent again by filter, worked off page by page by a dispatcher.
CREATE TABLE replays (
  id {bytes} NOT NULL PRIMARY KEY,
  project_id {int} NOT NULL,
  -- JSON: window, types, endpoint, webhook, states.
  filter TEXT NOT NULL,
  rate_per_second {int} NOT NULL,
  -- Deliveries beyond this place of the feed are not part of it.
  upto_position {int} NOT NULL,
  after_position {int} NOT NULL,
  after_owner {bytes} NOT NULL,
  after_seq {int} NOT NULL,
  after_target {int} NOT NULL,
  -- 0 running, 1 done, 2 cancelled.
  state {int} NOT NULL,
  matched {int} NOT NULL,
  queued {int} NOT NULL,
  created_at_ms {int} NOT NULL,
  updated_at_ms {int} NOT NULL,
  owner TEXT,
  lease_until_ms {int}
) {keyed};

CREATE INDEX replays_running ON replays (created_at_ms) WHERE state = 0;
