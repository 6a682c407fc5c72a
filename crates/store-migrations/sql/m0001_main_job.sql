-- Times are Unix milliseconds on the database's clock. Ids are 16-byte UUIDv7 keys. All integers are 64 bit.

-- Facts about this database: db_epoch, install, shards, partitions.
CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value TEXT NOT NULL
);

CREATE TABLE projects (
  id {id},
  name TEXT NOT NULL UNIQUE,
  created_at_ms {int} NOT NULL
);

-- Secrets that sign the webhooks of a project's jobs; encrypted with the key file. All that are not disabled sign.
CREATE TABLE project_secrets (
  id {id},
  project_id {int} NOT NULL,
  secret_encrypted {bytes} NOT NULL,
  fingerprint {bytes} NOT NULL,
  created_at_ms {int} NOT NULL,
  disabled_at_ms {int},
  UNIQUE (project_id, fingerprint)
);

-- Only the hash of a key is kept. `scopes` is a bit set: 1 submit, 2 read, 4 admin, 8 worker, 16 metrics.
CREATE TABLE api_keys (
  id {id},
  project_id {int} NOT NULL,
  name TEXT NOT NULL,
  key_hash {bytes} NOT NULL UNIQUE,
  scopes {int} NOT NULL,
  created_at_ms {int} NOT NULL,
  disabled_at_ms {int}
);

-- Endpoints as the operator's configuration names them. `config` is what was last seen, for people.
CREATE TABLE endpoints (
  id {id},
  project_id {int} NOT NULL,
  name TEXT NOT NULL,
  config TEXT NOT NULL,
  created_at_ms {int} NOT NULL,
  updated_at_ms {int} NOT NULL,
  UNIQUE (project_id, name)
);

-- One row per job. api-ingest inserts, only the state-tracker updates (P8). Small on purpose: payloads lie elsewhere.
CREATE TABLE jobs (
  id {bytes} NOT NULL PRIMARY KEY,
  project_id {int} NOT NULL,
  endpoint_id {int} NOT NULL,
  lane {int} NOT NULL,
  sync_id {int} NOT NULL,
  state {int} NOT NULL,
  seq {int} NOT NULL,
  revision {int} NOT NULL,
  run {int} NOT NULL,
  publish {int} NOT NULL,
  last_attempt {int} NOT NULL,
  failures {int} NOT NULL,
  max_attempts {int} NOT NULL,
  retry_errors {int} NOT NULL,
  submitted_at_ms {int} NOT NULL,
  queued_at_ms {int} NOT NULL,
  ttl_ms {int},
  ttl_at_ms {int},
  execution_timeout_ms {int} NOT NULL,
  attempt {int},
  nonce {int},
  worker_id TEXT,
  started_at_ms {int},
  delay_ms {int} NOT NULL,
  execution_ms {int} NOT NULL,
  lease_until_ms {int},
  ended_at_ms {int},
  end_reason {int},
  -- When somebody should look at the row: time limits and lease of a live one, retention of an ended one.
  next_check_at_ms {int},
  retain_completed_ms {int} NOT NULL,
  retain_failed_ms {int} NOT NULL,
  -- Deliveries owed so far, counted from transitions and targets: one side of P5.
  owed {int} NOT NULL,
  targets {bytes},
  history {bytes} NOT NULL,
  batch_id {bytes},
  batch_index {int},
  client_ref TEXT,
  idempotency_key TEXT,
  request_hash {bytes},
  traceparent TEXT
) {keyed};

CREATE INDEX jobs_live ON jobs (endpoint_id, id) WHERE state < 2;
CREATE INDEX jobs_due ON jobs (next_check_at_ms) WHERE next_check_at_ms IS NOT NULL;
CREATE INDEX jobs_batch ON jobs (batch_id, batch_index) WHERE batch_id IS NOT NULL;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (project_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- What the handler gets. Immutable.
CREATE TABLE job_inputs (
  job_id {bytes} NOT NULL PRIMARY KEY,
  input {bytes},
  input_blob_key TEXT,
  input_bytes {int} NOT NULL,
  -- Other members of the job object (webhook, policy, metadata, …) as one JSON object; no secrets.
  extra {bytes},
  -- s3Config and other secrets, encrypted with the key file.
  secret_extra_encrypted {bytes}
) {keyed};

-- One immutable row per ended run.
CREATE TABLE results (
  job_id {bytes} NOT NULL,
  run {int} NOT NULL,
  state {int} NOT NULL,
  reason {int} NOT NULL,
  attempt {int},
  worker_id TEXT,
  started_at_ms {int},
  ended_at_ms {int} NOT NULL,
  delay_ms {int} NOT NULL,
  execution_ms {int} NOT NULL,
  output {bytes},
  output_blob_key TEXT,
  output_bytes {int} NOT NULL,
  error TEXT,
  error_type TEXT,
  logs {bytes},
  logs_blob_key TEXT,
  PRIMARY KEY (job_id, run)
) {keyed};

-- Attempts that did not end their run well, and outcomes that came too late.
CREATE TABLE attempts (
  job_id {bytes} NOT NULL,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  nonce {int} NOT NULL,
  reason {int} NOT NULL,
  late {int} NOT NULL,
  worker_id TEXT NOT NULL,
  ended_at_ms {int} NOT NULL,
  execution_ms {int} NOT NULL,
  detail TEXT,
  logs {bytes},
  PRIMARY KEY (job_id, run, attempt, nonce, late)
) {keyed};

-- Last progress value of a live job.
CREATE TABLE job_progress (
  job_id {bytes} NOT NULL PRIMARY KEY,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  value {bytes} NOT NULL,
  at_ms {int} NOT NULL
) {keyed};

-- Pieces of output in the order they were yielded.
CREATE TABLE chunks (
  job_id {bytes} NOT NULL,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  n {int} NOT NULL,
  output {bytes} NOT NULL,
  at_ms {int} NOT NULL,
  PRIMARY KEY (job_id, run, attempt, n)
) {keyed};

-- How far `/stream` of a job was drained. Written by api-ingest.
CREATE TABLE stream_cursors (
  job_id {bytes} NOT NULL PRIMARY KEY,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  next_n {int} NOT NULL,
  -- The end of a cancelled job was told once.
  told_end {int} NOT NULL
) {keyed};

-- One row per transition (or batch end) and target (P4). `state`: 0 pending, 1 delivered, 2 dead, 3 superseded, 4 cancelled.
CREATE TABLE deliveries (
  owner_id {bytes} NOT NULL,
  seq {int} NOT NULL,
  target {int} NOT NULL,
  partition {int} NOT NULL,
  project_id {int} NOT NULL,
  -- JobStatus code, or 100 + BatchStatus code.
  event {int} NOT NULL,
  terminal {int} NOT NULL,
  url TEXT NOT NULL,
  -- BodyParts.
  body {bytes} NOT NULL,
  state {int} NOT NULL,
  attempts {int} NOT NULL,
  created_at_ms {int} NOT NULL,
  next_attempt_at_ms {int},
  ended_at_ms {int},
  last_status {int},
  last_error TEXT,
  PRIMARY KEY (owner_id, seq, target)
) {keyed};

CREATE INDEX deliveries_pending ON deliveries (partition, next_attempt_at_ms) WHERE state = 0;

-- Attempts that failed; the one that succeeded is columns of its delivery.
CREATE TABLE delivery_attempts (
  owner_id {bytes} NOT NULL,
  seq {int} NOT NULL,
  target {int} NOT NULL,
  n {int} NOT NULL,
  at_ms {int} NOT NULL,
  duration_ms {int} NOT NULL,
  status {int},
  error TEXT,
  address TEXT,
  response {bytes},
  PRIMARY KEY (owner_id, seq, target, n)
) {keyed};

-- Who owns a partition of deliveries. The epoch fences what a former owner still wants to write.
CREATE TABLE partition_leases (
  partition {int} NOT NULL PRIMARY KEY,
  owner TEXT NOT NULL,
  epoch {int} NOT NULL,
  expires_at_ms {int} NOT NULL
);

CREATE TABLE batches (
  id {bytes} NOT NULL PRIMARY KEY,
  project_id {int} NOT NULL,
  endpoint_id {int} NOT NULL,
  -- Null until all its jobs are inserted: such a batch was never accepted.
  opened_at_ms {int},
  revision {int} NOT NULL,
  seq {int} NOT NULL,
  status {int} NOT NULL,
  total {int} NOT NULL,
  completed {int} NOT NULL,
  failed {int} NOT NULL,
  cancelled {int} NOT NULL,
  cancel_rest {int} NOT NULL,
  -- 0 none, 1 on failure, 2 by request: what is being cancelled is worked off from here.
  cancel_marker {int} NOT NULL,
  cancel_done {int} NOT NULL,
  callback_url TEXT,
  template TEXT,
  metadata {bytes},
  created_at_ms {int} NOT NULL,
  ended_at_ms {int},
  next_check_at_ms {int},
  idempotency_key TEXT,
  request_hash {bytes},
  owed {int} NOT NULL,
  traceparent TEXT
) {keyed};

CREATE INDEX batches_due ON batches (next_check_at_ms) WHERE next_check_at_ms IS NOT NULL;
CREATE UNIQUE INDEX batches_idempotency ON batches (project_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- Counts per endpoint, one row per writing process so that writers do not wait for each other; summed when read.
CREATE TABLE endpoint_counters (
  endpoint_id {int} NOT NULL,
  writer {int} NOT NULL,
  queued {int} NOT NULL,
  running {int} NOT NULL,
  completed {int} NOT NULL,
  failed {int} NOT NULL,
  cancelled {int} NOT NULL,
  timed_out {int} NOT NULL,
  retried {int} NOT NULL,
  PRIMARY KEY (endpoint_id, writer)
) {keyed};

-- Deliveries removed by retention, so that the books still balance: both sides of P5.
CREATE TABLE purged_totals (
  id {int} NOT NULL PRIMARY KEY,
  owed {int} NOT NULL,
  deliveries {int} NOT NULL
);

CREATE TABLE workers (
  id TEXT PRIMARY KEY,
  last_beat_ms {int} NOT NULL,
  draining {int} NOT NULL,
  device TEXT NOT NULL,
  slots TEXT NOT NULL
);

-- What the tracker could not read or apply.
CREATE TABLE quarantine (
  id {id},
  at_ms {int} NOT NULL,
  kind TEXT NOT NULL,
  error TEXT NOT NULL,
  payload {bytes} NOT NULL
);

CREATE INDEX workers_beat ON workers (last_beat_ms);
